"""Biases follow the load of experts, and nothing else of a step sees it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from deltajax.layers import MixtureOfExperts
from deltajax.models import get_preset
from tests.train.next_token import loss_and_grads
from tests.train.test_train_step import packed_batch
from train.balance import balanced
from train.config import OptimizerConfig
from train.mesh import ShardingRules, make_mesh
from train.model_state import model_state
from train.optimizer import make_optimizer, make_schedule
from train.step import make_train_step

CONFIG = get_preset("tiny_kimi_linear").replace(
    num_layers=1, num_dense_layers=0, layer_pattern=("latent_attention",), hidden_size=32, num_heads=1,
    expert_intermediate_size=16, initializer_range=0.2,
)  # fmt: skip


def test_a_step_moves_biases_by_the_rate_and_counts_no_load_as_gradient():
    rules, batch = ShardingRules(), packed_batch()
    model = model_state(CONFIG, make_mesh(1, 1), rules)
    options = OptimizerConfig(warmup_steps=0, balance_rate=0.25, clip_norm=1e6)
    schedule = make_schedule(options, 10)
    optimizer = make_optimizer(options, schedule, model.logical_axes)
    state = model.init_train_state(optimizer, 0)
    gradients = jax.jit(lambda params: loss_and_grads(model.model, params, batch, 2, model.mesh, rules)[2])
    found = gradients(state.params)

    def bias_of(tree):
        return np.asarray(tree["groups"][0]["blocks"][0]["mlp"]["correction_bias"][0])

    load = bias_of(found)
    assert load.min() < 0 < load.max() and abs(load.sum()) < 1e-5
    shardings = jax.tree.map(lambda x: x.sharding, model.abstract_train_state(optimizer))
    step = make_train_step(
        model.model, optimizer, schedule, shardings, model.mesh, rules, 2, balance_rate=0.25
    )
    new, metrics = step(state, batch, jnp.ones((), bool))
    np.testing.assert_array_equal(bias_of(new.params), -0.25 * np.sign(load))
    others = [g for path, g in jax.tree.leaves_with_path(found) if path[-1].key != "correction_bias"]
    assert float(metrics.grad_norm) == pytest.approx(float(optax.tree.norm(others)), rel=1e-5)
    moments = jax.tree.leaves_with_path(new.opt_state)
    assert all((m == 0).all() for path, m in moments if "correction_bias" in jax.tree_util.keystr(path))


def test_biases_that_follow_the_load_even_it_out():
    layer = MixtureOfExperts(
        hidden_size=8, intermediate_size=4, num_experts=8, experts_per_token=2, router="sigmoid",
        correction_bias=True, initializer_range=0.5, rngs=nnx.Rngs(0),
    )  # fmt: skip
    graph, state = nnx.split(layer)
    x = jax.random.normal(jax.random.key(0), (4, 64, 8)) + 1  # a mean that favours some experts

    @jax.jit
    def update(params):
        grads = jax.grad(lambda p: jnp.sum(nnx.merge(graph, nnx.State(p))(x)))(params)
        return balanced(params, grads, 0.01)

    params = nnx.to_pure_dict(state)
    before = layer.load(x) * 8
    for _ in range(100):
        params = update(params)
    nnx.replace_by_pure_dict(state, params)
    after = nnx.merge(graph, state).load(x) * 8
    assert before.max() > 1.8 and before.min() < 0.3
    assert after.max() < 1.3 and after.min() > 0.7
