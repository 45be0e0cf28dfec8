"""Forward of the chunkwise delta rule on Hopper: a chunk-parallel kernel, then the walk through the chunks."""

import jax
import jax.numpy as jnp

from pallas_kernels.gpu.recurrence import walk
from pallas_kernels.gpu.relations import head_relations
from pallas_kernels.gpu.tiles import CHUNK

MULTIPROCESSORS = 132


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    g: jax.Array | None,
    state: jax.Array | None,
    *,
    normalize: bool,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Runs the recurrence over T.

    Args:
      q, k: [B, T, H, K]; v: [B, T, HV, V], all bf16 or all f16; T a multiple of 8, K 64 or 128, V of 64.
      beta: [B, t, HV] float32 with t in T - 7..T; tokens past t have no effect.
      g: [B, t, HV] log decay in -100..0, float32, or None.
      state: [B, HV, V, K] float32, the transposed initial state, or None for zeros.
      normalize: whether to L2-normalise q and k.
      scale: multiplies q.

    Returns:
      o [B, T, HV, V] in v's dtype, the transposed final state [B, HV, V, K] float32.
    """
    tokens = per_token(beta, g)
    gated = g is not None
    inverse, p, factors = head_relations(q, k, tokens, gated=gated, normalize=normalize, scale=scale)
    warpgroups, stages = plan(v.shape[0] * v.shape[2], v.shape[3])
    return walk(q, k, v, inverse, p, factors, state, gated=gated, warpgroups=warpgroups, stages=stages)


def per_token(beta: jax.Array, g: jax.Array | None) -> jax.Array:
    """beta and log decay by chunks, [B, HV, NC, 2, 64], zero past the end."""
    B, t, HV = beta.shape
    NC = -(-t // CHUNK)
    x = jnp.stack([beta, jnp.zeros_like(beta) if g is None else g])  # [2, B, t, HV]
    x = jnp.pad(x, ((0, 0), (0, 0), (0, NC * CHUNK - t), (0, 0)))
    return x.reshape(2, B, NC, CHUNK, HV).transpose(1, 4, 2, 0, 3)


def plan(heads: int, V: int) -> tuple[int, int]:
    """Warpgroups of a block and chunks in flight, by how many heads there are to spread over the chip."""
    if V % 128 or heads < MULTIPROCESSORS:
        return 1, 3
    return 2, 3
