"""The layers inside other people's models: a plain NNX module, and Linen through flax's bridge."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from deltajax.layers import DeltaNet, GatedDeltaNet, KimiDeltaAttention, RMSNorm

LAYERS = [DeltaNet, GatedDeltaNet, KimiDeltaAttention]
OPTIONS = dict(hidden_size=12, num_heads=2, head_dim=4, implementation="scan")
X = jax.random.normal(jax.random.key(0), (2, 6, 12))
Y = jnp.roll(X, 1, axis=1)


class Residual(nnx.Module):
    """What a user would write."""

    def __init__(self, layer, *, rngs):
        self.norm = RMSNorm(12, rngs=rngs)
        self.mixer = layer(**OPTIONS, rngs=rngs)
        self.out = nnx.Linear(12, 12, rngs=rngs)

    def __call__(self, x):
        return self.out(x + self.mixer(self.norm(x)))


class LinenResidual(nn.Module):
    layer: type

    @nn.compact
    def __call__(self, x):
        mixer = nnx.bridge.to_linen(self.layer, **OPTIONS, name="mixer")
        return nn.Dense(12)(x + mixer(nn.RMSNorm()(x)))


def loss_of(y):
    return jnp.mean((y - Y) ** 2)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_plain_nnx_model_trains(layer):
    model = Residual(layer, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: loss_of(m(X)))(model)
        optimizer.update(model, grads)
        return loss

    before = model.mixer.q_proj.kernel[...].copy()
    losses = [step(model, optimizer) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    assert not jnp.array_equal(model.mixer.q_proj.kernel[...], before)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_linen_model_trains_and_sees_the_axis_names(layer):
    model = LinenResidual(layer)
    boxed = model.init(jax.random.key(0), X)
    spec = nn.get_partition_spec(boxed)["params"]["mixer"]["q_proj"]["kernel"]
    assert tuple(spec) == ("embed", "heads")
    params = nn.meta.unbox(boxed)["params"]
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: loss_of(model.apply({"params": p}, X)))(params)
        updates, state = optimizer.update(grads, state)
        return loss, optax.apply_updates(params, updates), state

    state, losses = optimizer.init(params), []
    for _ in range(3):
        loss, params, state = step(params, state)
        losses.append(loss)
    assert losses[2] < losses[1] < losses[0]
