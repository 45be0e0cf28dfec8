"""Second moments in bfloat16, rounded so that they keep moving."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Bfloat16State(NamedTuple):
    """State of `bfloat16_second_moments`."""

    updates: jax.Array  # int32 [], how many were made: draws the next rounding
    inner: Any  # the wrapped optimizer's, its `nu` in bfloat16


def round_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 -> bfloat16, up or down so that the mean is `x`: up with the probability of the part cut off.

    What is not finite is rounded as usual.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # A carry out of the 16 bits that go moves on to the next bfloat16 away from 0.
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    kept = jax.lax.bitcast_convert_type(((bits + noise) >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), kept, x.astype(jnp.bfloat16))


def bfloat16_second_moments(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps every `nu` in an Optax optimizer's state in bfloat16, while it computes with float32.

    Rounding to nearest would not do: a step lets a moment fall by `1 - b2` of itself at most, and bfloat16
    holds no changes below 1/512, so that with b2 0.999 it would never fall again. Rounded at random it
    follows the float32 moment in the mean, with a spread of about `2**-9 / sqrt(1 - b2)`.
    The draws depend on the count of updates alone, so that a resumed run repeats them, on any mesh.
    """

    def stored(state: Any, count: jax.Array) -> Any:
        key = jax.random.fold_in(jax.random.key(0), count)
        places = iter(range(len(jax.tree.leaves(state))))

        def store(path: Any, x: jax.Array) -> jax.Array:
            own = jax.random.fold_in(key, next(places))
            return round_stochastically(x, own) if _is_second_moment(path) else x

        return jax.tree.map_with_path(store, state)

    def init(params: Any) -> Bfloat16State:
        count = jnp.zeros((), jnp.int32)
        return Bfloat16State(count, stored(inner.init(params), count))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Bfloat16State]:
        full = jax.tree.map_with_path(
            lambda path, x: x.astype(jnp.float32) if _is_second_moment(path) else x, state.inner
        )
        updates, full = inner.update(updates, full, params)
        count = optax.safe_increment(state.updates)
        return updates, Bfloat16State(count, stored(full, count))

    return optax.GradientTransformation(init, update)


def _is_second_moment(path: Any) -> bool:
    return any(getattr(entry, "name", None) == "nu" for entry in path)
