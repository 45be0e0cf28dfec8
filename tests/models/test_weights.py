"""Weights as safetensors: written and read back, bit for bit, with names of single layers."""

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from deltajax.models import get_preset, load_weights, save_weights
from deltajax.models.weights import config_path
from tests.models.drawn import drawn_model, params_of

# A repeated unit of two kinds, then a run of one: two stacked groups.
CONFIG = get_preset("tiny_kda").replace(
    num_layers=7, layer_pattern=("kda", "delta_net") * 2 + ("full_attention",) * 3, hidden_size=32,
    num_heads=2, head_dim=16, intermediate_size=48, vocab_size=20, implementation="scan",
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return drawn_model(CONFIG)


def test_a_model_comes_back_bit_for_bit(model, tmp_path):
    path = tmp_path / "m.safetensors"
    others = [tmp_path / "m.safetensors.tmp", tmp_path / "m.json.tmp"]
    for other in others:
        other.write_text("another's")
    save_weights(path, params_of(model), CONFIG, step="12")
    assert [other.read_text() for other in others] == ["another's"] * 2
    for other in others:
        assert config_path(path).stat().st_mode == other.stat().st_mode
        other.unlink()
    back = load_weights(path)
    assert back.config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, params_of(back), params_of(model))
    tokens = jax.random.randint(jax.random.key(0), (1, 9), 0, 20)
    np.testing.assert_array_equal(back(tokens), model(tokens))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.json", "m.safetensors"]
    assert load_weights(path, remat="full").config == CONFIG.replace(remat="full")


def test_layers_with_and_without_experts_come_back(tmp_path):
    config = CONFIG.replace(
        num_layers=4, layer_pattern=("kda",), num_experts=3, expert_intermediate_size=8, num_shared_experts=1,
        router_bias=True, shared_expert_gate=True, num_dense_layers=1,
    )  # fmt: skip
    model, path = drawn_model(config), tmp_path / "m.safetensors"
    save_weights(path, params_of(model), config)
    jax.tree.map(np.testing.assert_array_equal, params_of(load_weights(path)), params_of(model))
    tensors = load_file(path)
    names = {name.removeprefix("layers.3.mlp.") for name in tensors if name.startswith("layers.3.mlp.")}
    assert {"router.kernel", "correction_bias", "experts.down_proj", "shared_gate.kernel"} < names
    assert tensors["layers.3.mlp.experts.down_proj"].shape == (3, 8, 32)
    assert "layers.0.mlp.down_proj.kernel" in tensors and "layers.0.mlp.router.kernel" not in tensors


def test_every_layer_has_its_own_names(model, tmp_path):
    path = tmp_path / "m.safetensors"
    save_weights(path, params_of(model), CONFIG, step="12")
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "deltajax", "step": "12"}
    tensors = load_file(path)
    assert sum(x.size for x in tensors.values()) == sum(x.size for x in jax.tree.leaves(params_of(model)))
    assert {name.split(".")[1] for name in tensors if name.startswith("layers")} == set("0123456")
    # Layer 3 is the second delta_net: the unit's second block, in its second repeat.
    kernel = params_of(model)["groups"][0]["blocks"][1]["mixer"]["q_proj"]["kernel"]
    assert kernel.shape[0] == 2
    np.testing.assert_array_equal(tensors["layers.3.mixer.q_proj.kernel"], kernel[1])
    assert "layers.2.mixer.A_log" in tensors and "layers.3.mixer.A_log" not in tensors


def test_files_that_do_not_fit_are_named(model, tmp_path):
    path = tmp_path / "m.safetensors"
    save_weights(path, params_of(model), CONFIG)
    good, text = load_file(path), config_path(path).read_text()
    name, header = "layers.5.mlp.up_proj.kernel", {"format": "deltajax"}
    save_file({k: v for k, v in good.items() if k != name}, path, header)
    with pytest.raises(ValueError, match=f"no parameter {name}"):
        load_weights(path)
    save_file(good | {name: good[name].T.copy()}, path, header)
    with pytest.raises(ValueError, match=rf"{name} has shape \(48, 32\), expected \(32, 48\)"):
        load_weights(path)
    save_file(good | {"layers.9.x": good[name]}, path, header)
    with pytest.raises(ValueError, match=r"layers\.9\.x is no parameter of"):
        load_weights(path)
    save_file(good, path)
    with pytest.raises(ValueError, match="not written by save_weights"):
        load_weights(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_weights(path)
    assert config_path(path).read_text() == text
