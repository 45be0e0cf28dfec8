"""Models trained side by side in one program: same shapes and batches, their own seeds and learning rates."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from deltajax.models import LanguageModel, ModelConfig

Params = Any


class Lane(NamedTuple):
    """One of the models."""

    learning_rate: float
    seed: int


class Lanes(NamedTuple):
    """The lanes' arrays, each with a leading axis of lanes, but for `step`."""

    step: Array  # int32 []
    rates: Float[Array, " lanes"]
    params: Params
    opt_state: Any


def init_model(config: ModelConfig, key: jax.Array) -> Params:
    """A model's parameters; works under `vmap`."""
    return nnx.to_pure_dict(nnx.state(LanguageModel(config, rngs=nnx.Rngs(key)), nnx.Param))


def init_lanes(
    lanes: list[Lane], make: Callable[[jax.Array], Params], optimizer: optax.GradientTransformation
) -> Lanes:
    """Lanes before their first step; `make` makes parameters of a random key."""

    def one(seed):
        params = make(jax.random.key(seed))
        return params, optimizer.init(params)

    seeds = jnp.array([lane.seed for lane in lanes], jnp.uint32)
    params, opt_state = jax.jit(jax.vmap(one))(seeds)
    rates = jnp.array([lane.learning_rate for lane in lanes], jnp.float32)
    return Lanes(jnp.zeros((), jnp.int32), rates, params, opt_state)


def take_steps(
    loss: Callable[..., Array],
    optimizer: optax.GradientTransformation,
    lanes: Lanes,
    batches: Any,
    mapped: Callable[[Any], Any] = jax.vmap,
    own: tuple[Any, ...] = (),
) -> tuple[Lanes, Float[Array, "steps lanes"]]:
    """One step of all lanes for each of the batches.

    Args:
        loss: of one lane's parameters, a batch, and what is the lane's `own`.
        optimizer: makes the updates of a learning rate of 1.
        lanes: where they stand.
        batches: arrays with a leading axis of steps.
        mapped: makes a function of one lane one of all.
        own: arrays with a leading axis of lanes.

    Returns:
        The lanes afterwards, and each step's losses.
    """

    def step(carry, batch):
        def one(rate, params, opt_state, *own):
            value, grads = jax.value_and_grad(loss)(params, batch, *own)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            # Weight decay is part of the update, so the rate scales it as it does everywhere.
            params = optax.apply_updates(params, jax.tree.map(lambda u: rate * u, updates))
            return params, opt_state, value

        params, opt_state, values = mapped(one)(lanes.rates, *carry, *own)
        return (params, opt_state), values

    (params, opt_state), losses = jax.lax.scan(step, (lanes.params, lanes.opt_state), batches)
    return Lanes(lanes.step + len(losses), lanes.rates, params, opt_state), losses
