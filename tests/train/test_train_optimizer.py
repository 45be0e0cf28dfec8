"""Schedules, the weight-decay mask, and where optimizer state lies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

from deltajax.models import get_preset
from train.config import OptimizerConfig
from train.mesh import ShardingRules, make_mesh
from train.model_state import model_state
from train.optimizer import (
    decay_mask,
    make_optimizer,
    make_schedule,
    muon_dimensions,
    state_shardings,
)

CONFIG = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1, decay_fraction=0.25)


def rates(schedule, steps):
    return np.array([float(schedule(i)) for i in range(steps + 1)])


def test_cosine_rises_to_the_peak_and_falls_to_the_final_fraction():
    lr = rates(make_schedule(CONFIG, 100), 100)
    assert lr[0] > 0 and np.all(np.diff(lr[:11]) > 0) and lr[10] == pytest.approx(1.0)
    assert np.all(np.diff(lr[10:]) < 0) and lr[100] == pytest.approx(0.1)
    assert lr[55] == pytest.approx(0.55)  # half way down


def test_wsd_holds_the_peak_and_then_decays_linearly():
    lr = rates(make_schedule(OptimizerConfig(**{**vars(CONFIG), "schedule": "wsd"}), 100), 100)
    assert np.all(np.diff(lr[:11]) > 0)
    assert lr[10:76] == pytest.approx(1.0)
    assert np.diff(lr[75:]) == pytest.approx(-0.9 / 25, rel=1e-4) and lr[100] == pytest.approx(0.1)


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_runs_shorter_than_the_warm_up_still_have_a_rate(kind, steps):
    lr = rates(make_schedule(OptimizerConfig(**{**vars(CONFIG), "schedule": kind}), steps), steps)
    assert np.all(lr[:steps] > 0) and np.all(lr <= 1.0)


@pytest.mark.parametrize("preset", ["tiny_delta_net", "tiny_gated_delta_net", "tiny_kda", "tiny_hybrid"])
def test_weight_decay_covers_matrices_and_embeddings_only(preset):
    model = model_state(get_preset(preset), make_mesh(1, 1), ShardingRules())
    flat = jax.tree_util.tree_leaves_with_path(decay_mask(model.logical_axes))
    mask = {jax.tree_util.keystr(path): decayed for path, decayed in flat}
    shapes = {
        jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(model.abstract)
    }
    assert mask.keys() == shapes.keys()
    for name, decayed in mask.items():
        small = any(part in name for part in ("A_log", "dt_bias", "bias", "conv", "norm", "scale"))
        assert decayed == (not small), name
    assert sum(np.prod(shapes[n]) for n, d in mask.items() if d) > 0.95 * model.num_parameters


def test_embeddings_are_spared_by_option():
    axes = model_state(get_preset("tiny_kda"), make_mesh(1, 1), ShardingRules()).logical_axes
    changed = jax.tree.map(lambda a, b: a != b, decay_mask(axes), decay_mask(axes, embeddings=False))
    assert [jax.tree_util.keystr(p) for p, x in jax.tree.leaves_with_path(changed) if x] == ["['embedding']"]


@pytest.mark.parametrize("preset", ["tiny_delta_net", "tiny_gated_delta_net", "tiny_kda", "tiny_hybrid"])
def test_muon_takes_the_blocks_projections_as_one_matrix_a_layer(preset):
    model = model_state(get_preset(preset), make_mesh(1, 1), ShardingRules())
    numbers = muon_dimensions(model.logical_axes)
    leaf = lambda x: x is None or isinstance(x, MuonDimensionNumbers)  # noqa: E731
    found = {jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(numbers, is_leaf=leaf)}
    for path, x in jax.tree.leaves_with_path(model.abstract):
        name = jax.tree_util.keystr(path)
        if "_proj']['kernel']" in name:
            layers, _, _ = x.shape
            assert found[name] == MuonDimensionNumbers(reduction_axis=1, output_axis=2), name
            assert layers == 4 or preset == "tiny_hybrid"
        else:
            assert found[name] is None, name


def a_model(seed=0):
    """Parameters and gradients: two stacked layers of a projection, its relatives, and a table."""
    rng = np.random.default_rng(seed)
    shapes = {
        "embedding": (40, 8),
        "groups": {
            "q_proj": {"kernel": (2, 8, 6)},
            "A_log": (2, 3),
            "dt_bias": (2, 3, 4),
            "k_conv": (2, 6, 4),
        },
        "norm": {"scale": (8,)},
    }
    axes = {
        "embedding": ("vocab", "embed"),
        "groups": {
            "q_proj": {"kernel": ("layers", "embed", "heads")},
            "A_log": ("layers", "heads"),
            "dt_bias": ("layers", "heads", "head_dim"),
            "k_conv": ("layers", "heads", "conv"),
        },
        "norm": {"scale": ("embed",)},
    }
    drawn = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    return drawn, axes


def test_muon_orthogonalises_every_layer_by_itself():
    grads, axes = a_model()
    config = OptimizerConfig(name="muon", weight_decay=0.0, clip_norm=1e9)
    optimizer = make_optimizer(config, optax.constant_schedule(1.0), axes)
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
    kernel = updates["groups"]["q_proj"]["kernel"]
    scale = 0.2 * np.sqrt(8)  # 0.2 sqrt(max(in, out))
    for layer, gradient in zip(kernel, grads["groups"]["q_proj"]["kernel"], strict=True):
        singular = np.linalg.svd(layer / scale, compute_uv=False)
        assert np.all((singular > 0.5) & (singular < 1.5))  # five Newton-Schulz steps come that close
        assert jnp.vdot(layer, gradient) < 0
        u, _, v = np.linalg.svd(gradient, full_matrices=False)
        assert np.vdot(-layer / scale, u @ v) > 0.8 * 6  # near its own polar factor
    # Everything else moves as (Nesterov) Adam's first step does: all alike, against the gradient's sign.
    for name in ("A_log", "dt_bias", "k_conv"):
        steps = -updates["groups"][name] * jnp.sign(grads["groups"][name])
        np.testing.assert_allclose(steps, steps.ravel()[0], rtol=1e-4)
        assert 1 <= steps.ravel()[0] < 1.5


NAMES = ("adamw", "muon", "adafactor")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("embeddings", [True, False])
def test_decay_moves_only_masked_parameters_by_rate_and_decay(name, embeddings):
    params, axes = a_model()
    config = OptimizerConfig(name=name, weight_decay=0.5, decay_embeddings=embeddings)
    optimizer = make_optimizer(config, optax.constant_schedule(0.1), axes)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    decayed = {"['groups']['q_proj']['kernel']"} | ({"['embedding']"} if embeddings else set())
    for (path, update), param in zip(
        jax.tree.leaves_with_path(updates), jax.tree.leaves(params), strict=True
    ):
        share = -0.05 if jax.tree_util.keystr(path) in decayed else 0.0
        np.testing.assert_allclose(update, share * param, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_the_rate_scales_the_whole_update_and_follows_the_schedule(name):
    grads, axes = a_model()
    rates = (0.1, 0.3, 0.02)
    scheduled, unit = (
        make_optimizer(OptimizerConfig(name=name), schedule, axes)
        for schedule in (lambda count: jnp.asarray(rates)[count], optax.constant_schedule(1.0))
    )
    state, unit_state = scheduled.init(grads), unit.init(grads)
    for rate in rates:
        got, state = scheduled.update(grads, state, grads)
        one, unit_state = unit.update(grads, unit_state, grads)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(x, rate * y, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_first_moments_may_be_bfloat16(name):
    params, axes = a_model()
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        optimizer = make_optimizer(
            OptimizerConfig(name=name, moment_dtype=dtype), optax.constant_schedule(0.1), axes
        )
        state = optimizer.init(params)
        _, state = optimizer.update(params, state, params)  # and stay so
        leaves = [x for x in jax.tree.leaves(state) if x.size > 3]
        sizes[dtype] = sum(x.nbytes for x in leaves)
        assert {x.dtype.name for x in leaves} == {"float32", dtype}
    numbers = sum(x.size for x in jax.tree.leaves(params))
    assert sizes["float32"] - sizes["bfloat16"] == 2 * numbers


def test_adafactor_keeps_sums_over_rows_and_columns_and_no_first_moment_at_zero():
    params = {"kernel": jnp.ones((2, 256, 384))}
    axes = {"kernel": ("layers", "embed", "mlp")}
    optimizer = make_optimizer(OptimizerConfig(name="adafactor", b1=0.0), optax.constant_schedule(0.1), axes)
    shapes = {x.shape for x in jax.tree.leaves(optimizer.init(params))}
    assert shapes == {(), (1,), (2, 256), (2, 384)}


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_state_lies_where_its_parameter_does(name):
    mesh = make_mesh(1, 1)
    split, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    params, axes = a_model()
    params["groups"]["q_proj"]["kernel"] = jnp.ones((2, 256, 384))
    optimizer = make_optimizer(OptimizerConfig(name=name), optax.constant_schedule(0.1), axes)
    found = state_shardings(optimizer, params, jax.tree.map(lambda _: split, params), whole)
    assert jax.tree.structure(found) == jax.tree.structure(optimizer.init(params))
    shapes = {x.shape for x in jax.tree.leaves(params)}
    state = jax.tree.leaves_with_path(optimizer.init(params))
    for (path, x), sharding in zip(state, jax.tree.leaves(found), strict=True):
        assert sharding == (split if x.shape in shapes else whole), jax.tree_util.keystr(path)
    moments = sum(x.size for (_, x), s in zip(state, jax.tree.leaves(found), strict=True) if s == split)
    assert moments >= sum(x.size for x in jax.tree.leaves(params))
