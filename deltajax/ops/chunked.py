"""The chunkwise form in plain JAX: batched matrix products and a scan over chunk states, any platform.

``forward`` and ``backward`` are the two halves of the op's `jax.custom_vjp`. The backward pass keeps nothing
from the forward one but the inputs: it recomputes the chunks and their T / C entry states, then walks the
state's gradient back through them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from deltajax.ops import packing, segments
from deltajax.ops.chunk_math import Chunks, chunk_actions
from deltajax.ops.problem import GateKind, Inputs, Options, Tokens, initial_state, prepare, vary_alike

DEFAULT_CHUNK_SIZE = 64


class _Plan(NamedTuple):
    """How the call is cut into chunks."""

    chunk_size: int
    gate_kind: GateKind  # of the chunked problem: resets turn "none" into "head"
    precision: lax.Precision
    layout: packing.Layout | None


def _plan(inputs: Inputs, options: Options) -> _Plan:
    T = inputs.q.shape[1]
    size = options.chunk_size or DEFAULT_CHUNK_SIZE
    size = min(size, max(16, 1 << (T - 1).bit_length()))
    # Beside half-precision inputs (8 to 11 bits), tf32 on GPUs and three bf16 passes on TPUs are precise.
    exact = all(x.dtype.itemsize >= 4 for x in (inputs.q, inputs.k, inputs.v))
    precision = lax.Precision.HIGHEST if exact else lax.Precision.HIGH
    resets = inputs.segment_ids is not None and options.num_segments is None
    kind: GateKind = "head" if resets and options.gate_kind == "none" else options.gate_kind
    layout = None
    if inputs.segment_ids is not None and options.num_segments is not None:
        layout = packing.layout(inputs.segment_ids, options.num_segments, size)
    return _Plan(size, kind, precision, layout)


def _chunked_tokens(inputs: Inputs, options: Options, plan: _Plan) -> Tokens:
    """Prepared tokens in chunks: q, k, v [n, b, h, C, .], beta and a per-head g [n, b, h, C, 1]."""
    q, k, v, g, beta = prepare(inputs, options)
    if inputs.segment_ids is not None and plan.layout is None:
        # A segment's first token forgets everything: exp(-inf) = 0 in each decay that crosses it.
        reset = segments.resets(inputs.segment_ids)[..., None]  # [B, T, 1]
        if g is None:
            g = jnp.broadcast_to(jnp.where(reset, -jnp.inf, 0.0).astype(v.dtype), beta.shape)
        else:
            g = jnp.where(reset if g.ndim == 3 else reset[..., None], -jnp.inf, g)
    if g is not None and g.ndim == 3:
        g = g[..., None]
    tokens = Tokens(q, k, v, g, beta[..., None])
    return jax.tree.map(lambda x: _to_chunks(x, plan), tokens)


def _to_chunks(x: Float[Array, "B T H D"], plan: _Plan) -> Float[Array, "n B H C D"]:
    if plan.layout is not None:
        x = packing.take(x, plan.layout.source)
    B, T, H, D = x.shape
    C = plan.chunk_size
    n = -(-T // C)
    x = jnp.pad(x, ((0, 0), (0, n * C - T), (0, 0), (0, 0)))  # zeros are neutral tokens
    return x.reshape(B, n, C, H, D).transpose(1, 0, 3, 2, 4)


def _from_chunks(x: Float[Array, "n B H C D"], T: int, plan: _Plan) -> Float[Array, "B T H D"]:
    n, B, H, C, D = x.shape
    x = x.transpose(1, 0, 3, 2, 4).reshape(B, n * C, H, D)
    return x[:, :T] if plan.layout is None else packing.take(x, plan.layout.target)


def _walk(
    chunks: Chunks, initial: Array, plan: _Plan
) -> tuple[Float[Array, "n b h K V"], Float[Array, "n b h C V"], Array]:
    """Carries the state through the chunks.

    Returns:
      the states entering the chunks, the pseudo-values V', the final state (or states).
    """
    precision = plan.precision

    def advance(state, chunk):
        values = chunk.u - jnp.matmul(chunk.w, state, precision=precision)  # V' = U - W S
        kept = state if chunk.decay is None else chunk.decay * state
        return values, kept + jnp.matmul(chunk.kg.mT, values, precision=precision)

    if plan.layout is None:

        def step(state, chunk):
            values, new = advance(state, chunk)
            return new, (state, values)

        final, (states, values) = lax.scan(step, initial, chunks)
        return states, values, final

    row = jnp.arange(initial.shape[0])

    def step_segments(carry, x):
        state, finals = carry
        chunk, entry, exit_ = x
        state = jnp.where(_has(entry), initial[row, entry], state)
        values, new = advance(state, chunk)
        finals = finals.at[row, _or_drop(exit_, initial)].set(new, mode="drop")
        return (new, finals), (state, values)

    first = vary_alike(
        jnp.zeros_like(initial[:, 0]), initial
    )  # a segment without tokens keeps its initial state
    (_, finals), (states, values) = lax.scan(
        step_segments, first, (chunks, plan.layout.entry, plan.layout.exit)
    )
    return states, values, finals


def _has(segment: Int[Array, " B"]) -> Array:
    return (segment >= 0)[:, None, None, None]


def _or_drop(segment: Int[Array, " B"], per_segment: Float[Array, "B N ..."]) -> Int[Array, " B"]:
    """The segment, or an index past the end where there is none."""
    return jnp.where(segment >= 0, segment, per_segment.shape[1])


def forward(inputs: Inputs, options: Options) -> tuple[Float[Array, "B T HV V"], Array]:
    """Outputs and final state."""
    plan = _plan(inputs, options)
    tokens = _chunked_tokens(inputs, options, plan)
    chunks = chunk_actions(tokens, plan.gate_kind, plan.precision)
    states, values, final = _walk(chunks, initial_state(inputs, options), plan)
    o = jnp.matmul(chunks.qg, states, precision=plan.precision)
    o = o + jnp.matmul(chunks.p, values, precision=plan.precision)  # O = Q exp(G) S + P V'
    return _from_chunks(o, inputs.v.shape[1], plan).astype(inputs.v.dtype), final


def _walk_back(
    chunks: Chunks, do: Array, dvalues: Array, dfinal: Array, plan: _Plan
) -> tuple[Float[Array, "n b h K V"], Float[Array, "n b h C V"], Array]:
    """Carries the state's gradient back through the chunks.

    Args:
      do: [n, b, h, C, V]. dvalues: P^T dO, the part of dV' that comes from the chunk's own outputs.
      dfinal: gradient of the final state (or states).

    Returns:
      the gradients of the states leaving the chunks, dV', the gradient of the initial state (or states).
    """
    precision = plan.precision

    def retreat(dstate, chunk, do, dvalues):
        dvalues = dvalues + jnp.matmul(chunk.kg, dstate, precision=precision)  # dV'
        kept = dstate if chunk.decay is None else chunk.decay * dstate
        read = jnp.matmul(chunk.qg.mT, do, precision=precision)
        corrected = jnp.matmul(chunk.w.mT, dvalues, precision=precision)
        return dvalues, kept + read - corrected

    if plan.layout is None:

        def step(dstate, x):
            dvalues, before = retreat(dstate, *x)
            return before, (dstate, dvalues)

        dinitial, (dstates, dvalues) = lax.scan(step, dfinal, (chunks, do, dvalues), reverse=True)
        return dstates, dvalues, dinitial

    row = jnp.arange(dfinal.shape[0])

    def step_segments(carry, x):
        dstate, dinitial = carry
        (chunk, do, dvalues), entry, exit_ = x
        # The state behind a segment's last chunk goes nowhere but into its final state.
        dstate = jnp.where(_has(exit_), dfinal[row, exit_], dstate)
        dvalues, before = retreat(dstate, chunk, do, dvalues)
        dinitial = dinitial.at[row, _or_drop(entry, dfinal)].set(before, mode="drop")
        return (before, dinitial), (dstate, dvalues)

    first = vary_alike(jnp.zeros_like(dfinal[:, 0]), dfinal)
    xs = ((chunks, do, dvalues), plan.layout.entry, plan.layout.exit)
    (_, dinitial), (dstates, dvalues) = lax.scan(step_segments, first, xs, reverse=True)
    return dstates, dvalues, dinitial


def backward(inputs: Inputs, options: Options, do: Float[Array, "B T HV V"], dfinal: Array) -> Inputs:
    """Gradients of all float inputs, None for the others."""
    plan = _plan(inputs, options)
    precision = plan.precision
    ids = inputs.segment_ids

    def ready(floats: Inputs) -> tuple[Tokens, Array]:
        whole = floats._replace(segment_ids=ids)
        return _chunked_tokens(whole, options, plan), initial_state(whole, options)

    (tokens, initial), pull_ready = jax.vjp(ready, inputs._replace(segment_ids=None))
    chunks, pull_actions = jax.vjp(lambda t: chunk_actions(t, plan.gate_kind, precision), tokens)
    states, values, _ = _walk(chunks, initial, plan)

    do = _to_chunks(do.astype(chunks.u.dtype), plan)
    dvalues = jnp.matmul(chunks.p.mT, do, precision=precision)
    dstates, dvalues, dinitial = _walk_back(chunks, do, dvalues, dfinal.astype(initial.dtype), plan)

    ddecay = None
    if chunks.decay is not None:
        ddecay = jnp.sum(states * dstates, axis=-1, keepdims=True)  # [n, b, h, K, 1]
        if plan.gate_kind == "head":
            ddecay = jnp.sum(ddecay, axis=-2, keepdims=True)
    dchunks = Chunks(
        w=-jnp.matmul(dvalues, states.mT, precision=precision),
        u=dvalues,
        qg=jnp.matmul(do, states.mT, precision=precision),
        p=jnp.matmul(do, values.mT, precision=precision),
        kg=jnp.matmul(values, dstates.mT, precision=precision),
        decay=ddecay,
    )
    (dtokens,) = pull_actions(dchunks)
    (grads,) = pull_ready((dtokens, dinitial))
    return grads
