"""Chunk-parallel half of the op with a per-channel gate.

The decay between two tokens differs by channel, so it has to enter the products' operands. Tokens r and i < r
meet where blocks of s = 1, 2, 4, ... tokens pair up with r in the odd block and i in the even one before it.
Across the border a between the two, ``exp(G_r - G_i) = exp(G_r - G_a) exp(G_a - G_i)`` with both factors at
most 1, whatever the gate: one product of the chunk with itself for each s, of which that level's blocks are
kept.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.inverse import unit_lower_inverse
from pallas_kernels.gpu.tiles import CHUNK, COLUMN, ROW, L, columns, constant, iota, product, rows, tile
from pallas_kernels.gpu.warp_rows import border_rows, store_warp_row

LOG2E = 1.4426950408889634
MIN_LOG_DECAY = -100.0
HALF = 64  # channels at a time

# What becomes of a token, second row of ``tokens``.
ABSENT, PRESENT, RESET = 0.0, 1.0, 2.0


def channel_relations(
    q: jax.Array,
    k: jax.Array,
    g: jax.Array,
    tokens: jax.Array,
    gate: jax.Array | None,
    *,
    lower_bound: float | None,
    normalize: bool,
    scale: float,
) -> tuple[jax.Array, ...]:
    """Relations within every chunk of 64 tokens and its operands for the walk.

    With n = rsqrt(|k|^2 + 1e-6) (1 unless ``normalize``), m likewise for q, G the chunk's inclusive sum of
    log decays g, rows r and i of one chunk:

        A[r, i] = beta_r n_r n_i sum_d k_r[d] k_i[d] exp(G_r[d] - G_i[d])     i < r
        inverse = (I + A)^-1 - I
        p[r, i] = scale m_r n_i sum_d q_r[d] k_i[d] exp(G_r[d] - G_i[d])      i <= r
        queries, reads, keys = scale m q exp(G), n k exp(G), n k exp(G_end - G)

    Args:
      q, k: [B, T, H, K] bf16 or f16; T a multiple of 8, K 64 or 128.
      g: [B, T, HV, K] log decay, or its raw projection x when ``gate`` is given; any float.
      tokens: [B, HV, NC, 2, 64] float32: beta, and ABSENT (past T, padding), PRESENT or RESET.
      gate: [HV, 2, K] float32, decay rate exp(A_log) and bias: ``g = -rate softplus(x + bias)``, or with a
        lower bound ``g = lower_bound sigmoid(rate (x + bias))``.
      lower_bound: of the gate.
      normalize: whether q and k are to be L2-normalised.
      scale: multiplies q.

    Returns:
      queries, reads and keys [B, HV, NC, 64, K]; inverse, p [B, HV, NC, 64, 64], in float16; decay
      exp(G_end) [B, HV, NC, K] float32.
    """
    _, _, H, K = q.shape
    B, HV, NC = tokens.shape[:3]
    halves = K // HALF
    operand = jax.ShapeDtypeStruct((B, HV, NC, CHUNK, K), jnp.float16)
    square = jax.ShapeDtypeStruct((B, HV, NC, CHUNK, CHUNK), jnp.float16)
    scratch = dict(
        q_tile=tile((halves, CHUNK, HALF), q.dtype),
        k_tile=tile((halves, CHUNK, HALF), q.dtype),
        g_tile=tile((halves, CHUNK, HALF), g.dtype),
        x_tile=tile((CHUNK, HALF), jnp.float16),
        y_tile=tile((CHUNK, HALF), jnp.float16),
        sum_tile=tile((CHUNK, CHUNK), jnp.float16),
        p_tile=tile((CHUNK, CHUNK), jnp.float16),
        t_tile=tile((CHUNK, CHUNK), jnp.float16),
        token_tile=plgpu.SMEM((2, CHUNK), jnp.float32),
        norm_tile=plgpu.SMEM((CHUNK,), jnp.float32),
        total_tile=plgpu.SMEM((4, HALF), jnp.float32),
        decay_tile=plgpu.SMEM((halves, HALF), jnp.float32),
        loaded=plgpu.Barrier(num_arrivals=1 + 3 * halves + (gate is not None)),
    )
    if gate is not None:
        scratch["gate_tile"] = plgpu.SMEM((2, K), jnp.float32)
    kernel = plgpu.kernel(
        partial(
            _body,
            halves=halves,
            group=HV // H,
            lower_bound=lower_bound,
            normalize=normalize,
            scale=scale,
        ),
        out_type=(
            *[operand] * 3,
            square,
            square,
            jax.ShapeDtypeStruct((B, HV, NC, halves, HALF), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(NC, HV, B),
        grid_names=("chunk", "head", "batch"),
        kernel_name="channel_relations",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    queries, reads, keys, inverse, p, decay = kernel(q, k, g, tokens, *(() if gate is None else (gate,)))
    return queries, reads, keys, inverse, p, decay.reshape(B, HV, NC, K)


def activate(x: jax.Array, rate: jax.Array, bias: jax.Array, lower_bound: float | None) -> jax.Array:
    """Log decay [64, N] of the raw projection x [64, N]; rate and bias are [N]."""
    x, rate = x + columns(bias, x.shape), columns(rate, x.shape)
    if lower_bound is None:
        small = jnp.exp(-jnp.abs(x))  # softplus(x) = max(x, 0) + log(1 + small)
        series = small * (1 - small * (0.5 - small * (1 / 3)))
        return -rate * (jnp.maximum(x, 0.0) + jnp.where(small < 0.01, series, jnp.log(1 + small)))
    root = lax.rsqrt(1 + jnp.exp(-rate * x))  # cheaper than a division
    return lower_bound * root * root


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
    y_tile,
    sum_tile,
    p_tile,
    t_tile,
    token_tile,
    norm_tile,
    total_tile,
    decay_tile,
    loaded,
    halves,
    group,
    lower_bound,
    normalize,
    scale,
    gate_tile=None,
):
    queries_ref, reads_ref, keys_ref, inverse_ref, p_ref, decay_ref = refs[-6:]
    c, h, b = (lax.axis_index(name) for name in ("chunk", "head", "batch"))
    here = pl.ds(c * CHUNK, CHUNK)
    square = (CHUNK, CHUNK)
    plgpu.copy_gmem_to_smem(tokens_ref.at[b, h, c], token_tile, loaded)
    if gate_tile is not None:
        plgpu.copy_gmem_to_smem(refs[0].at[h], gate_tile, loaded)
    for half in range(halves):
        channels = pl.ds(half * HALF, HALF)
        plgpu.copy_gmem_to_smem(k_ref.at[b, here, h // group, channels], k_tile.at[half], loaded)
        plgpu.copy_gmem_to_smem(q_ref.at[b, here, h // group, channels], q_tile.at[half], loaded)
        plgpu.copy_gmem_to_smem(g_ref.at[b, here, h, channels], g_tile.at[half], loaded)

    row, column = iota(0), iota(1)
    meet = row ^ column
    # Sums within blocks of 16 tokens: the rows of one warp.
    sum_tile[...] = jnp.where((column <= row) & (meet < 16), 1.0, 0.0).astype(jnp.float16)
    plgpu.barrier_wait(loaded)

    def load(ref):
        return plgpu.load(ref, layout=L).astype(jnp.float32)

    beta = plgpu.load(token_tile.at[0], layout=ROW)
    present = plgpu.load(token_tile.at[1], layout=ROW)
    if normalize:

        def inverse_norm(x_tile):
            squares = sum((x * x).sum(axis=1) for x in (load(x_tile.at[i]) for i in range(halves)))
            return lax.rsqrt(squares + 1e-6)

        n, m = inverse_norm(k_tile), inverse_norm(q_tile) * scale
    else:
        n, m = constant(1.0, ROW), constant(scale, ROW)
    norm_tile[...] = n

    def relate(half, related):
        kk, qk = related
        channels = pl.ds(half * HALF, HALF)
        x = load(g_tile.at[half])
        if gate_tile is not None:
            rate = plgpu.load(gate_tile.at[0, channels], layout=COLUMN)
            x = activate(x, rate, plgpu.load(gate_tile.at[1, channels], layout=COLUMN), lower_bound)
        here_too = rows(present, square)
        g = jnp.where(here_too == PRESENT, jnp.maximum(x, MIN_LOG_DECAY), 0.0)
        g = jnp.where(here_too == RESET, MIN_LOG_DECAY, g) * LOG2E  # base 2 from here on
        high = g.astype(jnp.float16)
        x_tile[...] = high
        y_tile[...] = (g - high.astype(jnp.float32)).astype(jnp.float16)
        plgpu.commit_smem()
        from_start = product(HALF, (sum_tile, x_tile), (sum_tile, y_tile))  # of the block of 16, inclusive
        store_warp_row(border_rows(from_start, 16), total_tile)
        plgpu.commit_smem()

        def total(i):  # of the i-th block of 16
            return plgpu.load(total_tile.at[i], layout=COLUMN)

        def to_end():
            return border_rows(from_start, 16) - from_start

        for s in range(6):
            if s < 4:
                exponent = -jnp.abs(from_start - border_rows(from_start, 1 << s))
            elif s == 4:
                exponent = jnp.where((row & 16) == 16, from_start, to_end())
            else:
                after = from_start + jnp.where(row >= 48, columns(total(2), square), 0.0)
                before = to_end() + jnp.where(row < 16, columns(total(1), square), 0.0)
                exponent = jnp.where(row >= 32, after, before)
            factor = jnp.exp2(exponent)
            kf = (load(k_tile.at[half]) * factor).astype(jnp.float16)
            x_tile[...] = kf
            plgpu.commit_smem()
            level = (meet >> s) == 1
            xt = x_tile.transpose((1, 0))
            kk += jnp.where(level, product(CHUNK, (kf, xt)), 0.0)
            qf = (load(q_tile.at[half]) * factor).astype(jnp.float16)
            qk += jnp.where(level, product(CHUNK, (qf, xt)), 0.0)
        plgpu.commit_smem()

        # The operands of the walk: decays from the chunk's start and to its end.
        k, q = load(k_tile.at[half]), load(q_tile.at[half])
        qk += jnp.where(meet == 0, rows((q * k).sum(axis=1), square), 0.0)
        G = from_start
        for i in range(3):
            G += jnp.where(row >= 16 * (i + 1), columns(total(i), square), 0.0)
        decay = jnp.exp2(G)
        k = k * rows(n, square)
        x_tile[...] = (q * rows(m, square) * decay).astype(jnp.float16)
        y_tile[...] = (k * decay).astype(jnp.float16)
        left = to_end()
        for i in range(1, 4):
            left += jnp.where(row < 16 * i, columns(total(i), square), 0.0)
        p_tile[...] = (k * jnp.exp2(left)).astype(jnp.float16)
        decay_tile[half] = jnp.exp2(total(0) + total(1) + total(2) + total(3))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x_tile, queries_ref.at[b, h, c, :, channels])
        plgpu.copy_smem_to_gmem(y_tile, reads_ref.at[b, h, c, :, channels])
        plgpu.copy_smem_to_gmem(p_tile, keys_ref.at[b, h, c, :, channels])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        return kk, qk

    nothing = plgpu.layout_cast(jnp.zeros(square, jnp.float32), L)
    kk, qk = lax.fori_loop(0, halves, relate, (nothing, nothing))
    plgpu.copy_smem_to_gmem(decay_tile, decay_ref.at[b, h, c])
    n_column = columns(plgpu.load(norm_tile, layout=COLUMN), square)
    qk = jnp.where(column <= row, qk * rows(m, square) * n_column, 0.0)
    p_tile[...] = qk.astype(p_tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(p_tile, p_ref.at[b, h, c])

    a = jnp.where(column < row, kk * rows(beta * n, square) * n_column, 0.0)
    x = unit_lower_inverse(a, x_tile, y_tile)
    t_tile[...] = jnp.where(column < row, x, 0.0).astype(t_tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(t_tile, inverse_ref.at[b, h, c])
    plgpu.wait_smem_to_gmem(0)
