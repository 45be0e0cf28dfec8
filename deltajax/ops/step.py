"""One token of the recurrence, for decoding."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deltajax.ops import checks, gates
from deltajax.ops.gates import Gate
from deltajax.ops.problem import l2_normalize
from deltajax.ops.scan import decay_of, delta_update


def delta_rule_step(
    state: Float[Array, "B HV K V"],
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B HV V"],
    beta: Float[Array, "B HV"],
    g: Float[Array, "B HV"] | Float[Array, "B HV K"] | None = None,
    *,
    gate: Gate | None = None,
    normalize_qk: bool = False,
    scale: float | None = None,
) -> tuple[Float[Array, "B HV V"], Float[Array, "B HV K V"]]:
    """Advances the state by one token; under ``jit`` with ``state`` donated, in place.

    The gate kind follows from ``g``: None (DeltaNet), [B, HV] (Gated DeltaNet) or [B, HV, K] (KDA).

    Args:
      state: [B, HV, K, V] float32, as an op's ``final_state`` or zeros.
      q: [B, H, K] query. k: [B, H, K] key. v: [B, HV, V] value, HV a multiple of H.
      beta: [B, HV] write strength, activated.
      g: log decay <= 0, or the raw gate projection when ``gate`` is given.
      gate: fuses the gate activation, see `Gate`.
      normalize_qk: L2-normalise q and k over K.
      scale: multiplies q; K^-1/2 if None.

    Returns:
      o: [B, HV, V] in v's dtype. state: [B, HV, K, V] in ``state``'s dtype.

    Raises:
      ValueError, TypeError: an argument's shape or dtype does not fit; the message names it.
    """
    kind = checks.check_step(state, q, k, v, beta, g, gate)
    arrays = (state, q, k, v, beta, *jax.tree.leaves((g, gate)))
    dtype = jnp.result_type(jnp.float32, *(x.dtype for x in arrays))
    o_dtype, state_dtype = v.dtype, state.dtype
    state, q, k, v, beta = (x.astype(dtype) for x in (state, q, k, v, beta))
    if normalize_qk:
        q, k = l2_normalize(q), l2_normalize(k)
    if g is not None:
        g = g.astype(dtype)
        if gate is not None:
            g = gates.activate(g, gate.A_log, gate.dt_bias, gate.lower_bound, per_channel=kind == "channel")
    group = v.shape[1] // q.shape[1]
    q, k = jnp.repeat(q, group, axis=1), jnp.repeat(k, group, axis=1)
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    o, state = delta_update(state, q, k, v, decay_of(g, kind), beta)
    return o.astype(o_dtype), state.astype(state_dtype)
