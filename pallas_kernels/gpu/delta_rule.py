"""The chunkwise delta rule on Hopper: chunk-parallel kernels and walks over the chunks.

Forward: relations, then the walk. Backward: the walk back, then the gradients of every chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu.channel_gradients import channel_gradients
from pallas_kernels.gpu.channel_relations import channel_relations
from pallas_kernels.gpu.gradient_parts import PartInputs
from pallas_kernels.gpu.head_gradients import head_gradients
from pallas_kernels.gpu.limits import CHUNK, MULTIPROCESSORS, PRESENT
from pallas_kernels.gpu.recurrence import walk
from pallas_kernels.gpu.recurrence_back import walk_back
from pallas_kernels.gpu.relations import head_relations
from pallas_kernels.gpu.sides import SIDE
from pallas_kernels.gpu.walks import Chunks, Enter, Kept, Plan


class Saved(NamedTuple):
    """What the backward pass reads of the forward one."""

    kept: Kept
    solve: jax.Array  # [B, HV, NC, 64, 64]
    p: jax.Array  # [B, HV, NC, 64, 64]
    factors: jax.Array  # [B, HV, NC, 8, 64]


class ChannelSaved(NamedTuple):
    """The same with a per-channel gate."""

    kept: Kept
    chunks: Chunks
    norms: jax.Array | None = None  # of K > 128, see `channel_relations`


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
    keep: bool = False,
    spans: jax.Array | None = None,
    enter: Enter | None = None,
) -> tuple[jax.Array, jax.Array, Saved | None]:
    """The recurrence without a gate or with a per-head gate.

    Args:
      q, k: [B, T, H, K]; v: [B, T, HV, V], all bf16 or all f16; T a multiple of 8, K 64, 128 or 256, V of 64.
      beta: [B, t, HV] float32 with t in T - 7..T; tokens past t have no effect.
      g: [B, t, HV] log decay in -100..0, float32, or None.
      state: [B, HV, V, K] float32, the transposed initial state, or None for zeros.
      normalize: whether to L2-normalise q and k.
      scale: multiplies q.
      keep: whether to return what `head_backward` needs.
      spans: of segments that have states of their own, [B, N, HV, V, K]; see `recurrence.walk`.
      enter: makes the initial state of what the tokens do to one; see `recurrence.walk`.

    Returns:
      o [B, T, HV, V] in v's dtype, the transposed final state [B, HV, V, K] float32, `Saved` or None.
    """
    gated = g is not None
    tokens = by_chunk(beta, jnp.zeros_like(beta) if g is None else g)
    solve, p, factors = head_relations(q, k, tokens, gated=gated, normalize=normalize, scale=scale, keep=keep)
    chunks = Chunks(q, k, None, solve, p, factors, None)
    layout = plan(v, q.shape[-1], channel=False, spans=spans)
    o, final, kept = walk(chunks, v, state, gated=gated, plan=layout, keep=keep, spans=spans, enter=enter)
    return o, final, None if kept is None else Saved(kept, solve, p, factors)


def head_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    dfinal: jax.Array,
    saved: Saved,
    *,
    gated: bool,
    normalize: bool,
    scale: float,
    spans: jax.Array | None = None,
    leave: Enter | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """Gradients of `head_forward`'s arguments.

    Args:
      q, k, v, normalize, scale: as for `head_forward`.
      do: [B, T, HV, V] in v's dtype.
      dfinal: [B, HV, V, K] float32.
      saved: of `head_forward`.
      gated: whether there was a log decay.
      spans: as for `head_forward`.
      leave: makes the gradient of the final state of what the tokens do to one; see `walk_back`.

    Returns:
      dq, dk [B, T, H, K], dv [B, T, HV, V] in their dtype; dbeta [B, T, HV] (T as far as chunks go), dg alike
      or None, the transposed gradient of the initial state [B, HV, V, K], float32.
    """
    kept, solve, p, factors = saved
    chunks = Chunks(q, k, None, solve, p, factors, None)
    layout = plan(v, q.shape[-1], channel=False, spans=spans)
    dr, dv, dstates, dinitial = walk_back(
        chunks, do, dfinal, kept.moved, gated=gated, plan=layout, spans=spans, leave=leave
    )
    values = PartInputs(do.astype(jnp.bfloat16), dr, kept.written, kept.states, dstates)
    dq, dk, dbeta, dG = head_gradients(q, k, factors, values, gated=gated, normalize=normalize, scale=scale)
    dg = by_token(lax.cumsum(dG, axis=3, reverse=True)) if gated else None
    dq, dk = over_group(dq, q, normalize), over_group(dk, k, normalize)
    return dq, dk, dv, by_token(dbeta), dg, dinitial


def by_token(x: jax.Array) -> jax.Array:
    """[B, HV, NC, 64] to [B, NC 64, HV]."""
    B, HV, NC, _ = x.shape
    return x.reshape(B, HV, NC * CHUNK).transpose(0, 2, 1)


def over_group(dx: jax.Array, x: jax.Array, normalize: bool) -> jax.Array:
    """Gradients [terms, B, T, HV, K] of each value head added up to those of x [B, T, H, K].

    Two terms are float32 that has yet to be projected where x is normalised: ``dx - x (x . dx) / |x|^2``.
    """
    if dx.shape[1:] == x.shape and len(dx) == 1:
        return dx[0]
    B, T, H, K = x.shape
    total = dx.reshape(-1, B, T, H, dx.shape[3] // H, K).astype(jnp.float32).sum(axis=(0, 4))
    if len(dx) == 2 and normalize:
        wide = x.astype(jnp.float32)
        share = (wide * total).sum(axis=-1, keepdims=True)
        total = total - wide * (share / ((wide * wide).sum(axis=-1, keepdims=True) + 1e-6))
    return total.astype(x.dtype)


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
    keep: bool = False,
    spans: jax.Array | None = None,
    enter: Enter | None = None,
) -> tuple[jax.Array, jax.Array, ChannelSaved | None]:
    """The recurrence with a per-channel gate.

    Args:
      q, k, v, beta, state, normalize, scale: as for `head_forward`.
      g, gate, lower_bound: as for `channel_relations.channel_relations`.
      kind: [B, t, HV] float32, what becomes of each token (`channel_decay.PRESENT`, ...); None: all are
        present.
      keep: whether to return what `channel_backward` needs.
      spans, enter: as for `head_forward`.

    Returns:
      as `head_forward`.
    """
    tokens = tokens_of(beta, kind)
    queries, reads, keys, solve, p, decay, norms = channel_relations(
        q,
        k,
        g,
        tokens,
        gate,
        lower_bound=lower_bound,
        all_present=all_present(beta, kind),
        normalize=normalize,
        scale=scale,
        keep=keep,
    )
    chunks = Chunks(queries, reads, keys, solve, p, tokens, decay)
    layout = plan(v, q.shape[-1], channel=True, spans=spans)
    o, final, kept = walk(chunks, v, state, gated=True, plan=layout, keep=keep, spans=spans, enter=enter)
    return o, final, None if kept is None else ChannelSaved(kept, chunks, norms)


def channel_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    g: jax.Array,
    kind: jax.Array | None,
    gate: jax.Array | None,
    do: jax.Array,
    dfinal: jax.Array,
    saved: ChannelSaved,
    *,
    lower_bound: float | None,
    normalize: bool,
    scale: float,
    spans: jax.Array | None = None,
    leave: Enter | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """Gradients of `channel_forward`'s arguments.

    Args:
      q, k, v, beta, g, kind, gate, lower_bound, normalize, scale: as for `channel_forward`.
      do, dfinal: as for `head_backward`.
      saved: of `channel_forward`.
      spans, leave: as for `head_backward`.

    Returns:
      as `head_backward`, dg [B, T, HV, K] bf16; behind it the gradient of gate [HV, 2, K] float32 or None.
    """
    kept, chunks, norms = saved
    layout = plan(v, q.shape[-1], channel=True, spans=spans)
    dr, dv, dstates, dinitial = walk_back(
        chunks, do, dfinal, kept.moved, gated=True, plan=layout, spans=spans, leave=leave
    )
    values = PartInputs(do.astype(jnp.bfloat16), dr, kept.written, kept.states, dstates)
    dq, dk, dg, dbeta, *dA = channel_gradients(
        q,
        k,
        g,
        chunks.factors,
        gate,
        values,
        norms,
        lower_bound=lower_bound,
        all_present=all_present(beta, kind),
        normalize=normalize,
        scale=scale,
    )
    dgate = None
    if gate is not None:
        drate = dA[0].sum(axis=(0, 2, 3, 4)) / gate[:, 0, 0]  # [HV], one rate for all of K
        dbias = dg.astype(jnp.float32).sum(axis=(0, 1))  # [HV, K]
        dgate = jnp.stack([jnp.zeros_like(dbias).at[:, 0].set(drate), dbias], axis=1)
    dq, dk = over_group(dq, q, normalize), over_group(dk, k, normalize)
    return dq, dk, dv, by_token(dbeta), dg, dgate, dinitial


def all_present(beta: jax.Array, kind: jax.Array | None) -> bool:
    """Whether there is neither padding nor a reset, nor an end inside of a chunk."""
    return kind is None and beta.shape[1] % CHUNK == 0


def tokens_of(beta: jax.Array, kind: jax.Array | None) -> jax.Array:
    """beta and what becomes of each token, by chunks; see `by_chunk`."""
    return by_chunk(beta, jnp.full_like(beta, PRESENT) if kind is None else kind)


def by_chunk(beta: jax.Array, other: jax.Array) -> jax.Array:
    """Two per-token numbers [B, t, HV] by chunks, [B, HV, NC, 2, 64], zero past the end."""
    B, t, HV = beta.shape
    NC = -(-t // CHUNK)
    x = jnp.pad(jnp.stack([beta, other]), ((0, 0), (0, 0), (0, NC * CHUNK - t), (0, 0)))
    return x.reshape(2, B, NC, CHUNK, HV).transpose(1, 4, 2, 0, 3)


def plan(v: jax.Array, K: int, *, channel: bool, spans: jax.Array | None = None) -> Plan:
    """The walk's layout, by how many heads (of segments, with ``spans``) there are to spread."""
    B, T, HV, V = v.shape
    if spans is not None:
        B *= spans.shape[1]
    stages = 2 if channel or K > SIDE else 3  # as many as shared memory holds
    # One block fits on a multiprocessor: with more blocks than those of one warpgroup would be a second wave.
    wide = B * HV * (V // 64) > MULTIPROCESSORS if K > 64 else B * HV >= MULTIPROCESSORS
    if V % 128 == 0 and K <= SIDE and wide:
        return Plan(warpgroups=2, stages=stages)
    # With few heads: as many runs of a sequence as have a multiprocessor each, if that makes the second pass
    # over the chunks worth while.
    blocks = B * HV * (V // 64)
    if spans is not None:
        return Plan(warpgroups=1, stages=stages)
    runs = min(MULTIPROCESSORS // blocks, MOST_RUNS, T // CHUNK // LEAST_CHUNKS)
    return Plan(warpgroups=1, stages=stages, runs=runs if runs > 2 else 1)
