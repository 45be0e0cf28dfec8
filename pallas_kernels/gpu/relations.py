"""Chunk-parallel half without a gate or with a per-head gate: what tokens of a chunk do to each other.

One chunk per block: relation matrices K K^T and Q K^T with their decays, the triangular inverse, and the
per-token factors that the recurrence multiplies with. q and k stay unnormalised in memory; their norms are
folded into these factors.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import tiles
from pallas_kernels.gpu.inverse import unit_lower_inverse
from pallas_kernels.gpu.tiles import CHUNK, COLUMN, ROW, L, columns, constant, iota, rows, tile

# Rows of the per-token factors.
BETA, READ, OUT, KEEP, DECAY, KEY, QUERY, SUM = range(8)
NUM_FACTORS = 8


def head_relations(
    q: jax.Array, k: jax.Array, tokens: jax.Array, *, gated: bool, normalize: bool, scale: float, keep: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Relations within every chunk of 64 tokens.

    With n = rsqrt(|k|^2 + 1e-6) (1 unless ``normalize``), m likewise for q, G the chunk's inclusive sum of
    log decays:

        a[r, i] = n_r n_i (k_r . k_i) exp(G_r - G_i)            i < r
        solve   = -Diag(n) a (I + Diag(beta) a)^-1 Diag(1 / n)  acts on values scaled by n; times Diag(beta)
                  unless ``keep``, which is (I + Diag(beta) a)^-1 - I between the norms: a product less
        p[r, i] = scale m_r (q_r . k_i) exp(G_r - G_i)          i <= r
        factors = beta, n^2 exp(G), scale m exp(G), exp(G_end - G), exp(G_end), n, scale m, G

    Args:
      q, k: [B, T, H, K] bf16 or f16; T a multiple of 8, K 64, 128 or 256.
      tokens: [B, HV, NC, 2, 64] float32, beta and log decay (in -100..0) of each token; zeros past T.
      gated: whether there is a decay.
      normalize: whether q and k are to be L2-normalised.
      scale: multiplies q.
      keep: whether there will be a backward pass.

    Returns:
      solve and p [B, HV, NC, 64, 64] in q's dtype, factors [B, HV, NC, 8, 64] float32.
    """
    _, _, H, K = q.shape
    B, HV, NC = tokens.shape[:3]
    square = jax.ShapeDtypeStruct((B, HV, NC, CHUNK, CHUNK), q.dtype)
    kernel = plgpu.kernel(
        partial(_body, group=HV // H, gated=gated, normalize=normalize, scale=scale, keep=keep),
        out_type=(square, square, jax.ShapeDtypeStruct((B, HV, NC, NUM_FACTORS, CHUNK), jnp.float32)),
        scratch_types=dict(
            q_tile=plgpu.RefUnion(tile((CHUNK, K), q.dtype), tile((CHUNK, CHUNK), jnp.float16)),
            k_tile=tile((CHUNK, K), q.dtype),
            a_tile=tile((CHUNK, CHUNK), jnp.float16),
            x_tile=tile((CHUNK, CHUNK), jnp.float16),
            p_tile=tile((CHUNK, CHUNK), q.dtype),
            t_tile=tile((CHUNK, CHUNK), q.dtype),
            token_tile=plgpu.SMEM((2, CHUNK), jnp.float32),
            factor_tile=plgpu.SMEM((NUM_FACTORS, CHUNK), jnp.float32),
            norm_tile=plgpu.SMEM((CHUNK,), jnp.float32),
            sum_tile=plgpu.SMEM((CHUNK,), jnp.float32),
            loaded=plgpu.Barrier(num_arrivals=3),
        ),
        grid=(B * HV * NC,),
        grid_names=("block",),
        kernel_name="head_relations",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    return kernel(q, k, tokens)


def _body(
    q_ref,
    k_ref,
    tokens_ref,
    solve_ref,
    p_ref,
    factors_ref,
    *,
    q_tile,
    k_tile,
    a_tile,
    x_tile,
    p_tile,
    t_tile,
    token_tile,
    factor_tile,
    norm_tile,
    sum_tile,
    loaded,
    group,
    gated,
    normalize,
    scale,
    keep,
):
    q_tile, relation_tile = q_tile
    b, h, c = tiles.place_from_the_end(tokens_ref.shape[:3])
    here = pl.ds(c * CHUNK, CHUNK)
    square = (CHUNK, CHUNK)
    plgpu.copy_gmem_to_smem(tokens_ref.at[b, h, c], token_tile, loaded)
    plgpu.copy_gmem_to_smem(k_ref.at[b, here, h // group], k_tile, loaded)
    plgpu.copy_gmem_to_smem(q_ref.at[b, here, h // group], q_tile, loaded)
    plgpu.barrier_wait(loaded)

    beta = plgpu.load(token_tile.at[0], layout=ROW)  # [64]
    row, column = iota(0), iota(1)

    def inverse_norm(ref):  # in halves, to need fewer registers
        parts = [plgpu.load(ref.at[:, pl.ds(i, 64)], layout=L) for i in range(0, ref.shape[1], 64)]
        squares = [jnp.square(x.astype(jnp.float32)).sum(axis=1) for x in parts]
        return lax.rsqrt(sum(squares[1:], squares[0]) + 1e-6)

    if normalize:
        n, m = inverse_norm(k_tile), inverse_norm(q_tile) * scale  # [64]
    else:
        n, m = constant(1.0, ROW), constant(scale, ROW)
    norm_tile[...] = n
    if gated:
        g = plgpu.load(token_tile.at[1], layout=COLUMN)
        G = jnp.where(column <= row, columns(g, square), 0.0).sum(axis=1)  # [64]
        end = jnp.where(column >= 0, columns(g, square), 0.0).sum(axis=1)  # [64], all G_end
        sum_tile[...] = G
        decay, left, total = jnp.exp(G), jnp.exp(end - G), jnp.exp(end)
    else:
        decay = left = total = constant(1.0, ROW)
        G = constant(0.0, ROW)
    factor_tile[BETA] = beta
    factor_tile[READ] = n * n * decay
    factor_tile[OUT] = m * decay
    factor_tile[KEEP] = left
    factor_tile[DECAY] = total
    factor_tile[KEY] = n
    factor_tile[QUERY] = m
    factor_tile[SUM] = G
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(factor_tile, factors_ref.at[b, h, c])

    # What columns need is loaded again wherever it is needed: registers decide how many blocks run at once.
    def n_column():
        return columns(plgpu.load(norm_tile, layout=COLUMN), square)

    def relation(left):  # [64, 64]
        x = tiles.product(CHUNK, (left, k_tile.transpose((1, 0))))
        if gated:
            across = rows(G, square) - columns(plgpu.load(sum_tile, layout=COLUMN), square)
            x = x * jnp.exp(jnp.minimum(across, 0.0))
        return x

    p = jnp.where(column <= row, relation(q_tile) * rows(m, square), 0.0)
    p_tile[...] = p.astype(p_tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(p_tile, p_ref.at[b, h, c])

    a = jnp.where(column < row, relation(k_tile) * rows(n, square) * n_column(), 0.0)
    if keep:
        relation_tile[...] = a.astype(jnp.float16)
    x = unit_lower_inverse(a * rows(beta, square), a_tile, x_tile)
    if keep:
        plgpu.commit_smem()
        x_tile[...] = x.astype(jnp.float16)
        plgpu.commit_smem()
        solve = tiles.product(CHUNK, (relation_tile, x_tile)) * rows(-n, square) / n_column()
    else:
        solve = x * rows(n, square) / n_column()
    t_tile[...] = jnp.where(column < row, solve, 0.0).astype(t_tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(t_tile, solve_ref.at[b, h, c])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
