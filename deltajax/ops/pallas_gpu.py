"""The Hopper kernels as an implementation of the op: from `Inputs` and `Options` to `pallas_kernels.gpu`.

The kernels are imported when they are traced: Mosaic GPU takes more than a second to import.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deltajax.ops import context, gates, packing, segments
from deltajax.ops.problem import Inputs, Options, float64_argument, vary_like
from pallas_kernels.gpu.limits import ABSENT, CHUNK, MIN_LOG_DECAY, PRESENT, RESET

HEAD_SIZES = (64, 128, 256)  # K; others are filled up with zeros
HALF = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def unsupported(inputs: Inputs, options: Options) -> str | None:
    """Why the kernels cannot run this call, or None if they can."""
    dtypes = {x.dtype for x in (inputs.q, inputs.k, inputs.v)}
    if len(dtypes) != 1 or not dtypes <= set(HALF):
        return f"q, k and v must be all bfloat16 or all float16, got {', '.join(sorted(map(str, dtypes)))}"
    if reason := float64_argument(inputs, "g", "beta", "A_log", "dt_bias", "initial_state"):
        return reason
    if options.chunk_size not in (None, CHUNK):
        return f"chunk_size is {CHUNK}, got {options.chunk_size}"
    return other_gpu()


@functools.cache
def other_gpu() -> str | None:
    """What GPU is here, if no Hopper; None also without one: the program may be lowered for another host."""
    try:
        gpu = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return None
    capability = getattr(gpu, "compute_capability", "9.0")
    return None if capability == "9.0" else f"needs a Hopper GPU, not compute capability {capability}"


def forward(inputs: Inputs, options: Options) -> tuple[Float[Array, "B T HV V"], Array]:
    """Outputs and final state; see `unsupported` for what it takes.

    Products of a per-channel gate's call and of float16 inputs have float16 operands: there |q| and |k| must
    stay below 65504. The values and the state may be any float32 numbers.
    """
    return _run(inputs, options, keep=False)[:2]


def _run(inputs: Inputs, options: Options, *, keep: bool) -> tuple[Array, Array, Any]:
    """Outputs, final state and, to ``keep``, what the backward half reads."""
    from pallas_kernels.gpu import delta_rule

    run: Any = delta_rule.channel_forward if options.gate_kind == "channel" else delta_rule.head_forward
    common = _common(options) | dict(spans=_spans(inputs, options), enter=_enter(inputs, options))
    o, state, saved = run(*_call(inputs, options), **common, keep=keep)
    return *_cut(o, state, inputs, options), saved


def spreads(options: Options) -> bool:
    """Whether the halves take a call whose tokens are spread over a mesh axis."""
    return options.num_segments is None


def _enter(inputs: Inputs, options: Options) -> Callable[[Array, Array], Array] | None:
    """`context.enter` for the kernels' transposed and filled up states."""
    if options.axis_name is None:
        return None
    K, V = inputs.q.shape[-1], inputs.v.shape[-1]

    def enter(added: Array, moved: Array) -> Array:
        state = context.enter(added[..., :V, :K].mT, moved[..., :K, :K].mT, inputs, options)
        return _transposed(state, *added.shape[-2:])

    return enter


def _leave(inputs: Inputs, options: Options, dfinal: Array) -> Callable[[Array, Array], Array] | None:
    """`context.leave` alike; dfinal as the op's caller has it."""
    if options.axis_name is None:
        return None
    K, V = inputs.q.shape[-1], inputs.v.shape[-1]

    def leave(added: Array, moved: Array) -> Array:
        own = dfinal.astype(added.dtype)
        state = context.leave(added[..., :V, :K].mT, moved[..., :K, :K].mT, own, inputs, options)
        return _transposed(state, *added.shape[-2:])

    return leave


def _spans(inputs: Inputs, options: Options) -> Array | None:
    """The chunks of segments that have states of their own, [B, N, 2]; see `packing.spans`."""
    if inputs.segment_ids is None or options.num_segments is None:
        return None
    return packing.spans(inputs.segment_ids, options.num_segments, CHUNK).astype(jnp.int32)


