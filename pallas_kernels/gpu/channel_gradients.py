"""The chunk-parallel half of the backward pass with a per-channel gate.

Pairs of tokens meet level by level as in `channel_relations`. At each level a row is either in an odd block
(it reads, and is asked) or in an even one (it is stored): one product with a matrix that holds F below its
diagonal and F^T above gives both their gradients, another with E those of the keys.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import rowwise, tiles
from pallas_kernels.gpu.channel_decay import across_border, pull_gate, token_decays, tokens_in_line
from pallas_kernels.gpu.gradient_parts import (
    PartInputs,
    Parts,
    num_turns,
    part_tiles,
)
from pallas_kernels.gpu.limits import MULTIPROCESSORS, PRESENT
from pallas_kernels.gpu.sides import sides_of
from pallas_kernels.gpu.tiles import (
    CHUNK,
    COLUMN,
    HALF,
    ROW,
    L,
    columns,
    constant,
    cut,
    iota,
    load,
    rows,
    split,
    tile,
)

SMALLEST = 1e-20  # unit of F and E: what is far below counts as nothing, what is far above must not overflow

# Vectors of 64 that are stored by rows and loaded by columns (a warpgroup's own, or of F and of E).
BETA, NORM, MOST, END = 0, 1, 3, 5
OWN = 2  # F's diagonal, behind a chunk's tokens


def channel_gradients(
    q: jax.Array,
    k: jax.Array,
    g: jax.Array,
    tokens: jax.Array,
    gate: jax.Array | None,
    values: PartInputs,
    norms: jax.Array | None,
    *,
    lower_bound: float | None,
    all_present: bool,
    normalize: bool,
    scale: float,
) -> tuple[jax.Array, ...]:
    """Gradients of q, k, g, beta and A_log.

    With n, m, G and f = exp(-|G_r - G_border|) of a level as in `channel_relations` (m with the scale), S the
    state that enters the chunk, dS the gradient of the one that leaves it, raw q and k:

        F = m_r n_i beta_i (dO U^T)                        i <= r
        E = -beta_r n_r n_i beta_i (dR U^T)                i < r
        x = m exp(G) (dO S^T) + sum over levels of f F (f k)         gradient of normalised q, times m
        y = -beta n exp(G) (dR S^T) + sum of f E (f k)               ... of k where it reads, times n
        z = beta n exp(G_end - G) (U dS^T) + sum of f (F^T (f q) + E^T (f k))      ... where it is stored
        dq = x - (m / scale)^2 q (q . x)
        dk = y + z - n^2 k (k . (y + z))
        dbeta = dR . U
        dG = q x + k y - k z,  and for G_end  sum of k beta n exp(G_end - G) (U dS^T) + exp(G_end) <S, dS>

    Of K > 128 a turn sees a side of 128 channels: n and m come from the forward pass, and the terms in
    q (q . x) and k (k . (y + z)) are left to `delta_rule.over_group`.

    Args:
      q, k: [B, T, H, K] bf16 or f16; T a multiple of 8, K 64, 128 or 256.
      g, tokens, gate, lower_bound, all_present, normalize, scale: as for `channel_relations`.
      values: do, dr, U and states, V a multiple of 64.
      norms: of `channel_relations`, for K > 128.

    Returns:
      dq, dk [1, B, T, HV, K] in q's dtype, or [2, B, T, HV, K], two bf16 terms, where K > 128 is still to be
      projected; dg bf16 [B, T, HV, K], of each value head; dbeta [B, HV, NC, 64] float32; with a
      gate A_log's gradient in parts [B, HV, NC, K / 64, 64] float32.
    """
    B, T, H, K = q.shape
    HV, NC = tokens.shape[1:3]
    sides = sides_of(K)
    warpgroups = K // sides // HALF
    grads, dg = (jax.ShapeDtypeStruct((B, T, HV, K), t) for t in (q.dtype, jnp.bfloat16))
    in_terms = normalize and sides > 1
    if in_terms:
        grads = jax.ShapeDtypeStruct((2, B, T, HV, K), jnp.bfloat16)

    per_token = jax.ShapeDtypeStruct((B, HV, NC, CHUNK), jnp.float32)
    of_parts = jax.ShapeDtypeStruct((B, HV, NC, K // HALF, CHUNK), jnp.float32)

    def halves_of(dtype):
        return tile((warpgroups, CHUNK, HALF), dtype)

    leaving = [halves_of(jnp.bfloat16)] * in_terms
    relations = tile((2, CHUNK, CHUNK), jnp.float16)  # F and E
    scratch: dict[str, Any] = dict(
        part_tiles=part_tiles(K, stages=1, state_stages=2 if g.dtype.itemsize == 2 else 1, terms=1),
        q_tile=plgpu.RefUnion(halves_of(q.dtype), halves_of(jnp.float16), *leaving),
        k_tile=plgpu.RefUnion(halves_of(q.dtype), halves_of(jnp.float16), *leaving),
        relation_tile=plgpu.RefUnion(relations, halves_of(g.dtype)),
        level_tile=plgpu.RefUnion([halves_of(jnp.float16)] * 2, [halves_of(jnp.bfloat16)] * 2),
        G_tile=plgpu.SMEM((CHUNK, K // sides + 8), jnp.float32),
        sum_tile=tile((1, CHUNK, CHUNK), jnp.bfloat16),
        zero_tile=plgpu.SMEM((8,), jnp.int32),  # see `zero` below
        token_tile=plgpu.SMEM((3, CHUNK), jnp.float32),
        column_tile=plgpu.SMEM((7, CHUNK), jnp.float32),
        sums_tile=plgpu.SMEM((warpgroups, 2, CHUNK), jnp.float32),  # sums over channels (q, k), or norms
        chunk_loaded=plgpu.Barrier(num_arrivals=2 + 3 * warpgroups + (sides > 1)),
    )
    if gate is not None:
        scratch["gate_tile"] = plgpu.SMEM((2, K // sides), jnp.float32)
        scratch["gate_loaded"] = plgpu.Barrier()
        scratch["g_loaded"] = plgpu.Barrier(num_arrivals=warpgroups)
    kernel = plgpu.kernel(
        partial(
            _body,
            group=HV // H,
            lower_bound=lower_bound,
            all_present=all_present,
            normalize=normalize,
            scale=scale,
        ),
        out_type=(grads, grads, dg, per_token, *[of_parts] * (gate is not None)),
        scratch_types=scratch,
        grid=(min(MULTIPROCESSORS, num_turns(values.states)),),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name="channel_gradients",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    dq, dk, *others = kernel(q, k, g, tokens, gate, values, *(() if norms is None else (norms,)))
    return *((dq, dk) if in_terms else (dq[None], dk[None])), *others


def _body(
    q_ref,
    k_ref,
    g_ref,
    tokens_ref,
    gate_ref,
    values,
    *refs,
    part_tiles,
    q_tile,
    k_tile,
    relation_tile,
    level_tile,
    G_tile,
    sum_tile,
    zero_tile,
    token_tile,
    column_tile,
    sums_tile,
    chunk_loaded,
    group,
    lower_bound,
    all_present,
    normalize,
    scale,
    gate_tile=None,
    gate_loaded=None,
    g_loaded=None,
):
    outputs = list(refs)
    wg = lax.axis_index("warpgroup")
    walk = Parts(values, part_tiles, True)
    warpgroups = walk.warpgroups
    norms_ref: Any = outputs.pop(0) if walk.sides > 1 else None
    norm_tile = sums_tile.at[0]
    dq_ref, dk_ref, dg_ref, dbeta_ref, *dA_ref = outputs
    square = (CHUNK, HALF)
    mine = pl.ds(wg * HALF, HALF)
    (q_raw, q_half, *q_leaving), (k_raw, k_half, *k_leaving) = q_tile, k_tile
    relation_tile, g_tile = relation_tile
    level_tile, wide_tile = level_tile
    row, column = iota(0), iota(1)
    G_mine = G_tile.at[:, mine]

    def load_g(n, barrier):
        b, h, c, side = walk.place(n)
        for half in range(warpgroups):
            source = g_ref.at[b, pl.ds(c * CHUNK, CHUNK), h, walk.channels(side, half)]
            plgpu.copy_gmem_to_smem(source, g_tile.at[half], barrier)

    def load_chunk(n):
        b, h, c, side = walk.place(n)
        here = pl.ds(c * CHUNK, CHUNK)
        plgpu.copy_gmem_to_smem(tokens_ref.at[b, h, c], token_tile.at[pl.ds(0, 2)], chunk_loaded)
        plgpu.copy_gmem_to_smem(tokens_ref.at[b, h, c, 0], column_tile.at[BETA], chunk_loaded)
        if norms_ref is not None:
            plgpu.copy_gmem_to_smem(norms_ref.at[b, h, c], norm_tile, chunk_loaded)
        load_g(n, chunk_loaded)
        for half in range(warpgroups):
            channels = walk.channels(side, half)
            for ref, to in ((q_ref, q_raw), (k_ref, k_raw)):
                plgpu.copy_gmem_to_smem(ref.at[b, here, h // group, channels], to.at[half], chunk_loaded)

    def by_column(i):
        return columns(plgpu.load(column_tile.at[i], layout=COLUMN), square)

    walk.start()
    sum_tile[0] = jnp.where(column <= row, 1.0, 0.0).astype(jnp.bfloat16)
    zero_tile[0] = 0

    @pl.when(wg == 0)
    def _first():
        load_chunk(0)

    walk.meet()

    @pl.loop(0, walk.count)
    def _chunk(n):
        b, h, c, side = walk.place(n)
        # Unknown to the compiler, so that it computes addresses here and not, to be spilled, before the loop.
        zero = zero_tile[0]
        me = wg + zero
        line = tokens_in_line() + zero
        last = line | (CHUNK - 1)  # in a form that is not folded: inline code takes no constant
        q, k, ones = q_half.at[me], k_half.at[me], sum_tile.at[zero]

        def stage(x):
            """x [64, 64] in two bf16 terms."""
            plgpu.commit_smem()  # all warps are done with what lay there
            for i, term in enumerate(cut(x)):
                wide_tile[i][me] = term
            plgpu.commit_smem()
            return [wide_tile[i].at[me] for i in range(2)]

        if gate_tile is not None:

            @pl.when(wg == 0)
            def _gate():
                of_head = gate_ref.at[h]
                if walk.sides > 1:
                    width = warpgroups * HALF
                    of_head = gate_ref.at[h, :, pl.ds(side * width, width)]
                plgpu.copy_gmem_to_smem(of_head, gate_tile, gate_loaded)

            plgpu.barrier_wait(gate_loaded)
        plgpu.barrier_wait(chunk_loaded)

        # G to base 2, from the chunk's start. What bf16's 16 bits of a large g miss does no harm: no two
        # tokens with such a decay between them matter to each other.
        kind = None if all_present else rows(plgpu.load(token_tile.at[1], layout=ROW), square)
        g = token_decays(g_tile.at[me], gate_tile, mine, kind, lower_bound=lower_bound)
        rowwise.scatter(G_mine, line, tiles.product(HALF, *[(ones, term) for term in stage(g)]))

        x, y = plgpu.load(q_raw.at[me], layout=L), plgpu.load(k_raw.at[me], layout=L)
        if norms_ref is None:
            sums_tile[wg, 0] = jnp.square(x.astype(jnp.float32)).sum(axis=1)
            sums_tile[wg, 1] = jnp.square(y.astype(jnp.float32)).sum(axis=1)
        q[...], k[...] = x.astype(jnp.float16), y.astype(jnp.float16)
        walk.meet()
        if norms_ref is not None:
            n_key, m_query = (plgpu.load(norm_tile.at[i], layout=ROW) for i in range(2))
        elif normalize:
            n_key, m_query = (
                lax.rsqrt(walk.summed(sums_tile, 1) + 1e-6),
                lax.rsqrt(walk.summed(sums_tile, 0) + 1e-6) * scale,
            )
        else:
            n_key, m_query = constant(1.0, ROW), constant(scale, ROW)
        column_tile[NORM + wg] = n_key
        plgpu.commit_smem()

        x, y, z, overlap, related = walk.sums(n, zero if walk.sides > 1 else None)
        assert overlap is not None
        beta = plgpu.load(token_tile.at[0], layout=ROW)
        G = rowwise.gather(G_mine, line, HALF)
        end = rowwise.gather(G_mine, last, HALF)
        x = x * (jnp.exp2(G) * rows(m_query, square))
        y = y * (jnp.exp2(G) * rows(-beta * n_key, square))
        z = z * (jnp.exp2(end - G) * rows(beta * n_key, square))

        # What reaches the next chunk, by channel.
        shares = tiles.product(CHUNK, *[(s.transpose((1, 0)), ones) for s in stage(load(k) * z)])
        leaving = jnp.where(column == 0, shares, 0.0).sum(axis=1)
        decay = jnp.exp2(plgpu.load(G_tile.at[CHUNK - 1, mine], layout=ROW))
        column_tile[END + wg] = leaving + decay * jnp.where(row == column, overlap, 0.0).sum(axis=1)

        # F and E as float16 in multiples of their largest number, below and (transposed) above the diagonal.
        between = by_column(BETA) * by_column(NORM + wg)
        strict = []
        for r, i in zip(related, walk.relations, strict=True):

            @pl.when(i == 0)
            def _own(r=r):
                diagonal = jnp.where(row == column, r, 0.0).sum(axis=1)
                token_tile[OWN] = diagonal * m_query * n_key * beta

            @pl.when(i == 1 if walk.sides == 1 else (i == 1) & (side == 0))
            def _dbeta(r=r):
                dbeta_ref.at[b, h, c][...] = jnp.where(row == column, r, 0.0).sum(axis=1)

            is_f = jnp.where(i == 0, 1.0, 0.0)  # a select of vectors does not lower
            of_row = is_f * m_query - (1 - is_f) * beta * n_key
            r = jnp.where(column < row, r * rows(of_row, square) * between, 0.0)
            column_tile[MOST + i] = jnp.abs(r).max(axis=1)
            strict.append(r)
        walk.meet()
        most = jnp.maximum(by_column(MOST), by_column(MOST + 1))
        unit = jnp.maximum(most.max(axis=1), SMALLEST)
        root = lax.rsqrt(unit)
        per_unit = root * root
        for r, i in zip(strict, walk.relations, strict=True):
            lower = (r * rows(per_unit, square)).astype(jnp.float16)
            to = relation_tile.at[i]
            to[...] = lower
            plgpu.commit_smem()
            upper = plgpu.load(to.transpose((1, 0)), layout=L)
            plgpu.commit_smem()
            to[...] = lower + upper
        walk.meet()

        def add_level(i, gradients):
            x, w, dG = gradients
            level = 5 - i
            factor = across_border(G_mine, line, level).astype(jnp.float16)
            odd = (lax.shift_right_logical(line, level) & 1).astype(jnp.float32)
            kf = plgpu.load(k, layout=L) * factor
            qf = plgpu.load(q, layout=L) * factor
            plgpu.commit_smem()  # all warps are done with the level before
            level_tile[0][me] = qf * rows(odd.astype(jnp.float16), square) + kf * rows(
                (1 - odd).astype(jnp.float16), square
            )
            level_tile[1][me] = kf
            plgpu.commit_smem()
            of_level = last - (CHUNK - 1) + level
            whole = [plgpu.load(relation_tile.at[j], layout=L) for j in range(2)]
            of_f, of_e = rowwise.pick_level(whole, of_level)
            both = factor.astype(jnp.float32)
            reads = both * rows(odd, square)

            def signed(i):  # what met F or E, negative where it is taken away
                sign = rows((2 * odd - 1).astype(jnp.float16), square)
                return (plgpu.load(level_tile[i].at[me], layout=L) * sign).astype(jnp.float32)

            # One after the other: registers are short. What a pair adds to dG of one token and takes from
            # the other's has to be the same number: behind both, nothing of it may be left.
            f = tiles.product(HALF, (of_f, level_tile[0].at[me]))
            x, w = x + reads * f, w + (both - reads) * f
            dG = dG + signed(0) * f
            e = tiles.product(HALF, (of_e, level_tile[1].at[me]))
            return x, w + both * e, dG + signed(1) * e

        scaled = rows(per_unit, square)
        x, y, z = x * scaled, y * scaled, z * scaled
        x, w, dG = lax.fori_loop(0, 6, add_level, (x, y + z, load(q) * x + load(k) * (y - z)))
        dg = tiles.product(HALF, *[(ones.transpose((1, 0)), s) for s in stage(dG * rows(unit, square))])
        dg = dg + by_column(END + wg)
        if kind is not None:
            dg = jnp.where(kind == PRESENT, dg, 0.0)

        own = rows(plgpu.load(token_tile.at[OWN], layout=ROW), square)
        x = x * rows(unit, square) + own * load(k)
        w = w * rows(unit, square) + own * load(q)
        channels, part = mine, wg
        if walk.sides > 1:
            channels, part = walk.channels(side, me), side * warpgroups + me
        project = normalize and walk.sides == 1
        if project:
            sums_tile[wg, 0] = (load(q) * x).sum(axis=1)
            sums_tile[wg, 1] = (load(k) * w).sum(axis=1)
        walk.meet()
        if gate_tile is not None:  # F and E are done with; g lay there

            @pl.when(wg == 0)
            def _again():
                load_g(n, g_loaded)

        if project:
            m = m_query * (1 / scale)
            x = x - load(q) * rows(m * m * walk.summed(sums_tile, 0), square)
            w = w - load(k) * rows(n_key * n_key * walk.summed(sums_tile, 1), square)
        plgpu.commit_smem()  # all warps are done with q, k and the staged sums
        if q_leaving:
            terms = list(zip((q_leaving[0], wide_tile[0]), split(x, jnp.bfloat16), strict=True))
            terms += list(zip((k_leaving[0], wide_tile[1]), split(w, jnp.bfloat16), strict=True))
            for to, term in terms:
                to[me] = term
            plgpu.commit_smem()
            for i, (to, _) in enumerate(terms):
                ref = (dq_ref, dk_ref)[i // 2].at[i % 2, b, pl.ds(c * CHUNK, CHUNK), h, channels]
                plgpu.copy_smem_to_gmem(to.at[me], ref)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        else:
            q_raw[me], k_raw[me] = x.astype(dq_ref.dtype), w.astype(dk_ref.dtype)
        if gate_tile is not None:
            plgpu.barrier_wait(g_loaded)
            dg, dA = pull_gate(dg, g_tile.at[me], gate_tile, mine, lower_bound=lower_bound)
            dA_ref[0].at[b, h, c, part][...] = dA.sum(axis=1)
        wide_tile[0][me] = dg.astype(jnp.bfloat16)
        plgpu.commit_smem()
        here = pl.ds(c * CHUNK, CHUNK)
        if not q_leaving:
            plgpu.copy_smem_to_gmem(q_raw.at[me], dq_ref.at[b, here, h, channels])
            plgpu.copy_smem_to_gmem(k_raw.at[me], dk_ref.at[b, here, h, channels])
        plgpu.copy_smem_to_gmem(wide_tile[0].at[me], dg_ref.at[b, here, h, channels])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        walk.meet()  # nobody still reads what the next chunk writes

        @pl.when((wg == 0) & (n + 1 < walk.count))
        def _next_chunk():
            load_chunk(n + 1)

    plgpu.wait_smem_to_gmem(0)
