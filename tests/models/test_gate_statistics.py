"""Statistics of the gates, beside those of layers that are run one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltajax.models import LanguageModel, gate_statistics, get_preset
from deltajax.ops import gates

CONFIG = get_preset("tiny_kda").replace(
    num_layers=5, layer_pattern=("gated_delta_net", "kda") * 2 + ("full_attention",), hidden_size=32,
    num_heads=2, head_dim=16, intermediate_size=48, vocab_size=20, implementation="scan",
    allow_neg_eigval=True,
)  # fmt: skip


@pytest.mark.parametrize("changes", [dict(), dict(lower_bound=-5.0, remat="full")], ids=str)
def test_statistics_are_those_of_every_layer_without_padding(changes):
    model = LanguageModel(CONFIG.replace(**changes), rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 20)
    segment_ids = jnp.array([[1] * 12, [1] * 4 + [2] * 3 + [0] * 5], jnp.int32)
    found = jax.jit(lambda model: gate_statistics(model, tokens, segment_ids))(model)
    # Every layer alone, in order, its gates written out.
    blocks = [block for repeat in range(2) for block in model.groups[0].layer(repeat)]
    blocks += list(model.groups[1].layer(0))
    x, real, expected = model.embedding[...][tokens], np.asarray(segment_ids) > 0, {}
    for layer, block in enumerate(blocks):
        if layer < 4:
            mixer, y = block.mixer, block.attn_norm(x)
            beta = np.asarray(2 * jax.nn.sigmoid(mixer.b_proj(y)))[real]
            raw = mixer._decay(y)[0]
            decay = gates.activate(
                raw,
                mixer.A_log[...],
                mixer.dt_bias[...],
                getattr(mixer, "lower_bound", None),
                per_channel=raw.ndim == 4,
            )
            for name, values in (("beta", beta), ("log_decay", np.asarray(decay)[real])):
                for what in ("mean", "min", "max"):
                    expected[f"{layer}/{name}_{what}"] = getattr(np, what)(values)
        x, _ = block(x, segment_ids=segment_ids, cache=None)
    assert found.keys() == expected.keys()  # attention has no gates
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, err_msg=name)


def test_layers_with_experts_tell_how_unevenly_they_are_used():
    config = CONFIG.replace(
        num_layers=3, layer_pattern=("delta_net",), num_dense_layers=1, num_experts=4, experts_per_token=2,
        expert_intermediate_size=8, initializer_range=0.3,
    )  # fmt: skip
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, 20)
    ids = jnp.array([[1] * 6, [1] * 4 + [0] * 2], jnp.int32)
    found = jax.jit(lambda model: gate_statistics(model, tokens, ids))(model)
    x = model.embedding[...][tokens]
    x, _ = model.groups[0].layer(0)[0](x, segment_ids=ids, cache=None)
    for repeat in range(2):
        (block,) = model.groups[1].layer(repeat)
        x, _ = block.mix(x, segment_ids=ids, cache=None)
        choice = np.asarray(block.mlp.route(block.mlp_norm(x))[0])[np.asarray(ids) > 0]
        share = np.bincount(choice.ravel(), minlength=4) / choice.size
        got = [found[f"{repeat + 1}/expert_load_{name}"] for name in ("min", "max")]
        np.testing.assert_allclose(got, [4 * share.min(), 4 * share.max()], rtol=1e-6)
        x = block.feed(x, segment_ids=ids)
    assert not [name for name in found if name.startswith("0/expert")]


def test_layers_without_decay_have_none():
    config = CONFIG.replace(num_layers=1, layer_pattern=("delta_net",), allow_neg_eigval=False)
    ones = jnp.ones((1, 3), jnp.int32)
    found = gate_statistics(LanguageModel(config, rngs=nnx.Rngs(0)), ones, ones)
    assert set(found) == {"0/beta_mean", "0/beta_min", "0/beta_max"}
    assert 0 < found["0/beta_min"] <= found["0/beta_mean"] <= found["0/beta_max"] < 1
