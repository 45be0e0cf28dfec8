"""One training step: what it computes, and that how it is computed does not matter."""

import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from deltajax.models import LanguageModel, get_preset
from tests.train.next_token import loss_and_grads
from train.config import OptimizerConfig
from train.mesh import ShardingRules, make_mesh
from train.model_state import model_state
from train.objective import batch_loss_sum
from train.optimizer import make_optimizer
from train.step import make_train_step

# The module, behind the function of the same name.
linear_cross_entropy = sys.modules["deltajax.layers.linear_cross_entropy"]

# Sums of a few hundred float32 terms, taken in another order.
ROUNDING = 2e-5
# As an error of the largest gradient, or of one.
ACCUMULATION = 1e-6

# The scan is the quickest of the backends to compile.
CONFIG = get_preset("tiny_delta_net").replace(
    num_layers=1, hidden_size=32, num_heads=1, head_dim=16, intermediate_size=48, implementation="scan"
)
RULES = ShardingRules()


@pytest.fixture(scope="module")
def model():
    return model_state(CONFIG, make_mesh(1, 1), RULES)


@pytest.fixture(scope="module")
def params(model):
    return model.init(0)


def packed_batch(rows=4, length=32, seed=0):
    """Rows of two documents and padding, of very different lengths."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((rows, length), np.int32)
    for row, end in enumerate(rng.integers(3, length, size=rows)):
        segments[row, :end] = 1
        segments[row, end // 2 : end] = 2
    tokens, targets = rng.integers(0, 257, size=(2, rows, length)).astype(np.int32)
    arrays = {"tokens": tokens, "targets": targets, "segment_ids": segments}
    return {name: jnp.asarray(x) for name, x in arrays.items()}


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=ROUNDING, atol=ROUNDING * float(jnp.abs(y).max()))


def test_loss_is_the_masked_mean_cross_entropy(model, params):
    batch = packed_batch()
    loss, count, _ = loss_and_grads(model.model, params, batch, 1, model.mesh, RULES)
    logits = model.model(params)(batch["tokens"], segment_ids=batch["segment_ids"])
    log_p = jax.nn.log_softmax(logits)
    picked = np.take_along_axis(np.asarray(log_p), np.asarray(batch["targets"])[..., None], -1)[..., 0]
    mask = np.asarray(batch["segment_ids"]) > 0
    assert int(count) == mask.sum()
    assert float(loss) == pytest.approx(-picked[mask].mean(), rel=1e-5)


def test_masked_targets_have_no_say(model, params):
    batch = packed_batch()
    padding = batch["segment_ids"] == 0
    other = batch | {"targets": jnp.where(padding, 0, batch["targets"])}
    losses = [batch_loss_sum(model.model(params), b)[0] for b in (batch, other)]
    assert losses[0] == losses[1]


def test_z_loss_adds_the_mean_squared_log_normaliser(model, params):
    batch, weight = packed_batch(), 0.5
    with_z, without = (
        loss_and_grads(model.model, params, batch, 1, model.mesh, RULES, z)[0] for z in (weight, 0.0)
    )
    lse = jax.nn.logsumexp(model.model(params)(batch["tokens"], segment_ids=batch["segment_ids"]), axis=-1)
    expected = weight * jnp.mean(jnp.square(lse), where=batch["segment_ids"] > 0)
    assert float(with_z - without) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_full_batch(model, params, parts):
    batch = packed_batch()
    full = jax.jit(lambda p: loss_and_grads(model.model, p, batch, 1, model.mesh, RULES))(params)
    cut = jax.jit(lambda p: loss_and_grads(model.model, p, batch, parts, model.mesh, RULES))(params)
    for x, y in zip(jax.tree.leaves(cut), jax.tree.leaves(full), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=ACCUMULATION * max(1.0, float(jnp.abs(y).max())))


def test_gradients_of_a_bfloat16_model_accumulate_in_float32():
    """Eight equal micro-batches sum to eight times one: bfloat16 sums of gradients would not."""
    rounded = model_state(CONFIG.replace(dtype="bfloat16"), make_mesh(1, 1), RULES)
    params, one = rounded.init(0), packed_batch(rows=2)
    eight = jax.tree.map(lambda x: jnp.repeat(x, 8, axis=0), one)
    grads = [
        jax.jit(lambda p, b=b, n=n: loss_and_grads(rounded.model, p, b, n, rounded.mesh, RULES)[2])(params)
        for b, n in ((one, 1), (eight, 8))
    ]
    for x, y in zip(*map(jax.tree.leaves, grads), strict=True):
        assert x.dtype == y.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=ACCUMULATION * float(jnp.abs(y).max()))


@pytest.mark.parametrize("parts", [1, 2])
def test_the_state_is_donated_whole(model, parts):
    optimizer = make_optimizer(OptimizerConfig(), optax.constant_schedule(1e-2), model.logical_axes)
    state = model.abstract_train_state(optimizer)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(
        model.model, optimizer, optax.constant_schedule(1e-2), shardings, model.mesh, RULES, parts
    )
    memory = step.lower(state, packed_batch(), jnp.bool_(True)).compile().memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes == size
    # What is left of the outputs are the step's numbers (and their padding, in some tens of bytes).
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1024


def test_no_step_holds_the_logits_of_all_tokens(model, params, monkeypatch):
    batch, vocab = packed_batch(), CONFIG.vocab_size
    monkeypatch.setattr(linear_cross_entropy, "MAX_LOGITS", 16 * vocab)

    def step(p):
        return loss_and_grads(model.model, p, batch, 1, model.mesh, RULES)[2]

    text = jax.jit(step).lower(params).compile().as_text()
    rows = {math.prod(map(int, n.split(","))) for n in re.findall(rf"\[([\d,]+),{vocab}\]", text)}
    assert 16 in rows and max(rows) < batch["tokens"].size


def test_parameters_match_the_module_they_came_from(model, params):
    direct = nnx.to_pure_dict(nnx.state(LanguageModel(CONFIG, rngs=nnx.Rngs(0)), nnx.Param))
    close(params, direct)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))


def test_step_trains_and_a_bad_batch_stops_it_untouched(model):
    optimizer = make_optimizer(OptimizerConfig(), optax.constant_schedule(1e-2), model.logical_axes)
    shardings = jax.tree.map(lambda x: x.sharding, model.abstract_train_state(optimizer))
    step = make_train_step(
        model.model, optimizer, optax.constant_schedule(1e-2), shardings, model.mesh, RULES
    )
    state, ok, batch = model.init_train_state(optimizer, 0), jnp.ones((), bool), packed_batch()
    reported = []
    for _ in range(5):
        state, metrics = step(state, batch, ok)
        reported.append(float(metrics.loss))
    assert np.all(np.diff(reported) < 0) and bool(metrics.ok) and int(state.step) == 5
    assert float(metrics.learning_rate) == pytest.approx(1e-2)

    poisoned = state._replace(params=jax.tree.map(lambda x: x.at[..., 0].set(jnp.nan), state.params))
    before = jax.tree.map(np.array, poisoned)
    after, metrics = step(poisoned, batch, ok)
    assert not bool(metrics.ok) and not np.isfinite(float(metrics.loss))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, after), before)
    # The flag sticks: the next step, finite or not, changes nothing either.
    again, metrics = step(model.init_train_state(optimizer, 0), batch, metrics.ok)
    assert int(again.step) == 0 and not bool(metrics.ok)
