"""The ops on TPUs: from a checked call to the kernels of `pallas_kernels.tpu`, and back.

The kernels are imported when they are traced: Pallas takes half a second to import.
"""

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deltajax.ops import gates, packing, segments
from deltajax.ops.problem import Inputs, Options, float64_argument
from pallas_kernels.tpu import config as kernel_config
from pallas_kernels.tpu.config import Blocks, Config

if TYPE_CHECKING:
    from pallas_kernels.tpu import launch
    from pallas_kernels.tpu.chunk import Refs

CHUNK = 64
LANES = 64  # K and V are multiples of this
# Of one block: value heads, and [128, 128] tiles of their states (half as many in float32).
MAX_HEADS, MAX_TILES = 32, 64
WIDTHS = (64, 128, 256, 512)  # what the kernels take; sizes between are padded


def unsupported(inputs: Inputs, options: Options) -> str | None:
    """Why the kernels cannot run a call, or None."""
    for name, size, most in (("K", inputs.q.shape[-1], 256), ("V", inputs.v.shape[-1], 512)):
        if size % LANES or size > most:
            return f"{name} must be a multiple of {LANES} up to {most}, got {size}"
    (H, K), (HV, V) = inputs.q.shape[2:], inputs.v.shape[2:]
    heads = kernel_config.block_heads(H, HV)
    widths = (next(w for w in WIDTHS if w >= size) for size in (K, V))
    tiles = heads * kernel_config.head_tiles(*widths)
    wide = any(x.dtype.itemsize > 2 for x in (inputs.q, inputs.k, inputs.v))
    if heads > MAX_HEADS or tiles > (MAX_TILES // 2 if wide else MAX_TILES):
        return f"{HV} value heads of {K} x {V} on {H} key heads make blocks of {heads}, too large for VMEM"
    for name in ("q", "k", "v", "g", "beta"):
        x = getattr(inputs, name)
        if x is not None and x.dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} must be bfloat16 or float32, got {x.dtype}"
    if reason := float64_argument(inputs, "A_log", "dt_bias", "initial_state"):
        return reason
    if options.chunk_size not in (None, CHUNK):
        return f"chunk_size must be {CHUNK} or None, got {options.chunk_size}"
    return None


def _fit(x: Any, shape: tuple[int, ...]) -> Any:
    """Pads with zeros or cuts every axis of x to ``shape``; None stays None."""
    if x is None or x.shape == shape:
        return x
    x = x[tuple(slice(0, n) for n in shape)]
    return jnp.pad(x, [(0, n - m) for n, m in zip(shape, x.shape, strict=True)])


