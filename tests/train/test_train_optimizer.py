"""Schedules, the weight-decay mask, and where optimizer state lies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deltajax.models import get_preset
from train.config import OptimizerConfig
from train.mesh import ShardingRules, make_mesh
from train.model_state import model_state
from train.optimizer import decay_mask, make_optimizer, make_schedule, state_shardings

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


def test_decay_moves_only_masked_parameters():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    params = {"kernel": jnp.ones((2, 2)), "A_log": jnp.ones(2)}
    mask = decay_mask({"kernel": ("embed", "mlp"), "A_log": ("heads",)})
    optimizer = make_optimizer(config, optax.constant_schedule(0.1), mask)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert updates["kernel"] == pytest.approx(-0.05) and updates["A_log"] == pytest.approx(0.0)


def test_optimizer_state_lies_where_its_parameter_does():
    mesh = make_mesh(1, 1)
    params = {"kernel": jnp.ones((2, 2)), "norm": jnp.ones(2)}
    split, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    optimizer = make_optimizer(CONFIG, optax.constant_schedule(0.1), {"kernel": True, "norm": False})
    found = state_shardings(optimizer, params, {"kernel": split, "norm": whole}, whole)
    adam = optax.tree_utils.tree_get(found, "mu"), optax.tree_utils.tree_get(found, "nu")
    assert all(moments == {"kernel": split, "norm": whole} for moments in adam)
    assert jax.tree.structure(found) == jax.tree.structure(optimizer.init(params))
