"""Context parallelism: one sequence's tokens spread over a mesh axis, inside `jax.shard_map`.

A run of tokens acts on the state entering it as ``S -> M S + N``, and its outputs are ``o = R S + o_0``. Both
come from one call of the op: M is the state that the recurrence reaches from the identity with values of
zero, R what it puts out on the way, so values ``[v | 0]`` from the state ``[0 | I]`` give outputs
``[o_0 | R]`` and the final state ``[N | M]``. One all-gather shares the maps, each device folds those before
it into the state that enters its tokens, and one product adds what that state contributes. No gate is assumed
to decay.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from deltajax.ops.dispatch import SAVED
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
    V = inputs.v.shape[-1]
    device, devices = lax.axis_index(axis_name), lax.axis_size(axis_name)
    ends = None if inputs.segment_ids is None else _ends(inputs.segment_ids, options, axis_name)

    unchanged = _identity_map(inputs, start)
    outputs, finals = run_local(_extended(inputs, start, unchanged, ends, options), options)
    leaving = finals if options.num_segments is None else _leaving(finals, unchanged, ends)  # [N | M]
    maps = lax.all_gather((leaving[..., :V], leaving[..., V:]), axis_name)  # [devices, B, HV, K, .]
    entering = jnp.zeros_like(maps[0][0]) if options.num_segments is not None else start
    entering = checkpoint_name(_fold(entering, maps, devices, device), SAVED)

    # R is 0 past the first segment, and everywhere if that does not go on from the entering state.
    response = checkpoint_name(outputs[..., V:], SAVED)  # [B, T, HV, K]
    o = _add_response(outputs[..., :V], response, entering)
    if options.num_segments is None:
        final = finals[..., :V] + _product(finals[..., V:], entering)
        # The last device's final state is everybody's.
        return o, lax.psum(jnp.where(device == devices - 1, final, 0), axis_name)
    assert inputs.segment_ids is not None  # num_segments comes with segment_ids
    finals = finals[..., :V] + _product(finals[..., V:], entering[:, None])
    return o, _final_states(finals, start, inputs.segment_ids, axis_name)


def _product(M: Float[Array, "... K K"], S: Float[Array, "... K V"]) -> Float[Array, "... K V"]:
    return jnp.matmul(M, S, precision=lax.Precision.HIGHEST)


@jax.custom_vjp
def _add_response(
    o: Float[Array, "B T HV V"], response: Float[Array, "B T HV K"], entering: Float[Array, "B HV K V"]
) -> Float[Array, "B T HV V"]:
    """o + R S. Its derivative is written out so that it, too, multiplies numbers of o's type."""
    more = _multiply("bthk,bhkv->bthv", response, entering, o.dtype)
    return (o.astype(more.dtype) + more).astype(o.dtype)


def _multiply(form: str, x: Array, y: Array, dtype: DTypeLike) -> Array:
    """The product of x and y as ``dtype``, summed in float32 at least."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return jnp.einsum(
        form,
        x.astype(dtype),
        y.astype(dtype),
        precision=lax.Precision.HIGHEST,  # of float32; half-precision numbers are multiplied exactly anyway
        preferred_element_type=wide,
    )


def _add_response_forward(o, response, entering):
    return _add_response(o, response, entering), (response, entering)


def _add_response_backward(saved, do):
    response, entering = saved
    dresponse = _multiply("bthv,bhkv->bthk", do, entering, do.dtype).astype(response.dtype)
    return do, dresponse, _multiply("bthk,bthv->bhkv", response, do, do.dtype).astype(entering.dtype)


_add_response.defvjp(_add_response_forward, _add_response_backward)


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


def _identity_map(inputs: Inputs, start: Array) -> Float[Array, "B HV K V+K"]:
    """[0 | I]: the map of a device without tokens, and the state whose response is every state's."""
    B, _, HV, V = inputs.v.shape
    K = inputs.q.shape[-1]
    identity = jnp.broadcast_to(jnp.eye(K, dtype=start.dtype), (B, HV, K, K))
    return jnp.concatenate([jnp.zeros((B, HV, K, V), start.dtype), identity], axis=-1)


def _extended(inputs: Inputs, start: Array, entering: Array, ends: _Ends | None, options: Options) -> Inputs:
    """The inputs with values [v | 0], and ``entering``, [0 | I], for the state that enters this device."""
    K = inputs.q.shape[-1]
    v = jnp.concatenate([inputs.v, jnp.zeros((*inputs.v.shape[:-1], K), inputs.v.dtype)], axis=-1)
    if ends is not None and options.num_segments is None:
        entering = jnp.where(_per_row(ends.continues), entering, 0)
    elif ends is not None:
        states = jnp.concatenate([start, jnp.zeros((*start.shape[:-1], K), start.dtype)], axis=-1)
        entering = _with_first(states, entering, ends)
    return inputs._replace(v=v, initial_state=entering)


def _leaving(finals: Float[Array, "B N HV K D"], unchanged: Array, ends: _Ends | None) -> Array:
    """[N | M] of all of a device's tokens: its last segment's, the identity map's where it has none."""
    assert ends is not None  # num_segments comes with segment_ids
    last = finals[jnp.arange(len(finals)), jnp.maximum(ends.last - 1, 0)]
    return jnp.where(_per_row(ends.last != 0), last, unchanged)


def _fold(state: Array, maps: tuple[Array, Array], devices: int, device: Array) -> Float[Array, "B HV K V"]:
    """The state entering this device: the maps of all devices before it, applied in order."""

    def apply(state, x):
        (N, M), i = x
        new = N + _product(M, state)
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
