"""Models under a mesh that the caller has set: their parameters' logical axes are no axes of that mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from deltajax.models import count_parameters, get_preset, load_weights, save_weights
from deltajax.models.huggingface import load_pretrained, save_pretrained
from tests.models.drawn import drawn_model, params_of

CONFIG = get_preset("tiny_gated_delta_net").replace(
    num_layers=1, hidden_size=16, num_heads=1, head_dim=8, head_v_dim=8, intermediate_size=24, vocab_size=12,
    implementation="scan",
)  # fmt: skip


@pytest.fixture
def under_a_mesh():
    with jax.set_mesh(jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)):
        yield


def test_a_model_is_counted_saved_and_loaded(under_a_mesh, tmp_path):
    model = drawn_model(CONFIG)
    params = params_of(model)
    assert count_parameters(CONFIG) == sum(x.size for x in jax.tree.leaves(params))
    save_weights(tmp_path / "m.safetensors", params, CONFIG)
    save_pretrained(model, tmp_path / "hf")
    for back in (load_weights(tmp_path / "m.safetensors"), load_pretrained(tmp_path / "hf")):
        jax.tree.map(np.testing.assert_array_equal, params_of(back), params)