def _widened(inputs: Inputs, options: Options) -> Inputs:
    """The same call with K and V padded to one of `WIDTHS`: channels of zeros change nothing."""
    K, V = (next(w for w in WIDTHS if w >= x.shape[-1]) for x in (inputs.q, inputs.v))

    def last(x: Any, *ends: int) -> Any:
        return None if x is None else _fit(x, (*x.shape[: -len(ends)], *ends))

    channel = options.gate_kind == "channel"
    return inputs._replace(
        q=last(inputs.q, K),
        k=last(inputs.k, K),
        v=last(inputs.v, V),
        g=last(inputs.g, K) if channel else inputs.g,
        dt_bias=last(inputs.dt_bias, K) if channel else inputs.dt_bias,
        initial_state=last(inputs.initial_state, K, V),
    )


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call as the kernels take it."""

    arrays: "Refs"
    initial: Any  # [B, N, HV, K, V]
    segments: "launch.Segments | None"
    N: int
    blocks: Blocks
    config: Config
    layout: packing.Layout | None
    present: Any  # [B, N] whether a segment has tokens


def _marks(segment_ids: Array, T: int, chunk: int) -> Float[Array, "B 4 T"]:
    """real, run, seen, last of each token, see `pallas_kernels.tpu.chunk`; T is a multiple of the chunk."""
    B, given = segment_ids.shape
    ids = jnp.pad(segment_ids, ((0, 0), (0, T - given)))
    run = jnp.cumsum(segments.resets(ids), axis=1)  # resets before or at the token
    by_chunk = run.reshape(B, T // chunk, chunk)
    leaving = by_chunk[:, :, -1]
    entering = jnp.concatenate([jnp.zeros((B, 1), run.dtype), leaving[:, :-1]], axis=1)
    seen = by_chunk == entering[:, :, None]
    last = by_chunk == leaving[:, :, None]
    rows = [ids != 0, run, seen.reshape(B, T), last.reshape(B, T)]
    return jnp.stack([x.astype(jnp.float32) for x in rows], axis=1)


def _pad(x: Any, T: int) -> Any:
    """[B, T', ...] with zeros behind, T tokens in all; None stays None."""
    return None if x is None else jnp.pad(x, ((0, 0), (0, T - x.shape[1])) + ((0, 0),) * (x.ndim - 2))


def _call(inputs: Inputs, options: Options, interpret: Any) -> _Call:
    from pallas_kernels.tpu import launch
    from pallas_kernels.tpu.chunk import Refs

    _, T, H, K = inputs.q.shape
    HV, V = inputs.v.shape[2:]
    activation: Any = None
    if options.gate_kind == "channel" and inputs.A_log is not None:
        activation = "softplus" if options.lower_bound is None else "bounded"
    config = Config(
        options.gate_kind, activation, options.lower_bound, options.scale, options.normalize_qk, CHUNK
    )
    dtype = jnp.result_type(inputs.q, inputs.k, inputs.v)
    blocks = kernel_config.choose_blocks(T, H, HV, K, V, dtype, config, interpret)
    q: Any
    k: Any
    v: Any
    g: Any
    beta: Any
    q, k, v, beta = inputs.q, inputs.k, inputs.v, inputs.beta
    g = inputs.g
    if options.gate_kind == "head":
        g = gates.per_head_log_decay(g, inputs.A_log, inputs.dt_bias, options.lower_bound)
    layout = present = marks = parts = None
    N = options.num_segments or 1
    initial = inputs.initial_state
    if options.num_segments is not None:
        assert inputs.segment_ids is not None
        blocks = dataclasses.replace(blocks, tokens=CHUNK)
        layout = packing.layout(inputs.segment_ids, N, CHUNK)
        q, k, v, g, beta = (None if x is None else packing.take(x, layout.source) for x in (q, k, v, g, beta))
        real = layout.source < T
        ones = jnp.ones_like(real)
        marks = jnp.stack([real, ~ones, ones, ones], axis=1).astype(jnp.float32)
        entry, exit_ = layout.entry.T, layout.exit.T  # [B, NC]
        order = jnp.arange(entry.shape[1])
        latest = jax.lax.cummax(jnp.where(entry >= 0, order, 0), axis=1)
        segment = jnp.maximum(jnp.take_along_axis(entry, latest, axis=1), 0)
        parts = launch.Segments(*(x.astype(jnp.int32) for x in (segment, entry >= 0, exit_ >= 0)))
        present = jnp.any(inputs.segment_ids[:, :, None] == jnp.arange(1, N + 1), axis=1)
    else:
        if blocks.tokens > T:  # a block must not be longer than its array
            q, k, v, g, beta = (_pad(x, blocks.tokens) for x in (q, k, v, g, beta))
        n = -(-T // blocks.tokens)
        if inputs.segment_ids is not None:
            marks = _marks(inputs.segment_ids, n * blocks.tokens, CHUNK)
        initial = None if initial is None else initial[:, None]
    blocks = dataclasses.replace(blocks, T=T if layout is None else q.shape[1])
    rate = dt_bias = None
    if activation is not None and inputs.A_log is not None:
        rate = jnp.broadcast_to(jnp.exp(inputs.A_log.astype(jnp.float32))[:, None], (HV, K))
        dt_bias = jnp.zeros((HV, K)) if inputs.dt_bias is None else inputs.dt_bias.astype(jnp.float32)
    arrays = Refs(q, k, v, g, beta, rate, dt_bias, marks)
    initial = None if initial is None else initial.astype(jnp.float32)
    return _Call(arrays, initial, parts, N, blocks, config, layout, present)


def _tokens(x: Array, call: _Call, T: int) -> Array:
    """Undoes padding or alignment of [B, T', ...]."""
    return x[:, :T] if call.layout is None else packing.take(x, call.layout.target)


def forward(inputs: Inputs, options: Options, interpret: Any = False) -> tuple[Array, Array]:
    """Outputs and final states."""
    return _forward(inputs, options, False, interpret)[:2]


def saving(inputs: Inputs, options: Options, interpret: Any = False) -> tuple[Array, Array, tuple]:
    """Outputs, final states and what `backward` needs."""
    return _forward(inputs, options, True, interpret)


def _forward(inputs: Inputs, options: Options, save: bool, interpret: Any) -> tuple[Array, Array, tuple]:
    from pallas_kernels.tpu import forward as forward_kernel

    _, T, _, K = inputs.q.shape
    V = inputs.v.shape[-1]
    call = _call(_widened(inputs, options), options, interpret)
    o, final, saved = forward_kernel.forward(
        call.arrays, call.initial, call.segments, call.N, call.blocks, call.config, save
    )
    if call.layout is None:
        final = final[:, 0]
    else:
        initial = 0.0 if call.initial is None else call.initial
        final = jnp.where(call.present[:, :, None, None, None], final, initial)
    return _tokens(o, call, T)[..., :V], final[..., :K, :V], tuple(saved or ())


def backward(
    inputs: Inputs,
    options: Options,
    do: Array,
    dfinal: Array,
    states: Array,
    inverses: Array,
    interpret: Any = False,
) -> Inputs:
    """Gradients of all float inputs, None for the others."""
    from pallas_kernels.tpu import backward as backward_kernel
    from pallas_kernels.tpu import launch

    given, inputs = inputs, _widened(inputs, options)
    T = inputs.q.shape[1]
    call = _call(inputs, options, interpret)
    do = _fit(do, (*do.shape[:-1], call.blocks.V))
    dfinal = _fit(dfinal.astype(jnp.float32), (*dfinal.shape[:-2], call.blocks.K, call.blocks.V))
    if call.layout is not None:
        do = packing.take(do, call.layout.source)
    else:
        dfinal = dfinal[:, None]
        do = _pad(do, call.arrays.v.shape[1])
    got = backward_kernel.backward(
        call.arrays,
        launch.Saved(states, inverses),
        do,
        dfinal,
        call.segments,
        call.N,
        call.blocks,
        call.config,
    )

    def tokens(x: Any, like: Any) -> Any:
        return None if x is None else _tokens(x, call, T).astype(like.dtype)

    real = None if inputs.segment_ids is None else inputs.segment_ids != 0
    dA_log = ddt_bias = None
    dg = got.g
    if inputs.A_log is not None and options.gate_kind == "channel":
        dA_log = jnp.sum(got.log_rate, axis=(0, 2)).astype(inputs.A_log.dtype)
        if inputs.dt_bias is not None:
            ddt_bias = jnp.sum(got.dt_bias, axis=0).astype(inputs.dt_bias.dtype)
        dg = tokens(dg, inputs.g)
    elif options.gate_kind == "head":
        _, pull = jax.vjp(
            partial(gates.per_head_log_decay, lower_bound=options.lower_bound),
            inputs.g,
            inputs.A_log,
            inputs.dt_bias,
        )
        dlog = _tokens(dg, call, T)
        if real is not None:
            dlog = jnp.where(real[:, :, None], dlog, 0.0)
        dg, dA_log, ddt_bias = pull(dlog)
    else:
        dg = tokens(dg, inputs.g)
    dinitial = None
    if inputs.initial_state is not None:
        dinitial = got.state[:, 0] if call.layout is None else got.state
        if call.layout is not None:
            dinitial = jnp.where(call.present[:, :, None, None, None], dinitial, dfinal)
        dinitial = dinitial.astype(inputs.initial_state.dtype)
    grads = Inputs(
        q=tokens(got.q, inputs.q),
        k=tokens(got.k, inputs.k),
        v=tokens(got.v, inputs.v),
        g=dg,
        beta=tokens(got.beta, inputs.beta),
        A_log=dA_log,
        dt_bias=ddt_bias,
        initial_state=dinitial,
        segment_ids=None,
    )
    fitted: list[Any] = [
        None if g is None or x is None else _fit(g, x.shape) for g, x in zip(grads, given, strict=True)
    ]
    return Inputs(*fitted)