def _layout(inputs: Inputs, options: Options) -> packing.Layout | None:
    """How the tokens of such segments are aligned to chunks."""
    if inputs.segment_ids is None or options.num_segments is None:
        return None
    return packing.layout(inputs.segment_ids, options.num_segments, CHUNK)


def saving(inputs: Inputs, options: Options) -> tuple[Array, Array, tuple[Array, ...]]:
    """`forward`, and the arrays that `backward` reads."""
    o, state, saved = _run(inputs, options, keep=True)
    return o, state, tuple(jax.tree.leaves(saved))


def backward(
    inputs: Inputs, options: Options, do: Float[Array, "B T HV V"], dfinal: Array, *saved: Array
) -> Inputs:
    """Gradients of all float inputs, None for the others."""
    from pallas_kernels.gpu import delta_rule

    floats = inputs._replace(segment_ids=None)
    call, pull = jax.vjp(lambda x: _call(x._replace(segment_ids=inputs.segment_ids), options), floats)
    q, k, v, beta, *decay, state = call
    dg: Array | None
    T = beta.shape[1]
    if (layout := _layout(inputs, options)) is not None:
        do = packing.take(do, layout.source)
    common = _common(options) | dict(spans=_spans(inputs, options), leave=_leave(inputs, options, dfinal))
    do, dfinal = _pad(do, None), _transposed(dfinal, v.shape[-1], q.shape[-1])
    kept, rest = delta_rule.Kept(*saved[:3]), saved[3:]
    ddecay: tuple[Any, ...]
    if options.gate_kind == "channel":
        g, kind, gate = decay
        channel = delta_rule.ChannelSaved(kept, delta_rule.Chunks(*rest[:7]), *rest[7:])
        dq, dk, dv, dbeta, dg, dgate, dstate = delta_rule.channel_backward(
            q, k, v, beta, g, kind, gate, do, dfinal, channel, **common
        )
        ddecay = (dg.astype(g.dtype), None if kind is None else jnp.zeros_like(kind), dgate)
    else:
        gated = decay[0] is not None
        head = delta_rule.Saved(kept, *rest)
        dq, dk, dv, dbeta, dg, dstate = delta_rule.head_backward(
            q, k, v, do, dfinal, head, gated=gated, **common
        )
        ddecay = (None if dg is None else dg[:, :T],)
    dcall = (dq, dk, dv, dbeta[:, :T], *ddecay, None if state is None else dstate)
    found = pull(vary_like(dcall, call))[0]
    if options.axis_name is None or inputs.initial_state is None:
        return found
    initial = inputs.initial_state
    dstate = context.of_initial_state(dstate[..., : initial.shape[-1], : initial.shape[-2]].mT, options)
    return found._replace(initial_state=dstate.astype(initial.dtype))


def _common(options: Options) -> dict[str, Any]:
    common = dict(normalize=options.normalize_qk, scale=options.scale)
    return common | dict(lower_bound=options.lower_bound) if options.gate_kind == "channel" else common


def _cut(o: Array, state: Array, inputs: Inputs, options: Options) -> tuple[Array, Array]:
    """Outputs and the transposed final state without what filled up their sizes."""
    T, V, K = inputs.v.shape[1], inputs.v.shape[-1], inputs.q.shape[-1]
    layout = _layout(inputs, options)
    o = o[:, :T] if layout is None else packing.take(o, layout.target)
    return o[..., :V], state[..., :V, :K].mT


