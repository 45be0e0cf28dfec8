"""Gate activations: from a raw projection to a log decay ``g <= 0``."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gate:
    """Parameters of the gate activation that an op fuses when it is given ``gate=``.

    Without a bound (Mamba-2, Gated DeltaNet, Kimi Linear): ``g = -exp(A_log) softplus(x + dt_bias)``.
    With one: ``g = lower_bound * sigmoid(exp(A_log) (x + dt_bias))``.

    Attributes:
      A_log: [HV], float. Log of the decay rate of each value head.
      dt_bias: [HV] for a per-head gate, [HV, K] for a per-channel gate, or None for zero.
      lower_bound: static float < 0 that bounds the log decay of one token from below, or None.
    """

    A_log: Float[Array, " HV"]
    dt_bias: Float[Array, " HV"] | Float[Array, "HV K"] | None = None
    lower_bound: float | None = dataclasses.field(default=None, metadata={"static": True})


def per_head_log_decay(
    g: Float[Array, "B T HV"],
    A_log: Float[Array, " HV"] | None,
    dt_bias: Float[Array, " HV"] | None,
    lower_bound: float | None,
) -> Float[Array, "B T HV"]:
    """A per-head gate's log decay in float32, activated where there is an A_log."""
    g = g.astype(jnp.float32)
    return g if A_log is None else activate(g, A_log, dt_bias, lower_bound, per_channel=False)


def activate(
    x: Float[Array, "..."],
    A_log: Float[Array, " HV"],
    dt_bias: Float[Array, "..."] | None,
    lower_bound: float | None,
    *,
    per_channel: bool,
) -> Float[Array, "..."]:
    """Log decay of a raw gate projection, in ``x``'s dtype.

    Args:
      x: [..., HV], or [..., HV, K] when ``per_channel``.
      A_log: [HV].
      dt_bias: the shape of one token's ``x``, or None.
      lower_bound: see `Gate`.
      per_channel: whether ``x`` has a channel axis behind its head axis.
    """
    rate = jnp.exp(A_log.astype(x.dtype))
    rate = rate[:, None] if per_channel else rate
    x = x if dt_bias is None else x + dt_bias.astype(x.dtype)
    if lower_bound is None:
        return -rate * jax.nn.softplus(x)
    return lower_bound * jax.nn.sigmoid(rate * x)
