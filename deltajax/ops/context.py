"""Context parallelism: one sequence's tokens spread over a mesh axis, inside `jax.shard_map`.

A run of tokens acts on the state entering it as ``S -> M S + N``, and such maps compose. Each device finds
the (M, N) of its own tokens, one all-gather shares them, each folds those before it into the state that
enters its tokens, and runs the op from there. M is the final state that the recurrence reaches from the
identity with values of zero, so one call on ``[v | 0]`` from ``[0 | I]`` gives ``[N | M]``. No gate is
assumed to decay.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from deltajax.ops.problem import Inputs, Options, initial_state, vary_alike

Run = Callable[[Inputs, Options], tuple[Array, Array]]


class _Ends(NamedTuple):
    """A device's place in its rows' segments."""

    first: Int[Array, " B"]  # id of its first real token, 0 if it has none
    last: Int[Array, " B"]  # id of its last real token, 0 if it has none
    before: Int[Array, " B"]  # id of the last real token on earlier devices, 0 if there is none
    continues: Bool[Array, " B"]  # its first tokens go on from the state that enters it


def run(run_local: Run, inputs: Inputs, options: Options, axis_name: str) -> tuple[Array, Array]:
    """Runs the op on this device's tokens of rows that go on over ``axis_name``.

    Args:
      run_local: the op on one device.
      inputs: this device's tokens; ``initial_state`` and the gate's parameters are the same on all devices.
      options: the call's options.
      axis_name: the mesh axis, its devices in the order of the tokens.

    Returns:
      o of this device's tokens; the final state (or states) of the whole rows, the same on all devices.
    """
    start = initial_state(inputs, options)
    device, devices = lax.axis_index(axis_name), lax.axis_size(axis_name)
    ends = None if inputs.segment_ids is None else _ends(inputs.segment_ids, options, axis_name)

    N, M = _summary(run_local, inputs, options, ends, start)
    maps = lax.all_gather((N, M), axis_name)  # [devices, B, HV, K, .]
    entering = jnp.zeros_like(N) if options.num_segments is not None else start
    entering = _fold(entering, maps, devices, device)

    if options.num_segments is None:
        if ends is not None:
            entering = jnp.where(_per_row(ends.continues), entering, 0)
        o, final = run_local(inputs._replace(initial_state=entering), options)
        # The last device's final state is everybody's.
        return o, lax.psum(jnp.where(device == devices - 1, final, 0), axis_name)

    assert ends is not None and inputs.segment_ids is not None  # num_segments comes with segment_ids
    states = _with_first(start, entering, ends)
    o, finals = run_local(inputs._replace(initial_state=states), options)
    return o, _final_states(finals, start, inputs.segment_ids, axis_name)


def _per_row(x: Array) -> Array:
    return x[:, None, None, None]


def _ends(ids: Int[Array, "B T"], options: Options, axis_name: str) -> _Ends:
    real = ids != 0
    row = jnp.arange(ids.shape[0])
    T = ids.shape[1]
    has = jnp.any(real, axis=1)
    first = jnp.where(has, ids[row, jnp.argmax(real, axis=1)], 0)
    last = jnp.where(has, ids[row, T - 1 - jnp.argmax(real[:, ::-1], axis=1)], 0)
    lasts = lax.all_gather(last, axis_name)  # [devices, B]
    earlier = (jnp.arange(lasts.shape[0]) < lax.axis_index(axis_name))[:, None] & (lasts != 0)
    latest = jnp.max(jnp.where(earlier, jnp.arange(lasts.shape[0])[:, None], -1), axis=0)  # [B]
    before = jnp.where(latest < 0, 0, lasts[jnp.maximum(latest, 0), row])
    continues = ~has | (first == before)
    if options.num_segments is None:  # the row's first segment goes on from initial_state
        continues |= before == 0
    return _Ends(first, last, before, continues)


def _with_first(states: Float[Array, "B N HV K D"], entering: Array, ends: _Ends) -> Array:
    """``states`` with the first segment's replaced by the entering one, where that segment goes on."""
    index = jnp.where(ends.continues & (ends.first != 0), ends.first - 1, states.shape[1])
    return states.at[jnp.arange(states.shape[0]), index].set(entering, mode="drop")


def _summary(
    run_local: Run, inputs: Inputs, options: Options, ends: _Ends | None, start: Array
) -> tuple[Float[Array, "B HV K V"], Float[Array, "B HV K K"]]:
    """N and M of this device's tokens, from the state that enters it to the state that leaves it."""
    B, T, HV, V = inputs.v.shape
    K = inputs.q.shape[-1]
    identity = jnp.broadcast_to(jnp.eye(K, dtype=start.dtype), (B, HV, K, K))
    nothing = jnp.zeros((B, HV, K, V), start.dtype)
    entering = jnp.concatenate([nothing, identity], axis=-1)  # [0 | I]
    extended = inputs._replace(
        q=jnp.zeros_like(inputs.q),  # the outputs are not wanted
        v=jnp.concatenate([inputs.v, jnp.zeros((B, T, HV, K), inputs.v.dtype)], axis=-1),
    )
    if ends is None:
        _, final = run_local(extended._replace(initial_state=entering), options)
        return final[..., :V], final[..., V:]
    if options.num_segments is None:
        from_here = jnp.where(_per_row(ends.continues), entering, 0)
        _, final = run_local(extended._replace(initial_state=from_here), options)
    else:
        states = jnp.concatenate([start, jnp.zeros((*start.shape[:-1], K), start.dtype)], axis=-1)
        states = _with_first(states, entering, ends)
        _, finals = run_local(extended._replace(initial_state=states), options)
        last = finals[jnp.arange(B), jnp.maximum(ends.last - 1, 0)]
        final = jnp.where(_per_row(ends.last != 0), last, entering)  # padding only: the identity map
    return final[..., :V], final[..., V:]


def _fold(state: Array, maps: tuple[Array, Array], devices: int, device: Array) -> Float[Array, "B HV K V"]:
    """The state entering this device: the maps of all devices before it, applied in order."""

    def apply(state, x):
        (N, M), i = x
        new = N + jnp.matmul(M, state, precision=lax.Precision.HIGHEST)
        return jnp.where(i < device, new, state), None

    state = vary_alike(state, maps[0], device)[0]
    return lax.scan(apply, state, (maps, jnp.arange(devices)))[0]


def _final_states(
    finals: Float[Array, "B N HV K V"], start: Array, ids: Int[Array, "B T"], axis_name: str
) -> Array:
    """Each segment's final state, from the last device that has a token of it."""
    present = jnp.any(ids[:, :, None] == jnp.arange(1, start.shape[1] + 1), axis=1)  # [B, N]
    device = lax.axis_index(axis_name)
    owner = lax.pmax(jnp.where(present, device, -1), axis_name)  # [B, N], the same on all devices
    mine = jnp.where((owner == device)[..., None, None, None], finals, 0)
    return jnp.where((owner < 0)[..., None, None, None], start, lax.psum(mine, axis_name))
