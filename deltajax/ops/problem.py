"""What every implementation receives: checked arrays, static options, and how they are prepared."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deltajax.ops import gates

GateKind = Literal["none", "head", "channel"]


class Inputs(NamedTuple):
    """The arrays of one call, as the caller passed them. Absent ones are None."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T HV V"]
    g: Float[Array, "B T HV"] | Float[Array, "B T HV K"] | None  # log decay, or raw when A_log is given
    beta: Float[Array, "B T HV"]
    A_log: Float[Array, " HV"] | None
    dt_bias: Float[Array, " HV"] | Float[Array, "HV K"] | None
    initial_state: Float[Array, "B HV K V"] | Float[Array, "B N HV K V"] | None
    segment_ids: Int[Array, "B T"] | None


@dataclasses.dataclass(frozen=True)
class Options:
    """The static side of one call; hashable."""

    gate_kind: GateKind
    lower_bound: float | None
    scale: float
    normalize_qk: bool
    num_segments: int | None
    chunk_size: int | None
    padding_is_zero: bool = False
    axis_name: str | None = None
    """The mesh axis over which tokens are spread: final states are then those behind this device's tokens."""


class Tokens(NamedTuple):
    """Tokens ready for the recurrence: float32 (float64 if any input is), padding made neutral.

    A padding token has q = k = v = 0, beta = 0 and g = 0, so that it leaves the state alone and outputs 0.
    """

    q: Float[Array, "B T H K"]  # normalised if asked, times scale
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T HV V"]
    g: Float[Array, "B T HV"] | Float[Array, "B T HV K"] | None  # log decay
    beta: Float[Array, "B T HV"]


def compute_dtype(inputs: Inputs) -> jnp.dtype:
    """float32, or float64 if any array of the call is."""
    arrays = [x for x in inputs[:-1] if x is not None]
    return jnp.result_type(jnp.float32, *(x.dtype for x in arrays))


def float64_argument(inputs: Inputs, *names: str) -> str | None:
    """What to say of the first of these arguments that is float64, as no kernel takes it; None if none is."""
    for name in names:
        x = getattr(inputs, name)
        if x is not None and x.dtype == jnp.float64:
            return f"{name} must not be float64"
    return None


def vary_alike(*arrays: Array | None) -> tuple[Any, ...]:
    """Makes arrays inside a `jax.shard_map` vary over the same mesh axes: all that any of them varies over.

    Custom derivatives and loop carries want equal types; outside a shard_map nothing changes.
    """
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays if x is not None))
    return tuple(None if x is None else _vary(jnp.asarray(x), axes) for x in arrays)


def vary_like(tree: Any, like: Any) -> Any:
    """A tree of arrays, each varying over the mesh axes that its counterpart in ``like`` varies over."""
    return jax.tree.map(lambda x, y: _vary(x, jax.typeof(y).manual_axis_type.varying), tree, like)


def _vary(x: Array, axes: frozenset[str]) -> Array:
    missing = axes - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def l2_normalize(x: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
    """``x * rsqrt(sum x^2 + 1e-6)`` over the last axis; its gradient at a zero vector is finite."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def initial_state(inputs: Inputs, options: Options) -> Float[Array, "B HV K V"] | Float[Array, "B N HV K V"]:
    """The state (or states) to start from, zeros where the caller gave none, in the compute dtype."""
    dtype = compute_dtype(inputs)
    if inputs.initial_state is not None:
        return inputs.initial_state.astype(dtype)
    B, _, HV, V = inputs.v.shape
    segments_axis = () if options.num_segments is None else (options.num_segments,)
    zeros = jnp.zeros((B, *segments_axis, HV, inputs.q.shape[-1], V), dtype)
    return vary_alike(zeros, inputs.q)[0]


def prepare(inputs: Inputs, options: Options) -> Tokens:
    """Casts, normalises, scales, activates the gate and neutralises padding."""
    dtype = compute_dtype(inputs)
    q, k, v, beta = (x.astype(dtype) for x in (inputs.q, inputs.k, inputs.v, inputs.beta))
    g = None if inputs.g is None else inputs.g.astype(dtype)

    if inputs.segment_ids is not None:
        real = inputs.segment_ids != 0  # [B, T]

        def keep(x):
            return jnp.where(real.reshape(real.shape + (1,) * (x.ndim - 2)), x, 0)

        # Before the activations, so that not even NaN in a padding token reaches a gradient.
        q, k, v, beta = keep(q), keep(k), keep(v), keep(beta)
        g = None if g is None else keep(g)

    if options.normalize_qk:
        q, k = l2_normalize(q), l2_normalize(k)
    if inputs.A_log is not None:
        assert g is not None
        g = gates.activate(
            g,
            inputs.A_log,
            inputs.dt_bias,
            options.lower_bound,
            per_channel=options.gate_kind == "channel",
        )
        if inputs.segment_ids is not None:
            g = keep(g)
    return Tokens(q * options.scale, k, v, g, beta)
