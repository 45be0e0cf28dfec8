"""The chunk-parallel half of the backward pass without a gate or with a per-head gate.

Persistent blocks go over the chunks; a warpgroup owns 64 channels of q's and k's gradients. Tiles come
64 columns of the values at a time, one such stage in flight while another is in use.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import tiles
from pallas_kernels.gpu.recurrence import Kept
from pallas_kernels.gpu.relations import DECAY, KEEP, KEY, NUM_FACTORS, OUT, QUERY, SUM, VALUE
from pallas_kernels.gpu.tiles import CHUNK, COLUMN, ROW, L, columns, constant, iota, rows, tile

MULTIPROCESSORS = 132
HALF = 64  # channels of a warpgroup
STAGES = 2

# Per-token sums over channels that warpgroups exchange.
ASKED, READING, STORED, NEW = range(4)


def head_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    dr: jax.Array,
    kept: Kept,
    dstates: jax.Array,
    factors: jax.Array,
    *,
    gated: bool,
    normalize: bool,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k, beta and the log decay.

    With a chunk's factors (value = beta n, out = m exp(G), keep, decay, n, m, G) of `head_relations`, S the
    state that enters it, dS the gradient of the one that leaves it, raw q and k:

        F = m (dO V'^T) exp(G_r - G_i)            i <= r
        E = (dR V'^T) exp(G_r - G_i)              i < r
        x = out (dO S^T) + F k                    gradient of normalised q, times m
        y = exp(G) (dR S^T) + E k
        z = keep (V' dS^T) + F^T q - (value n E)^T k
        dq = x - (m / scale)^2 q (q . x)
        w  = z - n value y                        gradient of normalised k, times n
        dk = w - n^2 k (k . w)
        dbeta = n (dR . v) - n^2 (k . y)
        dG = q . x - n value (k . y) - k . z,  and for G_end  sum of keep k . (V' dS^T) + decay <S, dS>

    Without ``normalize`` the terms in q (q . x) and k (k . w) are absent.

    Args:
      q, k: [B, T, H, K] bf16; T a multiple of 8, K 64 or 128.
      v, do, dr: [B, T, HV, V] bf16, V of 64; dr of `walk_back`.
      kept: of `walk`.
      dstates: [B, HV, NC, V, K] bf16 of `walk_back`.
      factors: [B, HV, NC, 8, 64] float32.
      gated, normalize, scale: as for `head_relations`.

    Returns:
      dq, dk [B, T, HV, K] bf16, of each value head; dbeta and the gradient of each token's G (a chunk's last
      one with G_end's) [B, HV, NC, 64] float32.
    """
    B, T, H, K = q.shape
    HV, NC = factors.shape[1:3]
    warpgroups = K // HALF
    halves = (STAGES, CHUNK, HALF)
    grads = jax.ShapeDtypeStruct((B, T, HV, K), jnp.bfloat16)
    total = B * HV * NC
    kernel = plgpu.kernel(
        partial(_body, group=HV // H, gated=gated, normalize=normalize, scale=scale),
        out_type=(grads, grads, jax.ShapeDtypeStruct((B, HV, NC, 2, CHUNK), jnp.float32)),
        scratch_types=dict(
            q_tile=tile((2 * warpgroups, CHUNK, HALF), jnp.bfloat16),
            k_tile=tile((2 * warpgroups, CHUNK, HALF), jnp.bfloat16),
            # Each stage's dO and dR; V', v, S^T, dS^T
            do_dr_tile=tile((STAGES * 2, CHUNK, HALF), jnp.bfloat16),
            value_tile=tile(halves, jnp.bfloat16),
            v_tile=tile(halves, jnp.bfloat16),
            state_tile=tile((STAGES, HALF, K), jnp.bfloat16),
            dstate_tile=tile((STAGES, HALF, K), jnp.bfloat16),
            f_tile=tile((CHUNK, CHUNK), jnp.bfloat16),
            e_tile=tile((CHUNK, CHUNK), jnp.bfloat16),
            back_tile=tile((CHUNK, CHUNK), jnp.bfloat16),  # - value n E
            factor_tile=plgpu.SMEM((2, NUM_FACTORS, CHUNK), jnp.float32),
            decay_sum_tile=plgpu.SMEM((2, CHUNK), jnp.float32),  # G once more: by columns
            sums_tile=plgpu.SMEM((warpgroups, 4, CHUNK), jnp.float32),
            leaving_tile=plgpu.SMEM((warpgroups, CHUNK), jnp.float32),
            loaded=plgpu.Barrier(num_arrivals=6, num_barriers=STAGES),
            free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=STAGES),
            chunk_loaded=plgpu.Barrier(num_arrivals=2 + 2 * warpgroups, num_barriers=2),
            chunk_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=2),
            met=plgpu.Barrier(num_arrivals=warpgroups),
        ),
        grid=(min(MULTIPROCESSORS, total),),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name="head_gradients",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    dq, dk, small = kernel(q, k, v, do, dr, kept, dstates, factors)
    return dq, dk, small[..., 0, :], small[..., 1, :]


