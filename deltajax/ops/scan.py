"""The definition: the delta-rule recurrence, token by token, with `jax.lax.scan`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deltajax.ops.problem import Inputs, Options, initial_state, prepare, vary_alike


def decay_of(g: Float[Array, "..."] | None, gate_kind: str) -> Float[Array, "... #K 1"] | float:
    """The factor on a state [..., K, V] of one token's log decay ([...] or [..., K])."""
    if g is None:
        return 1.0
    return jnp.exp(g)[..., None, None] if gate_kind == "head" else jnp.exp(g)[..., None]


def delta_update(state, q, k, v, decay, beta):
    """One token of the recurrence in design order.

    Args:
      state: [..., K, V].
      q, k: [..., K].
      v: [..., V].
      decay: broadcasts against ``state``.
      beta: [...].

    Returns:
      o [..., V] and the new state [..., K, V].
    """
    precision = jax.lax.Precision.HIGHEST
    state = decay * state  # S~ = Diag(exp g) S
    read = jnp.einsum("...kv,...k->...v", state, k, precision=precision)  # S~^T k
    u = beta[..., None] * (v - read)  # what is new
    state = state + k[..., :, None] * u[..., None, :]  # S = S~ + k u^T
    return jnp.einsum("...kv,...k->...v", state, q, precision=precision), state


def forward(inputs: Inputs, options: Options) -> tuple[Float[Array, "B T HV V"], Array]:
    """Runs the recurrence over T. Differentiable; memory for gradients is linear in T states."""
    q, k, v, g, beta = prepare(inputs, options)
    B, T, H, _ = q.shape
    HV = v.shape[2]
    N = options.num_segments
    q, k = (jnp.repeat(x, HV // H, axis=2) for x in (q, k))  # value head j reads head j // (HV // H)

    ids = jnp.ones((B, T), jnp.int32) if inputs.segment_ids is None else inputs.segment_ids.astype(jnp.int32)
    start = initial_state(inputs, options)
    row = jnp.arange(B)

    def step(carry, token):
        state, last_id, finals = carry
        q, k, v, g, beta, id = token
        real = id != 0
        changed = real & (id != last_id)
        if N is None:  # the row's first segment goes on from initial_state, later ones from zero
            state = jnp.where((changed & (last_id != 0))[:, None, None, None], 0, state)
        else:
            state = jnp.where(changed[:, None, None, None], start[row, id - 1], state)
        o, new = delta_update(state, q, k, v, decay_of(g, options.gate_kind), beta)
        state = jnp.where(real[:, None, None, None], new, state)
        if N is not None:
            finals = finals.at[row, jnp.where(real, id - 1, N)].set(state, mode="drop")
        return (state, jnp.where(real, id, last_id), finals), o

    first = start if N is None else jnp.zeros_like(start[:, 0])
    finals = None if N is None else start  # a segment without tokens keeps its initial state
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, g, beta, ids))
    no_id = jnp.zeros_like(ids[:, 0])
    first, no_id = vary_alike(first, no_id, start)[:2]
    (state, _, finals), o = jax.lax.scan(step, (first, no_id, finals), tokens)
    return jnp.moveaxis(o, 0, 1).astype(inputs.v.dtype), state if finals is None else finals
