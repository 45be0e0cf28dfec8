"""Context parallelism: one sequence's tokens spread over a mesh axis, inside `jax.shard_map`.

A run of tokens acts on the state entering it as ``S -> M S + N``, and its outputs are ``o = R S + o_0``. One
all-gather shares the maps, and each device folds those before it into the state that enters its tokens. No
gate is assumed to decay.

Kernels that make the map of their tokens on the way ask for that state by `enter`, and backwards for the
gradient of the state that leaves by `leave`. For all others map and response come from one call of the op
(`forward`, `saving`, `backward`): M is the state that the recurrence reaches from the identity with zeros for
values, R what it puts out on the way. So values ``[v | 0]`` from the state ``[0 | I]`` give outputs
``[o_0 | R]`` and the final state ``[N | M]``; one product then adds what the entering state contributes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from deltajax.ops.problem import Inputs, Options, initial_state, vary_alike, vary_like

Run = Callable[[Inputs, Options], tuple[Array, Array]]


class _Ends(NamedTuple):
    """A device's place in its rows' segments."""

    first: Int[Array, " B"]  # id of its first real token, 0 if it has none
    last: Int[Array, " B"]  # id of its last real token, 0 if it has none
    before: Int[Array, " B"]  # id of the last real token on earlier devices, 0 if there is none
    continues: Bool[Array, " B"]  # its first tokens go on from the state that enters it


def whole_final(final: Array, inputs: Inputs, options: Options) -> Array:
    """The final state (or states) of the whole rows, the same on all devices.

    Args:
      final: what the halves return: the state behind this device's tokens, or its segments'.
      inputs: as the caller passed them: an initial state that is the same on all devices.
      options: the call's.
    """
    name = _name(options)
    if options.num_segments is None:  # the last device's is everybody's
        device, devices = lax.axis_index(name), lax.axis_size(name)
        return lax.psum(jnp.where(device == devices - 1, final, 0), name)
    assert inputs.segment_ids is not None  # num_segments comes with segment_ids
    return _final_states(final, inputs.initial_state, inputs.segment_ids, name)


def _name(options: Options) -> str:
    assert options.axis_name is not None
    return options.axis_name


def enter(added: Array, moved: Array, inputs: Inputs, options: Options) -> Float[Array, "B HV K V"]:
    """The state that enters this device's tokens, which take S to M S + N. Not with `num_segments`.

    Args:
      added: N [B, HV, K, V].
      moved: M [B, HV, K, K].
      inputs, options: the call's.
    """
    name = _name(options)
    ends = _place(inputs, options)
    start = initial_state(inputs, options).astype(added.dtype)
    moved = _where_continued(moved, ends)
    maps = _gathered(vary_alike(added, moved, inputs.v)[:2], name)  # [devices, B, HV, K, .]
    return _where_continued(_fold(start, maps, lax.axis_size(name), lax.axis_index(name)), ends)


def leave(
    added: Array, moved: Array, dfinal: Array, inputs: Inputs, options: Options
) -> Float[Array, "B HV K V"]:
    """The gradient of the state that leaves this device's tokens, which take dS to M^T dS + D.

    Args:
      added: D [B, HV, K, V].
      moved: M^T [B, HV, K, K].
      dfinal: the gradient of this device's own final state, [B, HV, K, V].
      inputs, options: the call's.
    """
    name = _name(options)
    ends = _place(inputs, options)
    added = _where_continued(added + _product(moved, dfinal), ends)
    moved = _where_continued(moved, ends)
    maps = _gathered(vary_alike(added, moved, inputs.v)[:2], name)
    devices = lax.axis_size(name)
    maps, device = jax.tree.map(lambda x: x[::-1], maps), devices - 1 - lax.axis_index(name)
    return dfinal + _fold(jnp.zeros_like(dfinal), maps, devices, device)


def of_initial_state(gradient: Float[Array, "B HV K V"], options: Options) -> Float[Array, "B HV K V"]:
    """The initial state's gradient, of that of the state that enters this device's tokens."""
    return jnp.where(lax.axis_index(_name(options)) == 0, gradient, 0)


def _where_continued(x: Array, ends: _Ends | None) -> Array:
    return x if ends is None else jnp.where(_per_row(ends.continues), x, 0)


def _place(inputs: Inputs, options: Options) -> _Ends | None:
    """Where this device stands in its rows' segments, None without any; an all-gather finds it."""
    ids = inputs.segment_ids
    return None if ids is None else _ends(ids, options, _name(options))


def forward(run_local: Run, inputs: Inputs, options: Options) -> tuple[Array, Array]:
    """The op on this device's tokens of rows that go on over ``options.axis_name``.

    Args:
      run_local: the op on one device.
      inputs: this device's tokens; ``initial_state`` and the gate's parameters are the same on all devices.
      options: the call's options.

    Returns:
      o of this device's tokens; the state (or the segments' states) behind them, for `whole_final`.
    """
    ends = _place(inputs, options)
    outputs, finals = run_local(extend(inputs, options, ends), _alone(options))
    return _join(inputs, options, ends, *_parted(outputs, inputs), finals)


def _parted(outputs: Float[Array, "B T HV V+K"], inputs: Inputs) -> tuple[Array, Array]:
    """o_0 and R of a device's own call."""
    V = inputs.v.shape[-1]
    return outputs[..., :V], outputs[..., V:]