def _body(
    q_ref,
    k_ref,
    v_ref,
    do_ref,
    dr_ref,
    kept,
    dstates_ref,
    factors_ref,
    dq_ref,
    dk_ref,
    small_ref,
    *,
    q_tile,
    k_tile,
    do_dr_tile,
    value_tile,
    v_tile,
    state_tile,
    dstate_tile,
    f_tile,
    e_tile,
    back_tile,
    factor_tile,
    decay_sum_tile,
    sums_tile,
    leaving_tile,
    loaded,
    free,
    chunk_loaded,
    chunk_free,
    met,
    group,
    gated,
    normalize,
    scale,
):
    B, HV, NC = factors_ref.shape[:3]
    block, wg = lax.axis_index("block"), lax.axis_index("warpgroup")
    K, V = q_ref.shape[-1], v_ref.shape[-1]
    warpgroups, parts = K // HALF, V // HALF
    blocks = min(MULTIPROCESSORS, B * HV * NC)
    count = lax.div(B * HV * NC - block + (blocks - 1), blocks)  # chunks of this block
    square = (CHUNK, HALF)
    mine = pl.ds(wg * HALF, HALF)
    row, column = iota(0), iota(1)
    which: list[Any] = [wg] if warpgroups == 2 else [0, 1]  # the relations (F, E) that this warpgroup makes

    def place(n):
        """Batch row, head and chunk of the block's n-th chunk."""
        at = block + n * blocks
        return lax.div(at, HV * NC), lax.rem(lax.div(at, NC), HV), lax.rem(at, NC)

    def load_part(t):  # part t % parts of chunk t // parts
        b, h, c = place(lax.div(t, parts))
        slot = lax.rem(t, STAGES)
        here, part = pl.ds(c * CHUNK, CHUNK), pl.ds(lax.rem(t, parts) * HALF, HALF)
        bar = loaded.at[slot]
        plgpu.copy_gmem_to_smem(kept.states.at[b, h, c, part], state_tile.at[slot], bar)
        plgpu.copy_gmem_to_smem(dstates_ref.at[b, h, c, part], dstate_tile.at[slot], bar)
        plgpu.copy_gmem_to_smem(do_ref.at[b, here, h, part], do_dr_tile.at[2 * slot], bar)
        plgpu.copy_gmem_to_smem(dr_ref.at[b, here, h, part], do_dr_tile.at[2 * slot + 1], bar)
        plgpu.copy_gmem_to_smem(kept.values.at[b, here, h, part], value_tile.at[slot], bar)
        plgpu.copy_gmem_to_smem(v_ref.at[b, here, h, part], v_tile.at[slot], bar)

    def load_chunk(n):
        b, h, c = place(n)
        slot = lax.rem(n, 2)
        here = pl.ds(c * CHUNK, CHUNK)
        plgpu.copy_gmem_to_smem(factors_ref.at[b, h, c], factor_tile.at[slot], chunk_loaded.at[slot])
        plgpu.copy_gmem_to_smem(factors_ref.at[b, h, c, SUM], decay_sum_tile.at[slot], chunk_loaded.at[slot])
        for half in range(warpgroups):
            channels, at = pl.ds(half * HALF, HALF), slot * warpgroups + half
            for ref, to in ((q_ref, q_tile), (k_ref, k_tile)):
                plgpu.copy_gmem_to_smem(
                    ref.at[b, here, h // group, channels], to.at[at], chunk_loaded.at[slot]
                )

    @pl.when(wg == 0)
    def _first():
        load_chunk(0)

        @pl.loop(0, lax.min(STAGES, count * parts))
        def _(t):
            load_part(t)

    def meet():
        plgpu.commit_smem()
        if warpgroups > 1:
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)

    def nothing():
        return plgpu.layout_cast(jnp.zeros(square, jnp.float32), L)

    def load(ref):
        return plgpu.load(ref, layout=L).astype(jnp.float32)

    @pl.loop(0, count)
    def _chunk(n):
        b, h, c = place(n)
        slot_of_chunk = lax.rem(n, 2)
        factor = factor_tile.at[slot_of_chunk]
        sums = sums_tile.at[wg]
        none = constant(0.0, ROW)
        sums[NEW] = none

        @pl.when((wg == 0) & (n + 1 < count))
        def _next_chunk():
            @pl.when(n > 0)
            def _wait():
                plgpu.barrier_wait(chunk_free.at[lax.rem(n + 1, 2)])

            load_chunk(n + 1)

        def add_part(j, carry):
            x, y, z, overlap, *related = carry  # overlap of S and dS only with a gate
            t = n * parts + j
            slot = lax.rem(t, STAGES)
            plgpu.barrier_wait(loaded.at[slot])
            values = value_tile.at[slot]
            state, dstate = state_tile.at[slot, :, mine], dstate_tile.at[slot, :, mine]
            meetings: list[Any] = [
                (r, [(do_dr_tile.at[2 * slot + i], values.transpose((1, 0)))])
                for r, i in zip(related, which, strict=True)
            ]
            x, y, z, *related = tiles.add_products(
                (x, [(do_dr_tile.at[2 * slot], state)]),
                (y, [(do_dr_tile.at[2 * slot + 1], state)]),
                (z, [(values, dstate)]),
                *meetings,
            )
            if gated:
                overlap = overlap + (load(state) * load(dstate)).sum(axis=1)

            @pl.when(wg == lax.rem(j, warpgroups))
            def _new():
                more = (load(do_dr_tile.at[2 * slot + 1]) * load(v_tile.at[slot])).sum(axis=1)
                sums[NEW] = plgpu.load(sums.at[NEW], layout=ROW) + more

            plgpu.barrier_arrive(free.at[slot])

            @pl.when((wg == 0) & (t + STAGES < count * parts))
            def _next_part():
                plgpu.barrier_wait(free.at[slot])
                load_part(t + STAGES)

            return x, y, z, overlap, *related

        no_overlap = none if gated else None
        first: Any = (nothing(), nothing(), nothing(), no_overlap, *(nothing() for _ in which))
        x, y, z, overlap, *related = lax.fori_loop(0, parts, add_part, first)

        plgpu.barrier_wait(chunk_loaded.at[slot_of_chunk])

        def by_token(i):
            return plgpu.load(factor.at[i], layout=ROW)

        q, k = q_tile.at[slot_of_chunk * warpgroups + wg], k_tile.at[slot_of_chunk * warpgroups + wg]
        x = x * rows(by_token(OUT), square)
        if gated:
            y = y * rows(jnp.exp(by_token(SUM)), square)
            z = z * rows(by_token(KEEP), square)
            leaving_tile[wg] = (z * load(k)).sum(axis=1) + overlap * by_token(DECAY)

        for r, i in zip(related, which, strict=True):
            if gated:
                G = columns(plgpu.load(decay_sum_tile.at[slot_of_chunk], layout=COLUMN), square)
                r = r * jnp.exp(jnp.minimum(rows(by_token(SUM), square) - G, 0.0))

            @pl.when(i == 0)
            def _f(r=r):
                f = jnp.where(column <= row, r * rows(by_token(QUERY), square), 0.0)
                f_tile[...] = f.astype(jnp.bfloat16)

            @pl.when(i == 1)
            def _e(r=r):
                e = jnp.where(column < row, r, 0.0)
                e_tile[...] = e.astype(jnp.bfloat16)
                back_tile[...] = (e * rows(-by_token(VALUE) * by_token(KEY), square)).astype(jnp.bfloat16)

        meet()
        x, y, z = tiles.add_products(
            (x, [(f_tile, k)]),
            (y, [(e_tile, k)]),
            (z, [(f_tile.transpose((1, 0)), q), (back_tile.transpose((1, 0)), k)]),
        )
        sums[ASKED] = (load(q) * x).sum(axis=1)
        sums[READING] = (load(k) * y).sum(axis=1)
        sums[STORED] = (load(k) * z).sum(axis=1)
        meet()

        def summed(i):
            every = [plgpu.load(sums_tile.at[w, i], layout=ROW) for w in range(warpgroups)]
            return sum(every[1:], every[0])

        n_key, value = by_token(KEY), by_token(VALUE)
        asked, reading, stored = summed(ASKED), summed(READING), summed(STORED)
        w = z - y * rows(n_key * value, square)
        if normalize:
            m = by_token(QUERY) * (1 / scale)
            x = x - load(q) * rows(m * m * asked, square)
            w = w - load(k) * rows(n_key * n_key * (stored - n_key * value * reading), square)
        q[...] = x.astype(jnp.bfloat16)
        k[...] = w.astype(jnp.bfloat16)

        @pl.when(wg == 0)
        def _small():
            small_ref.at[b, h, c, 0][...] = n_key * summed(NEW) - n_key * n_key * reading
            if gated:
                dG = asked - n_key * value * reading - stored
                leaving = [plgpu.load(leaving_tile.at[w], layout=COLUMN) for w in range(warpgroups)]
                end = columns(sum(leaving[1:], leaving[0]), square)
                last = jnp.where(row == CHUNK - 1, end, 0.0).sum(axis=1)
                small_ref.at[b, h, c, 1][...] = dG + last

        plgpu.commit_smem()
        here = pl.ds(c * CHUNK, CHUNK)
        plgpu.copy_smem_to_gmem(q, dq_ref.at[b, here, h, mine])
        plgpu.copy_smem_to_gmem(k, dk_ref.at[b, here, h, mine])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if warpgroups > 1:  # nobody still reads what the next chunk writes
            meet()
        plgpu.barrier_arrive(chunk_free.at[slot_of_chunk])

    plgpu.wait_smem_to_gmem(0)
