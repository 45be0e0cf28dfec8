import json

import pytest

from deltajax.models import PRESETS, ModelConfig, get_preset, kda_mla_pattern

BASE = get_preset("tiny_hybrid")


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip_is_exact(name):
    config = get_preset(name)
    assert ModelConfig.from_json(config.to_json()) == config


def test_the_pattern_repeats_to_the_number_of_layers():
    config = BASE.replace(num_layers=7, layer_pattern=["kda", "full_attention", "kda"])
    assert config.layers == ("kda", "full_attention", "kda") * 2 + ("kda",)
    assert config.layer_pattern == ("kda", "full_attention", "kda")
    hash(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vocab_size=0), r"vocab_size=0: expected a positive integer"),
        (dict(num_layers=2.0), r"num_layers=2.0: expected a positive integer"),
        (dict(num_layers=True), r"num_layers=True: expected a positive integer"),
        (dict(chunk_size=-1), r"chunk_size=-1: expected a positive integer or None"),
        (dict(chunk_size=48), r"chunk_size=48: expected a power of two >= 16, or None"),
        (dict(chunk_size=8), r"chunk_size=8: expected a power of two >= 16, or None"),
        (dict(head_dim=300), r"head_dim=300: expected at most 256"),
        (dict(head_v_dim=600), r"head_v_dim=600: expected at most 512"),
        (dict(conv_size=1), r"conv_size=1: expected at least 2"),
        (dict(layer_pattern="kda"), r"layer_pattern='kda': expected a non-empty tuple"),
        (dict(layer_pattern=()), r"layer_pattern=\(\): expected a non-empty tuple"),
        (dict(layer_pattern=("kda", "mamba")), r"layer_pattern=.*not 'mamba'"),
        (dict(num_layers=3), r"layer_pattern=.*at most num_layers=3"),
        (dict(num_v_heads=3), r"num_v_heads=3: expected a multiple of num_heads=2"),
        (dict(attn_num_kv_heads=3), r"attn_num_kv_heads=3: expected a divisor of the 4"),
        (dict(hidden_size=130), r"hidden_size=130: expected a multiple of the 4 attention heads"),
        (dict(attn_head_dim=7), r"attn_head_dim=7: expected an even size"),
        (dict(kv_lora_rank=0), r"kv_lora_rank=0: expected a positive integer"),
        (dict(q_lora_rank=0), r"q_lora_rank=0: expected a positive integer or None"),
        (dict(latent_v_head_dim=None), r"latent_v_head_dim=None: expected a positive integer"),
        (
            dict(layer_pattern=("latent_attention",), qk_rope_head_dim=3),
            r"qk_rope_head_dim=3: expected an even",
        ),
        (dict(layer_pattern=("latent_attention",), rope_theta=0.0), r"rope_theta=0.0: expected a positive"),
        (dict(attn_rope_fraction=0.3), r"attn_rope_fraction=0.3: expected a share of the 32 channels"),
        (dict(num_experts=4), r"expert_intermediate_size=None: expected a positive integer, with num_exp"),
        (
            dict(num_experts=4, expert_intermediate_size=8, experts_per_token=5),
            r"experts_per_token=5: expected at most num_experts=4",
        ),
        (dict(num_shared_experts=-1), r"num_shared_experts=-1: expected a whole number"),
        (dict(shared_expert_gate=True), r"num_shared_experts=0: expected at least 1, with shared_expert"),
        (dict(num_dense_layers=5), r"num_dense_layers=5: expected at most num_layers=4"),
        (dict(router="tanh"), r"router='tanh': expected one of"),
        (dict(router_scale=0.0), r"router_scale=0.0: expected a positive number"),
        (dict(rope_theta=0.0), r"rope_theta=0.0: expected a positive number or None"),
        (dict(lower_bound=5.0), r"lower_bound=5.0: expected a negative number or None"),
        (dict(norm_eps=0.0), r"norm_eps=0.0: expected a positive number"),
        (dict(initializer_range=-1.0), r"initializer_range=-1.0: expected a positive number"),
        (dict(dtype="int8"), r"dtype='int8': expected one of"),
        (dict(param_dtype="f32"), r"param_dtype='f32': expected one of"),
        (dict(remat="some"), r"remat='some': expected one of"),
        (dict(implementation="triton"), r"implementation='triton': expected one of"),
        (dict(attention_implementation="flash"), r"attention_implementation='flash': expected one of"),
        (dict(expert_implementation="xla"), r"expert_implementation='xla': expected one of"),
    ],
)
def test_an_invalid_field_is_named_with_what_was_seen_and_expected(changes, message):
    with pytest.raises(ValueError, match="ModelConfig." + message):
        BASE.replace(**changes)


def test_the_limits_of_the_delta_rule_bind_only_patterns_with_its_layers():
    BASE.replace(head_dim=256, head_v_dim=512, chunk_size=16)
    BASE.replace(head_dim=300, head_v_dim=600, layer_pattern=("full_attention",))


def test_the_sizes_of_an_attention_bind_only_patterns_with_its_layers():
    BASE.replace(qk_rope_head_dim=3)
    BASE.replace(layer_pattern=("latent_attention",), hidden_size=130)  # no multiple of the heads
    BASE.replace(layer_pattern=("latent_attention",), qk_rope_head_dim=3, rope_theta=None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected a JSON object"),
        (json.dumps(json.loads(BASE.to_json()) | {"depth": 3}), r"unknown ModelConfig fields \['depth'\]"),
        (json.dumps({"vocab_size": 3}), r"missing ModelConfig fields \['head_dim'"),
    ],
)
def test_json_that_is_no_configuration_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_json(text)


def test_latent_attention_stands_at_every_fourth_layer_and_the_last():
    config = get_preset("kimi_linear_48b_a3b")
    layers = [i for i, kind in enumerate(config.layers, 1) if kind == "latent_attention"]
    assert layers == [4, 8, 12, 16, 20, 24, 27]
    assert [kind.mlp for kind in config.blocks] == ["dense"] + ["experts"] * 26
    assert kda_mla_pattern(3, 0) == ("latent_attention",) * 3
    assert kda_mla_pattern(5, 1) == ("kda", "latent_attention") * 2 + ("latent_attention",)
    assert kda_mla_pattern(2, 7) == ("kda", "latent_attention")
    with pytest.raises(ValueError, match="kda_per_mla=-1: expected a whole number"):
        kda_mla_pattern(4, -1)


def test_presets_are_found_with_dashes_and_an_unknown_one_lists_the_names():
    assert get_preset("tiny-kda") is PRESETS["tiny_kda"]
    with pytest.raises(ValueError, match=r"unknown preset 'kda-7b'.*tiny_delta_net.*kda_1p3b"):
        get_preset("kda-7b")