def saving(
    run_local: Callable[[Inputs, Options], tuple[Array, Array, tuple[Array, ...]]],
    inputs: Inputs,
    options: Options,
) -> tuple[Array, Array, tuple[Array, ...]]:
    """`forward`, and what `backward` reads."""
    ends = _place(inputs, options)
    outputs, finals, own = run_local(extend(inputs, options, ends), _alone(options))
    o, response = _parted(outputs, inputs)
    return *_join(inputs, options, ends, o, response, finals), (response, finals, *own)


def made_again(run_local: Run, inputs: Inputs, options: Options) -> tuple[Array, Array]:
    """What `backward` reads, for an op that keeps nothing."""
    outputs, finals = run_local(extend(inputs, options, _place(inputs, options)), _alone(options))
    return _parted(outputs, inputs)[1], finals


def backward(
    run_back: Callable[..., Inputs],
    inputs: Inputs,
    options: Options,
    do: Array,
    dfinal: Array,
    response: Array,
    finals: Array,
    *own: Array,
) -> Inputs:
    """Gradients of all float inputs of `forward`, None for the others."""
    floats, ends = inputs._replace(segment_ids=None), _place(inputs, options)

    def of_floats(floats: Inputs) -> Inputs:
        return extend(_with_ids(floats, inputs), options, ends)._replace(segment_ids=None)

    def join(initial: Array | None, *op: Array) -> tuple[Array, Array]:
        return _join(inputs._replace(initial_state=initial), options, ends, *op)

    extended, pull_inputs = jax.vjp(of_floats, floats)
    # o is linear in what stands for o_0.
    _, pull = jax.vjp(join, inputs.initial_state, jnp.zeros_like(do), response, finals)
    dinitial, do, dresponse, dfinals = pull((do, dfinal))
    dextended = run_back(
        _with_ids(extended, inputs), _alone(options), jnp.concatenate([do, dresponse], axis=-1), dfinals, *own
    )
    (found,) = pull_inputs(vary_like(dextended, extended))
    return found if dinitial is None else found._replace(initial_state=found.initial_state + dinitial)


def _with_ids(floats: Inputs, inputs: Inputs) -> Inputs:
    return floats._replace(segment_ids=inputs.segment_ids)


def _alone(options: Options) -> Options:
    """The options of a device's own call."""
    return dataclasses.replace(options, axis_name=None)


def _join(
    inputs: Inputs,
    options: Options,
    ends: _Ends | None,
    o: Array,
    response: Float[Array, "B T HV K"],
    finals: Array,
) -> tuple[Array, Array]:
    """Outputs and final states of the state that really entered, from those of values [v | 0]."""
    name, V = _name(options), inputs.v.shape[-1]
    start = initial_state(inputs, options)
    leaving = finals
    if options.num_segments is not None:
        leaving = _leaving(finals, _identity_map(inputs, start), ends)  # [N | M]
    maps = _gathered((leaving[..., :V], leaving[..., V:]), name)  # [devices, B, HV, K, .]
    entering = start if options.num_segments is None else jnp.zeros_like(maps[0][0])
    entering = _fold(entering, maps, lax.axis_size(name), lax.axis_index(name))
    # R is 0 past the first segment, and everywhere if that does not go on from the entering state.
    o = _add_response(o, response, entering)
    if options.num_segments is not None:
        entering = entering[:, None]
    return o, finals[..., :V] + _product(finals[..., V:], entering)


def _gathered(tree: Any, axis_name: str) -> Any:
    """[devices, ...] of arrays [...].

    Tiled: of the derivative of an untiled all-gather, jax 0.11 takes a wrong axis for the one of `jax.vmap`.
    """
    return lax.all_gather(jax.tree.map(lambda x: x[None], tree), axis_name, tiled=True)


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
    lasts = _gathered(last, axis_name)  # [devices, B]
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


def extend(inputs: Inputs, options: Options, ends: _Ends | None) -> Inputs:
    """The inputs with values [v | 0], and [0 | I] for the state that enters this device."""
    start = initial_state(inputs, options)
    entering = _identity_map(inputs, start)
    K = inputs.q.shape[-1]
    v = jnp.concatenate([inputs.v, jnp.zeros((*inputs.v.shape[:-1], K), inputs.v.dtype)], axis=-1)
    if ends is not None and options.num_segments is None:
        entering = jnp.where(_per_row(ends.continues), entering, 0)
    elif ends is not None:
        states = jnp.concatenate([start, jnp.zeros((*start.shape[:-1], K), start.dtype)], axis=-1)
        entering = _with_first(states, entering, ends)
    return Inputs(*vary_alike(*inputs._replace(v=v, initial_state=entering)))


def extended_shapes(inputs: Inputs, options: Options) -> Inputs:
    """The shapes of a device's own call."""
    shapes: Any = jax.eval_shape(lambda inputs: extend(inputs, options, _place(inputs, options)), inputs)
    return shapes


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
    finals: Float[Array, "B N HV K V"], start: Array | None, ids: Int[Array, "B T"], axis_name: str
) -> Array:
    """Each segment's final state, from the last device that has a token of it."""
    present = jnp.any(ids[:, :, None] == jnp.arange(1, finals.shape[1] + 1), axis=1)  # [B, N]
    device = lax.axis_index(axis_name)
    owner = lax.pmax(jnp.where(present, device, -1), axis_name)  # [B, N], the same on all devices
    final = lax.psum(jnp.where((owner == device)[..., None, None, None], finals, 0), axis_name)
    return final if start is None else jnp.where((owner < 0)[..., None, None, None], start, final)