def _call(inputs: Inputs, options: Options) -> tuple[Any, ...]:
    """The kernels' arguments: (q, k, v, beta, log decay, state), or (.., beta, g, kind, gate, state)."""
    q, k, v, g = inputs.q, inputs.k, inputs.v, inputs.g
    beta, ids = inputs.beta.astype(jnp.float32), inputs.segment_ids  # [B, T, HV], [B, T]
    if g is not None and options.gate_kind == "head":
        if ids is not None:  # before the activation: NaN in padding must not reach a gradient
            g = _real(g, ids)
        g = _log_decay(inputs._replace(g=g), options)
    kind = None
    if (layout := _layout(inputs, options)) is not None:
        # Positions without a token get zeros: neutral ones, but for a gate that is yet to be activated.
        q, k, v, beta = (packing.take(x, layout.source) for x in (q, k, v, beta))
        g = None if g is None else packing.take(g, layout.source)
        present = packing.take(jnp.ones_like(inputs.beta, jnp.float32), layout.source)
        kind = jnp.where(present != 0, PRESENT, ABSENT)
    elif ids is not None:  # padding must not reach a product, not even as NaN
        beta = _real(beta, ids)
        if not options.padding_is_zero:
            q, k, v = _real(q, ids), _real(k, ids), _real(v, ids)
        reset = jnp.broadcast_to(segments.resets(ids)[..., None], beta.shape)
        kind = jnp.where(reset, RESET, jnp.where((ids != 0)[..., None], PRESENT, ABSENT))
        if options.gate_kind != "channel":
            g = jnp.where(reset, MIN_LOG_DECAY, jnp.zeros_like(beta) if g is None else _real(g, ids))

    q, k, v = _pad(q, HEAD_SIZES), _pad(k, HEAD_SIZES), _pad(v, None)
    state = inputs.initial_state if options.axis_name is None else None  # `_enter` folds it in
    if state is not None:
        state = _transposed(state, v.shape[-1], q.shape[-1])
    if options.gate_kind == "channel":
        assert g is not None
        return q, k, v, beta, _pad(g, HEAD_SIZES), kind, _gate(inputs, q.shape[-1]), state
    return q, k, v, beta, g, state


def _real(x: Array, ids: Array) -> Array:
    """x [B, T, ...] with zeros at padding."""
    return jnp.where((ids != 0).reshape(ids.shape + (1,) * (x.ndim - 2)), x, 0)


def _transposed(state: Array, V: int, K: int) -> Array:
    """[..., K, V] to [..., V, K] float32 with zeros up to the given sizes."""
    state = state.astype(jnp.float32).mT
    sizes = (V - state.shape[-2], K - state.shape[-1])
    return jnp.pad(state, ((0, 0),) * (state.ndim - 2) + tuple((0, n) for n in sizes))


def _gate(inputs: Inputs, K: int) -> Array | None:
    """[HV, 2, K] float32: exp(A_log) and dt_bias of each value head's channels."""
    if inputs.A_log is None:
        return None
    rate = jnp.exp(inputs.A_log.astype(jnp.float32))[:, None]  # [HV, 1]
    bias = jnp.zeros_like(rate) if inputs.dt_bias is None else inputs.dt_bias.astype(jnp.float32)
    bias = jnp.pad(bias, ((0, 0), (0, K - bias.shape[1]))) if bias.shape[1] > 1 else bias
    return jnp.stack([jnp.broadcast_to(x, (rate.shape[0], K)) for x in (rate, bias)], axis=1)


def _log_decay(inputs: Inputs, options: Options) -> Array | None:
    """Activated per-head log decay in float32, at least `MIN_LOG_DECAY`."""
    if inputs.g is None:
        return None
    g = gates.per_head_log_decay(inputs.g, inputs.A_log, inputs.dt_bias, options.lower_bound)
    return jnp.maximum(g, MIN_LOG_DECAY)


def _pad(x: jax.Array, sizes: tuple[int, ...] | None) -> jax.Array:
    """[B, T, H, D] with zeros up to a multiple of 8 of T and one of the sizes (or a multiple of 64) of D."""
    T, D = x.shape[1], x.shape[3]
    size = -(-D // 64) * 64 if sizes is None else min(s for s in sizes if s >= D)
    return jnp.pad(x, ((0, 0), (0, -T % 8), (0, 0), (0, size - D)))
