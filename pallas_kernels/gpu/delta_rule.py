"""Forward of the chunkwise delta rule on Hopper: a chunk-parallel kernel, then the walk over the chunks."""

import jax
import jax.numpy as jnp

from pallas_kernels.gpu.channel_relations import PRESENT, channel_relations
from pallas_kernels.gpu.recurrence import Chunks, Plan, walk
from pallas_kernels.gpu.relations import head_relations
from pallas_kernels.gpu.tiles import CHUNK

MULTIPROCESSORS = 132
MOST_RUNS = 8  # of a sequence
LEAST_CHUNKS = 16  # of a run


def head_forward(
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
    """The recurrence without a gate or with a per-head gate.

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
    gated = g is not None
    tokens = by_chunk(beta, jnp.zeros_like(beta) if g is None else g)
    inverse, p, factors = head_relations(q, k, tokens, gated=gated, normalize=normalize, scale=scale)
    chunks = Chunks(q, k, None, inverse, p, factors, None)
    return walk(chunks, v, state, gated=gated, plan=plan(v, channel=False))


def channel_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    g: jax.Array,
    kind: jax.Array | None,
    gate: jax.Array | None,
    state: jax.Array | None,
    *,
    lower_bound: float | None,
    normalize: bool,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """The recurrence with a per-channel gate.

    Args:
      q, k, v, beta, state, normalize, scale: as for `head_forward`.
      g, gate, lower_bound: as for `channel_relations.channel_relations`.
      kind: [B, t, HV] float32, what becomes of each token (`channel_relations.PRESENT`, ...); None: all are
        present.

    Returns:
      as `head_forward`.
    """
    all_present = kind is None and beta.shape[1] % CHUNK == 0
    tokens = by_chunk(beta, jnp.full_like(beta, PRESENT) if kind is None else kind)
    queries, reads, keys, inverse, p, decay = channel_relations(
        q,
        k,
        g,
        tokens,
        gate,
        lower_bound=lower_bound,
        all_present=all_present,
        normalize=normalize,
        scale=scale,
    )
    chunks = Chunks(queries, reads, keys, inverse, p, tokens[:, :, :, :1], decay)
    return walk(chunks, v, state, gated=True, plan=plan(v, channel=True))


def by_chunk(beta: jax.Array, other: jax.Array) -> jax.Array:
    """Two per-token numbers [B, t, HV] by chunks, [B, HV, NC, 2, 64], zero past the end."""
    B, t, HV = beta.shape
    NC = -(-t // CHUNK)
    x = jnp.pad(jnp.stack([beta, other]), ((0, 0), (0, 0), (0, NC * CHUNK - t), (0, 0)))
    return x.reshape(2, B, NC, CHUNK, HV).transpose(1, 4, 2, 0, 3)


def plan(v: jax.Array, *, channel: bool) -> Plan:
    """The walk's layout, by how many heads there are to spread over the chip."""
    B, T, HV, V = v.shape
    stages = 2 if channel else 3  # as many as shared memory holds
    if V % 128 == 0 and B * HV >= MULTIPROCESSORS:
        return Plan(warpgroups=2, stages=stages)
    # With few heads: as many runs of a sequence as have a multiprocessor each, if that makes the second pass
    # over the chunks worth while.
    blocks = B * HV * (V // 64)
    runs = min(MULTIPROCESSORS // blocks, MOST_RUNS, T // CHUNK // LEAST_CHUNKS)
    return Plan(warpgroups=1, stages=stages, runs=runs if runs > 2 else 1)
