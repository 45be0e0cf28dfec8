"""The models against flash-linear-attention's own outputs, from its weights (see tests/data/README.md)."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltajax.models import LanguageModel, ModelConfig, generate

DATA = pathlib.Path(__file__).parents[1] / "data"
MODELS = {"fla_delta_net": "delta_net", "fla_gated_deltanet": "gated_delta_net", "fla_kda": "kda"}
# Rounding alone moves the golden logits by up to 3e-5.
TOLERANCE = dict(rtol=0, atol=1e-4)


def config_of(kind: str, c: dict) -> ModelConfig:
    head_dim = c.get("head_dim", c["hidden_size"] // c["num_heads"])
    return ModelConfig(
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        num_layers=c["num_hidden_layers"],
        layer_pattern=(kind,),
        num_heads=c["num_heads"],
        num_v_heads=c.get("num_v_heads"),
        head_dim=head_dim,
        head_v_dim=int(head_dim * c["expand_v"]),
        intermediate_size=c["intermediate_size"],
        norm_eps=c["norm_eps"],
    )


def layer_names(kind: str) -> dict[str, str]:
    """Parameter of a block, as deltajax names it, to its name in the reference."""
    names = {f"mixer.{n}_proj.kernel": f"attn.{n}_proj.weight" for n in "qkvbo"}
    names |= {f"mixer.{n}_conv": f"attn.{n}_conv1d.weight" for n in "qkv"}
    names |= {f"mlp.{n}_proj.kernel": f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    names |= {f"{n}_norm.scale": f"{n}_norm.weight" for n in ("attn", "mlp")}
    names["mixer.o_norm.scale"] = "attn.o_norm.weight"
    if kind != "delta_net":
        names |= {"mixer.A_log": "attn.A_log", "mixer.dt_bias": "attn.dt_bias"}
    if kind == "gated_delta_net":
        names |= {f"mixer.{n}_proj.kernel": f"attn.{n}_proj.weight" for n in "ag"}
    if kind == "kda":
        names |= {
            f"mixer.{n}_{x}_proj.kernel": f"attn.{n}_proj.{i}.weight"
            for n in "fg"
            for i, x in enumerate("ab")
        }
        names["mixer.g_b_proj.bias"] = "attn.g_proj.1.bias"
    return names


@functools.cache
def load(name: str):
    data = dict(np.load(DATA / f"{name}.npz"))
    kind = MODELS[name]
    config = config_of(kind, json.loads(str(data["config"])))
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    weights = {k.removeprefix("weights/"): v for k, v in data.items() if k.startswith("weights/")}
    whole = {
        "embedding": "model.embeddings.weight",
        "norm.scale": "model.norm.weight",
        "lm_head": "lm_head.weight",
    }
    state = nnx.state(model)
    for path, param in nnx.to_flat_state(state):
        key = ".".join(map(str, path))
        if key in whole:
            value = weights.pop(whole[key])
            value = value.T if key == "lm_head" else value
        else:  # groups.0.blocks.0.<name>, stacked over layers
            theirs = layer_names(kind)[key.removeprefix("groups.0.blocks.0.")]
            layers = [weights.pop(f"model.layers.{i}.{theirs}") for i in range(config.num_layers)]
            value = np.stack([w.T if key.endswith("kernel") else w for w in layers])
        param[...] = jnp.asarray(value).reshape(param.shape)
    assert not weights, f"not loaded: {sorted(weights)}"
    nnx.update(model, state)
    return model, data


@pytest.mark.parametrize("name", MODELS)
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
