"""Chunk-parallel half of the op with a per-channel gate.

The products of a chunk with itself are in `channel_products`. Of K > 128 two warpgroups make the sums of a
side of 128 channels each (`sides`); then the first finishes what relates k with k, the second what relates q
with k.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import rowwise, tiles
from pallas_kernels.gpu.channel_decay import token_decays, tokens_in_line
from pallas_kernels.gpu.channel_products import MERGEABLE, ChannelProducts
from pallas_kernels.gpu.inverse import unit_lower_inverse
from pallas_kernels.gpu.limits import PRESENT
from pallas_kernels.gpu.sides import Sides, sides_of
from pallas_kernels.gpu.tiles import (
    CHUNK,
    COLUMN,
    HALF,
    ROW,
    L,
    columns,
    constant,
    iota,
    load,
    rows,
    split,
    tile,
)


def channel_relations(
    q: jax.Array,
    k: jax.Array,
    g: jax.Array,
    tokens: jax.Array,
    gate: jax.Array | None,
    *,
    lower_bound: float | None,
    all_present: bool,
    normalize: bool,
    scale: float,
    keep: bool,
) -> tuple[Any, ...]:
    """Relations within every chunk of 64 tokens and its operands for the walk.

    With n = rsqrt(|k|^2 + 1e-6) (1 unless ``normalize``), m likewise for q, G the chunk's inclusive sum of
    log decays g, rows r and i of one chunk:

        a[r, i] = n_r n_i sum_d k_r[d] k_i[d] exp(G_r[d] - G_i[d])            i < r
        solve   = -a (I + Diag(beta) a)^-1, times Diag(beta) unless ``keep``
        p[r, i] = scale m_r n_i sum_d q_r[d] k_i[d] exp(G_r[d] - G_i[d])      i <= r
        queries, reads, keys = scale m q exp(G), n k exp(G), n k exp(G_end - G)

    Args:
      q, k: [B, T, H, K] bf16 or f16; T a multiple of 8, K 64, 128 or 256.
      g: [B, T, HV, K] log decay, or its raw projection x when ``gate`` is given; any float.
      tokens: [B, HV, NC, 2, 64] float32: beta, and ABSENT (past T, padding), PRESENT or RESET.
      gate: [HV, 2, K] float32, decay rate exp(A_log) and bias: ``g = -rate softplus(x + bias)``, or with a
        lower bound ``g = lower_bound sigmoid(rate (x + bias))``.
      lower_bound: of the gate.
      all_present: the caller's promise that every token up to the last chunk's end is PRESENT.
      normalize: whether q and k are to be L2-normalised.
      scale: multiplies q.
      keep: whether there will be a backward pass. Without one solve is (I + Diag(beta) a)^-1 - I: one product
        less.

    Returns:
      queries, reads and keys [B, HV, NC, 64, K]; solve, p [B, HV, NC, 64, 64], in float16; decay
      exp(G_end) [B, HV, NC, K] float32; of K > 128 n and scale m [B, HV, NC, 2, 64] float32, else None.
    """
    _, _, H, K = q.shape
    B, HV, NC = tokens.shape[:3]
    sides = sides_of(K)
    halves = K // sides // HALF
    operand = jax.ShapeDtypeStruct((B, HV, NC, CHUNK, K), jnp.float16)
    square = jax.ShapeDtypeStruct((B, HV, NC, CHUNK, CHUNK), jnp.float16)

    def some(num, dtype):  # tiles; a side's own lie together
        if sides == 1:
            return [tile((CHUNK, HALF), dtype)] * num
        return tile((sides * num, CHUNK, HALF), dtype)

    def numbers(*shape):
        return plgpu.SMEM(shape if sides == 1 else (sides, *shape), jnp.float32)

    threads: dict[str, Any] = {} if sides == 1 else dict(num_threads=sides, thread_name="warpgroup")
    wide = [] if sides == 1 else [tile((sides, 3 * CHUNK // 2, CHUNK), jnp.float32)]
    scratch = dict(
        q_tile=plgpu.RefUnion(some(halves, q.dtype), some(halves, jnp.float16)),
        k_tile=plgpu.RefUnion(some(halves, q.dtype), some(halves, jnp.float16)),
        g_tile=plgpu.RefUnion(
            (some(halves, g.dtype), some(1, jnp.float16)),
            numbers(CHUNK, K // sides + 8),
        ),
        x_tile=plgpu.RefUnion(
            some(halves + 1, jnp.float16),
            some(2 if sides == 1 else halves + 1, jnp.bfloat16),
            *wide,
        ),
        token_tile=numbers(2, CHUNK),
        norm_tile=numbers(CHUNK),
        decay_tile=numbers(halves, HALF),
        g_loaded=plgpu.Barrier(num_arrivals=1 + halves + (gate is not None), num_barriers=sides),
        loaded=plgpu.Barrier(num_arrivals=2 * halves, num_barriers=sides),
    )
    merges = normalize and lower_bound is not None and lower_bound >= MERGEABLE
    if keep:
        scratch["relation_tile"] = tile((CHUNK, CHUNK), jnp.float16)
    if not (merges and all_present):
        scratch["own_tile"] = numbers(CHUNK)
    if gate is not None:
        scratch["gate_tile"] = numbers(2, K // sides)
    if sides > 1:
        scratch |= dict(met=plgpu.Barrier(num_arrivals=sides), sums_tile=numbers(3, CHUNK))
    kernel = plgpu.kernel(
        partial(
            _body,
            sides=sides,
            halves=halves,
            group=HV // H,
            lower_bound=lower_bound,
            all_present=all_present,
            merges=merges,
            normalize=normalize,
            scale=scale,
        ),
        out_type=(
            *[operand] * 3,
            square,
            square,
            jax.ShapeDtypeStruct((B, HV, NC, K // HALF, HALF), jnp.float32),
            *[jax.ShapeDtypeStruct((B, HV, NC, 2, CHUNK), jnp.float32)] * (sides > 1),
        ),
        scratch_types=scratch,
        grid=(B * HV * NC,),
        grid_names=("block",),
        **threads,
        kernel_name="channel_relations",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    plain = jnp.all(tokens[:, :, :, 1] == PRESENT, axis=-1).astype(jnp.int32)  # [B, HV, NC]
    given = (*(() if all_present else (plain,)), *(() if gate is None else (gate,)))
    queries, reads, keys, solve, p, decay, *norms = kernel(q, k, g, tokens, *given)
    return queries, reads, keys, solve, p, decay.reshape(B, HV, NC, K), norms[0] if norms else None


def total(parts: list[jax.Array]) -> jax.Array:
    """The sum of some arrays."""
    return sum(parts[1:], parts[0])


def _body(
    q_ref,
    k_ref,
    g_ref,
    tokens_ref,
    *refs,
    q_tile,
    k_tile,
    g_tile,
    x_tile,
    token_tile,
    norm_tile,
    decay_tile,
    g_loaded,
    loaded,
    sides,
    halves,
    group,
    lower_bound,
    all_present,
    merges,
    normalize,
    scale,
    own_tile=None,
    relation_tile=None,
    gate_tile=None,
    sums_tile=None,
    **met,
):
    given = list(refs)
    plain_ref = None if all_present else given.pop(0)
    gate_ref: Any = None if gate_tile is None else given.pop(0)
    queries_ref, reads_ref, keys_ref, solve_ref, p_ref, decay_ref, *norms_ref = given
    both = Sides(sides * halves * HALF, **met)
    side = both.mine

    def own(x):  # of what both sides have
        return x.at[side] if sides > 1 else x

    def each(x, num):  # the tiles of `some`
        return [x.at[side * num + i] for i in range(num)] if sides > 1 else x

    (q_raw, q_tile), (k_raw, k_tile) = ([each(x, halves) for x in union] for union in (q_tile, k_tile))
    x_tiles, near_tile, *wide_tile = x_tile
    *x_tile, y_tile = each(x_tiles, halves + 1)
    near_tile = each(near_tile, len(x_tile) + 1 if sides > 1 else 2)[:2]
    (g_raw, sum_tile), G_tile = g_tile
    g_raw, (sum_tile,), G_tile = each(g_raw, halves), each(sum_tile, 1), own(G_tile)
    token_tile, norm_tile, decay_tile, g_loaded, loaded = map(
        own, (token_tile, norm_tile, decay_tile, g_loaded, loaded)
    )
    gate_tile, own_tile = (None if x is None else own(x) for x in (gate_tile, own_tile))
    b, h, c = tiles.place_from_the_end(tokens_ref.shape[:3])
    here = pl.ds(c * CHUNK, CHUNK)
    square = (CHUNK, CHUNK)
    plgpu.copy_gmem_to_smem(tokens_ref.at[b, h, c], token_tile, g_loaded)
    if gate_tile is not None:
        of_head = gate_ref.at[h] if sides == 1 else gate_ref.at[h, :, both.channels(side)]
        plgpu.copy_gmem_to_smem(of_head, gate_tile, g_loaded)
    halves_of_k = [pl.ds((side * halves + half) * HALF, HALF) for half in range(halves)]
    for half, channels in enumerate(halves_of_k):
        plgpu.copy_gmem_to_smem(g_ref.at[b, here, h, channels], g_raw[half], g_loaded)
    for half, channels in enumerate(halves_of_k):
        plgpu.copy_gmem_to_smem(k_ref.at[b, here, h // group, channels], k_raw[half], loaded)
        plgpu.copy_gmem_to_smem(q_ref.at[b, here, h // group, channels], q_raw[half], loaded)

    row, column = iota(0), iota(1)
    sum_tile[...] = jnp.where(column <= row, 1.0, 0.0).astype(jnp.float16)
    plgpu.barrier_wait(g_loaded)

    def G_of(half):
        return G_tile.at[:, pl.ds(half * HALF, HALF)]

    # Log decays to base 2, as two float16 terms, and their sums G from the chunk's start.
    beta = plgpu.load(token_tile.at[0], layout=ROW)
    kind = None if all_present else rows(plgpu.load(token_tile.at[1], layout=ROW), square)
    sums = []
    for half in range(halves):
        channels = pl.ds(half * HALF, HALF)
        g = token_decays(g_raw[half], gate_tile, channels, kind, lower_bound=lower_bound)
        x_tile[0][...], y_tile[...] = split(g, jnp.float16)
        plgpu.commit_smem()
        sums.append(tiles.product(HALF, (sum_tile, x_tile[0]), (sum_tile, y_tile)))
        tiles.meet()  # all warps are done with what is overwritten next
    if sides > 1:  # of both sides
        both.meet()
    line = tokens_in_line()
    for half in range(halves):
        rowwise.scatter(G_of(half), line, sums[half])

    # |k|^2, |q|^2 and, where no product has it, q . k of each token. q and k in float16, where bf16 ones stay
    # as they are: normalised before they are rounded, equal keys would drift (1 - beta |k|^2 below -1) by an
    # equal error a token.
    plgpu.barrier_wait(loaded)
    kk_sums, qq_sums, own_sums = [], [], []
    for half in range(halves):
        q, k = load(q_raw[half]), load(k_raw[half])
        if normalize:
            kk_sums.append((k * k).sum(axis=1))
            qq_sums.append((q * q).sum(axis=1))
        if own_tile is not None:
            own_sums.append((q * k).sum(axis=1))
    if sides > 1:
        every = [x for x in (kk_sums, qq_sums, own_sums) if x]
        for i, x in enumerate(every):
            x[:] = [total(x)]
            sums_tile[side, i] = x[0]
        both.meet()
        for i, x in enumerate(every):
            x.append(plgpu.load(sums_tile.at[1 - side, i], layout=ROW))
    if normalize:
        n, m = lax.rsqrt(total(kk_sums) + 1e-6), lax.rsqrt(total(qq_sums) + 1e-6) * scale
    else:
        n, m = constant(1.0, ROW), constant(scale, ROW)
    if own_tile is not None:
        own_tile[...] = total(own_sums) * n * m  # kept in registers, the compiler would sum late, and spill
    norm_tile[...] = n
    tiles.meet()  # or it would keep q and k
    for half in range(halves):
        for raw, to in ((q_raw, q_tile), (k_raw, k_tile)):
            to[half][...] = plgpu.load(raw[half], layout=L).astype(jnp.float16)
    tiles.meet()  # G is there; the rows of q and k are their warps' own

    products = ChannelProducts(
        q_tile, k_tile, x_tile, near_tile, norm_tile, G_tile, norms=(n, m), line=line, meet=row ^ column
    )
    if not merges:
        kk, qk = products.by_levels()
    elif plain_ref is None:
        kk, qk = products.merged()
    else:  # a reset decays by more than such factors can hold
        kk, qk = lax.cond(plain_ref[b, h, c] != 0, products.merged, products.by_levels)

    def finish_p(qk, to):
        if own_tile is not None:
            qk = jnp.where(row == column, rows(plgpu.load(own_tile, layout=ROW), square), qk)
        tiles.meet()
        to[...] = jnp.where(column <= row, qk, 0.0).astype(jnp.float16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(to, p_ref.at[b, h, c])

    def finish_solve(kk):
        a = jnp.where(column < row, kk, 0.0)
        if relation_tile is not None:
            relation_tile[...] = a.astype(jnp.float16)
        solve = unit_lower_inverse(a * rows(beta, square), y_tile, x_tile[0])
        tiles.meet()
        if relation_tile is not None:
            x_tile[0][...] = solve.astype(jnp.float16)
            plgpu.commit_smem()
            solve = -tiles.product(CHUNK, (relation_tile, x_tile[0]))
        y_tile[...] = jnp.where(column < row, solve, 0.0).astype(jnp.float16)  # all warps have read it
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_tile, solve_ref.at[b, h, c])

    if sides == 1:
        finish_p(qk, x_tile[-1])
        if halves == 1:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        finish_solve(kk)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # for p
    else:
        shares = [wide_tile[0].at[i, pl.ds(0, CHUNK)] for i in range(2)]
        tiles.meet()  # all warps are done with what lay there

        @pl.when(side == 0)
        def _give_qk():
            norms_ref[0].at[b, h, c, 0][...] = n
            norms_ref[0].at[b, h, c, 1][...] = m
            shares[0][...] = qk

        @pl.when(side == 1)
        def _give_kk():
            shares[1][...] = kk

        both.meet()

        @pl.when(side == 0)
        def _solve():
            everything = kk + load(shares[1])
            both.meet()  # nobody still reads what is overwritten next
            finish_solve(everything)

        @pl.when(side == 1)
        def _p():
            everything = qk + load(shares[0])
            both.meet()
            finish_p(everything, y_tile)

    # The operands of the walk: decays from the chunk's start and to its end.
    for half, channels in enumerate(halves_of_k):
        G = rowwise.gather(G_of(half), line, HALF)
        end = plgpu.load(G_tile.at[CHUNK - 1, pl.ds(half * HALF, HALF)], layout=COLUMN)
        decay_tile[half] = jnp.exp2(end)
        decay, left = jnp.exp2(G).astype(jnp.float16), jnp.exp2(columns(end, square) - G).astype(jnp.float16)
        q, k = plgpu.load(q_tile[half], layout=L), plgpu.load(k_tile[half], layout=L)
        m_16, n_16 = (rows(norm, square).astype(jnp.float16) for norm in (m, n))
        q_tile[half][...] = q * (m_16 * decay)
        k_tile[half][...] = k * (n_16 * left)
        x_tile[half][...] = k * (n_16 * decay)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile[half], queries_ref.at[b, h, c, :, channels])
        plgpu.copy_smem_to_gmem(x_tile[half], reads_ref.at[b, h, c, :, channels])
        plgpu.copy_smem_to_gmem(k_tile[half], keys_ref.at[b, h, c, :, channels])
    decay = decay_ref.at[b, h, c] if sides == 1 else decay_ref.at[b, h, c, pl.ds(side * halves, halves)]
    plgpu.copy_smem_to_gmem(decay_tile, decay)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
