"""The chunk-parallel half of the backward pass without a gate or with a per-head gate."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import tiles
from pallas_kernels.gpu.gradient_parts import (
    PartInputs,
    Parts,
    num_turns,
    part_tiles,
)
from pallas_kernels.gpu.limits import MULTIPROCESSORS
from pallas_kernels.gpu.relations import BETA, DECAY, KEEP, KEY, NUM_FACTORS, OUT, QUERY, READ, SUM
from pallas_kernels.gpu.sides import sides_of
from pallas_kernels.gpu.tiles import CHUNK, COLUMN, HALF, ROW, L, columns, cut, iota, load, rows, split, tile

STAGES = 2

# Per-token sums over channels that warpgroups exchange.
ASKED, READING, STORED = range(3)


def head_gradients(
    q: jax.Array,
    k: jax.Array,
    factors: jax.Array,
    values: PartInputs,
    *,
    gated: bool,
    normalize: bool,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k, beta and the log decay.

    With a chunk's factors (beta, read, out, keep, decay, n, m, G) of `head_relations`, S the state that
    enters it, dS the gradient of the one that leaves it, raw q and k:

        F = m (dO U^T) beta_i exp(G_r - G_i)               i <= r
        E = -beta n^2 (dR U^T) beta_i exp(G_r - G_i)       i < r
        x = out (dO S^T) + F k                    gradient of normalised q, times m
        y = -beta read (dR S^T) + E k             gradient of normalised k where it reads, times n
        z = keep beta (U dS^T) + F^T q + E^T k    ... and where it is stored
        dq = x - (m / scale)^2 q (q . x)
        dk = y + z - n^2 k (k . (y + z))
        dbeta = dR . U
        dG = q . x + k . y - k . z,  and for G_end  sum of keep beta k . (U dS^T) + decay <S, dS>

    Without ``normalize`` the terms in q (q . x) and k (k . (y + z)) are absent; and of K > 128, whose sides
    do not meet: `delta_rule.over_group` adds them. F and E enter products as two
    terms: where keys repeat, U and dR alternate, and their sums are far smaller than they.

    Args:
      q, k: [B, T, H, K] bf16 or f16 (rounded to bf16 here); T a multiple of 8, K 64, 128 or 256.
      factors: [B, HV, NC, 8, 64] float32.
      values: do, dr, U and states, V a multiple of 64.
      gated, normalize, scale: as for `head_relations`.

    Returns:
      dq, dk [1, B, T, HV, K] in q's dtype, or [2, B, T, HV, K], two bf16 terms, where K > 128 is still to be
      projected, of each value head;
      dbeta and the gradient of each token's G (a chunk's last one with G_end's) [B, HV, NC, 64] float32.
    """
    B, T, H, K = q.shape
    HV, NC = factors.shape[1:3]
    sides = sides_of(K)
    warpgroups = K // sides // HALF
    terms = 2 if normalize and sides > 1 else 1
    grads = jax.ShapeDtypeStruct((terms, B, T, HV, K), jnp.bfloat16 if terms == 2 else q.dtype)
    raw, wide = (tile((warpgroups, CHUNK, HALF), t) for t in (q.dtype, jnp.bfloat16))
    kernel = plgpu.kernel(
        partial(_body, group=HV // H, gated=gated, normalize=normalize, scale=scale),
        out_type=(grads, grads, jax.ShapeDtypeStruct((B, HV, NC, sides, 2, CHUNK), jnp.float32)),
        scratch_types=dict(
            part_tiles=part_tiles(K, stages=STAGES, state_stages=STAGES, terms=values.dr.shape[0]),
            q_tile=raw if q.dtype == jnp.bfloat16 else plgpu.RefUnion(raw, wide),
            k_tile=raw if q.dtype == jnp.bfloat16 else plgpu.RefUnion(raw, wide),
            f_tile=tile((2, CHUNK, CHUNK), jnp.bfloat16),
            e_tile=tile((2, CHUNK, CHUNK), jnp.bfloat16),
            zero_tile=plgpu.SMEM((8,), jnp.int32),  # see `zero` below
            factor_tile=plgpu.SMEM((NUM_FACTORS, CHUNK), jnp.float32),
            column_tile=plgpu.SMEM((2, CHUNK), jnp.float32),  # beta and G once more: by columns
            sums_tile=plgpu.SMEM((warpgroups, 3, CHUNK), jnp.float32),
            leaving_tile=plgpu.SMEM((warpgroups, CHUNK), jnp.float32),
            chunk_loaded=plgpu.Barrier(num_arrivals=3 + 2 * warpgroups),
        ),
        grid=(min(MULTIPROCESSORS, num_turns(values.states)),),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name="head_gradients",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    dq, dk, small = kernel(q, k, factors, values)
    return dq, dk, small[:, :, :, 0, 0], small[..., 1, :].sum(axis=3)


def _body(
    q_ref,
    k_ref,
    factors_ref,
    values,
    dq_ref,
    dk_ref,
    small_ref,
    *,
    part_tiles,
    q_tile,
    k_tile,
    f_tile,
    e_tile,
    zero_tile,
    factor_tile,
    column_tile,
    sums_tile,
    leaving_tile,
    chunk_loaded,
    group,
    gated,
    normalize,
    scale,
):
    wg = lax.axis_index("warpgroup")
    walk = Parts(values, part_tiles, gated)
    q_raw, k_raw = q_tile, k_tile
    if q_ref.dtype != jnp.bfloat16:
        (q_raw, q_tile), (k_raw, k_tile) = q_tile, k_tile
    square = (CHUNK, HALF)
    row, column = iota(0), iota(1)

    def load_chunk(n):
        b, h, c, side = walk.place(n)
        here = pl.ds(c * CHUNK, CHUNK)
        plgpu.copy_gmem_to_smem(factors_ref.at[b, h, c], factor_tile, chunk_loaded)
        for i, which in enumerate((BETA, SUM)):
            plgpu.copy_gmem_to_smem(factors_ref.at[b, h, c, which], column_tile.at[i], chunk_loaded)
        for half in range(walk.warpgroups):
            channels = walk.channels(side, half)
            for ref, to in ((q_ref, q_raw), (k_ref, k_raw)):
                plgpu.copy_gmem_to_smem(ref.at[b, here, h // group, channels], to.at[half], chunk_loaded)

    walk.start()
    zero_tile[0] = 0
    plgpu.commit_smem()

    @pl.when(wg == 0)
    def _first():
        load_chunk(0)

    def by_token(i):
        return plgpu.load(factor_tile.at[i], layout=ROW)

    def by_column(i):
        return columns(plgpu.load(column_tile.at[i], layout=COLUMN), square)

    @pl.loop(0, walk.count)
    def _chunk(n):
        b, h, c, side = walk.place(n)
        mine = walk.channels(side, wg)
        sums = sums_tile.at[wg]
        x, y, z, overlap, related = walk.sums(n)
        plgpu.barrier_wait(chunk_loaded)
        # Unknown to the compiler, so that it computes addresses here and not, to be spilled, before the loop.
        zero = zero_tile[0]
        q, k = q_tile.at[wg + zero], k_tile.at[wg + zero]
        if q_ref.dtype != jnp.bfloat16:
            for to, raw in ((q, q_raw), (k, k_raw)):
                to[...] = plgpu.load(raw.at[wg + zero], layout=L).astype(jnp.bfloat16)
        x = x * rows(by_token(OUT), square)
        y = y * rows(by_token(BETA) * -by_token(READ), square)
        z = z * rows(by_token(BETA) * by_token(KEEP), square)
        if overlap is not None:
            overlap = jnp.where(row == column, overlap, 0.0).sum(axis=1)
            leaving_tile[wg] = (z * load(k)).sum(axis=1) + overlap * by_token(DECAY)

        for r, i in zip(related, walk.relations, strict=True):

            @pl.when(i == 1)
            def _dbeta(r=r):
                small_ref.at[b, h, c, side, 0][...] = jnp.where(row == column, r, 0.0).sum(axis=1)

            r = r * by_column(0)
            if gated:
                r = r * jnp.exp(jnp.minimum(rows(by_token(SUM), square) - by_column(1), 0.0))

            def store(to, x):
                to[zero], to[zero + 1] = cut(x)

            @pl.when(i == 0)
            def _f(r=r):
                store(f_tile, jnp.where(column <= row, r * rows(by_token(QUERY), square), 0.0))

            @pl.when(i == 1)
            def _e(r=r):
                n = by_token(KEY)
                store(e_tile, jnp.where(column < row, r * rows(n * n * -by_token(BETA), square), 0.0))

        walk.meet()
        fs, es = ([t.at[zero + i] for i in range(2)] for t in (f_tile, e_tile))
        x, y, z = tiles.add_products(
            (x, [(f, k) for f in fs]),
            (y, [(e, k) for e in es]),
            (z, [(f.transpose((1, 0)), q) for f in fs] + [(e.transpose((1, 0)), k) for e in es]),
        )
        sums[ASKED] = (load(q) * x).sum(axis=1)
        sums[READING] = (load(k) * y).sum(axis=1)
        sums[STORED] = (load(k) * z).sum(axis=1)
        walk.meet()

        asked, reading, stored = (
            walk.summed(sums_tile, ASKED),
            walk.summed(sums_tile, READING),
            walk.summed(sums_tile, STORED),
        )
        w = y + z
        if normalize and walk.sides == 1:
            m, n_key = by_token(QUERY) * (1 / scale), by_token(KEY)
            x = x - load(q) * rows(m * m * asked, square)
            w = w - load(k) * rows(n_key * n_key * (stored + reading), square)
        q_terms, k_terms = [q], [k]
        if dq_ref.shape[0] == 1:
            q_terms, k_terms = [q_raw.at[wg + zero]], [k_raw.at[wg + zero]]
            q_terms[0][...], k_terms[0][...] = x.astype(q_ref.dtype), w.astype(k_ref.dtype)
        else:  # F and E are done with
            q_terms.append(f_tile.at[wg + zero])
            k_terms.append(e_tile.at[wg + zero])
            for to, terms in ((q_terms, split(x, jnp.bfloat16)), (k_terms, split(w, jnp.bfloat16))):
                for t, term in zip(to, terms, strict=True):
                    t[...] = term

        if gated:

            @pl.when(wg == 0)
            def _dG():
                leaving = [plgpu.load(leaving_tile.at[w], layout=COLUMN) for w in range(walk.warpgroups)]
                end = columns(sum(leaving[1:], leaving[0]), square)
                last = jnp.where(row == CHUNK - 1, end, 0.0).sum(axis=1)
                small_ref.at[b, h, c, side, 1][...] = asked + reading - stored + last

        plgpu.commit_smem()
        here = pl.ds(c * CHUNK, CHUNK)
        for ref, tiles_of in ((dq_ref, q_terms), (dk_ref, k_terms)):
            for i, t in enumerate(tiles_of):
                plgpu.copy_smem_to_gmem(t, ref.at[i, b, here, h, mine])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        walk.meet()  # nobody still reads what the next chunk writes

        @pl.when((wg == 0) & (n + 1 < walk.count))
        def _next_chunk():
            load_chunk(n + 1)

    plgpu.wait_smem_to_gmem(0)
