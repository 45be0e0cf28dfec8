"""The models against the references' own outputs, from their checkpoints (see tests/data/README.md)."""

import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from deltajax.models import generate
from deltajax.models.huggingface import load_pretrained

DATA = pathlib.Path(__file__).parents[1] / "data"
FLA = ("fla_delta_net", "fla_gated_deltanet", "fla_kda")
HF = ("hf_kimi_linear", "hf_qwen3_next", "hf_qwen3_5_text", "hf_olmo_hybrid")
MODELS = (*FLA, *(pytest.param(name, marks=pytest.mark.slow) for name in HF))  # these compile for long
# Rounding alone moves the golden logits by up to 3e-5.
TOLERANCE = dict(rtol=0, atol=1e-4)


@functools.cache
def load(name: str):
    data = dict(np.load(DATA / f"{name}.npz"))
    weights = {k.removeprefix("weights/"): v for k, v in data.items() if k.startswith("weights/")}
    with tempfile.TemporaryDirectory() as path:
        pathlib.Path(path, "config.json").write_text(str(data["config"]))
        save_file(weights, pathlib.Path(path, "model.safetensors"))
        return load_pretrained(path), data


@pytest.mark.parametrize("name", FLA + HF)
def test_logits_equal_the_reference(name):
    model, data = load(name)
    np.testing.assert_allclose(model(jnp.asarray(data["input_ids"])), data["logits"], **TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_the_reference(name):
    model, data = load(name)
    for prompt, tokens in (("input_ids", "gen_ids"), ("short_input_ids", "short_gen_ids")):
        got = generate(model, jnp.asarray(data[prompt]), max_new_tokens=8)
        np.testing.assert_array_equal(got, data[tokens])


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_left_padded_batch_equal_the_reference(name):
    model, data = load(name)
    real = data["padded_attention_mask"] != 0
    logits = jax.jit(lambda t, s: model(t, segment_ids=s))(
        jnp.asarray(data["padded_input_ids"]), jnp.asarray(real, jnp.int32)
    )
    np.testing.assert_allclose(np.asarray(logits)[real], data["padded_logits"][real], **TOLERANCE)
