"""Configurations in Hugging Face's form: what their fields mean, and which are refused."""

import re

import pytest

from deltajax.models import get_preset
from deltajax.models.huggingface import from_hf, to_hf
from tests.models.huggingface_configs import CONFIGS

ATTENTION = dict(layers=[1], num_heads=2, window_size=4)


def test_olmo_rotates_unless_the_base_is_null():
    fields = to_hf(CONFIGS["olmo_hybrid"])
    assert from_hf(fields).rope_theta is None
    for rope in (None, {}, dict(rope_theta=10000.0)):
        given = dict(rope_type="default", **rope) if rope else rope
        assert from_hf(fields | dict(rope_parameters=given)).rope_theta == 10000.0
        nowhere = from_hf(fields | dict(rope_parameters=given, rope_theta=None)).rope_theta
        assert nowhere == (10000.0 if rope else None)
    short = {
        name: x for name, x in fields.items() if not name.startswith("linear_") and name != "layer_types"
    }
    config = from_hf(short | dict(num_attention_heads=4, num_key_value_heads=None, num_hidden_layers=3))
    assert (
        config.layers == ("gated_delta_net", "gated_delta_net", "full_attention")
        and config.attention_kv_heads == 4
    )
    assert (config.num_heads, config.head_dim, config.value_dim, config.allow_neg_eigval) == (4, 3, 6, True)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("kda", dict(model_type="llama"), "model_type='llama': expected one of delta_net"),
        ("kda", dict(hidden_act="gelu"), "hidden_act='gelu': expected 'silu' or 'swish'"),
        ("kda", dict(use_short_conv=False), "use_short_conv=False: expected True"),
        ("kda", dict(expand_v=0.3), "expand_v=0.3"),
        ("kda", dict(head_dim=512), "ModelConfig.head_dim=512: expected at most 256"),
        ("delta_net", dict(qk_norm="sum"), "qk_norm='sum': expected 'l2'"),
        ("gated_deltanet_h1", dict(attn=dict(layers=[9], num_heads=2)), "attn.layers=[9]"),
        ("gated_deltanet_h1", dict(attn=dict(layers=[1])), "no field attn.num_heads"),
        ("gated_deltanet_h1", dict(attn=[dict(layers=[1])]), "no field attn[0].num_heads"),
        ("gated_deltanet_h1", dict(attn="full"), "attn='full': expected an object, or a list of them"),
        ("gated_deltanet_h1", dict(attn=[ATTENTION, None]), "expected an object, or a list of them"),
        ("gated_deltanet_h1", dict(attn=[ATTENTION, ATTENTION]), "expected each layer once"),
        (
            "gated_deltanet_h1",
            dict(attn=[ATTENTION, ATTENTION | dict(layers=[2], num_heads=1)]),
            "same heads",
        ),
        (
            "gated_deltanet_h1",
            dict(attn=[ATTENTION, ATTENTION | dict(layers=[2], window_size=2)]),
            "window in",
        ),
        ("kimi_linear", dict(linear_attn_config=3), "linear_attn_config=3: expected an object"),
        ("kimi_linear", dict(mla_use_nope=False), "mla_use_nope=False: expected True"),
        ("kimi_linear", dict(num_expert_group=4), "num_expert_group=4: expected 1"),
        ("kimi_linear", dict(moe_router_activation_func="softmax"), "moe_router_activation_func='softmax'"),
        ("qwen3_next", dict(layer_types=["conv"] * 4), "layer_types=['conv',"),
        ("qwen3_next", dict(rope_scaling=dict(type="yarn")), "rope_scaling={'type': 'yarn'}: expected None"),
        ("qwen3_next", dict(rope_parameters=dict(type="yarn")), "rope_parameters.type='yarn'"),
        ("qwen3_next", dict(mlp_only_layers=[2]), "mlp_only_layers=[2]"),
        ("qwen3_next", dict(vocab_size=None), "no field vocab_size"),
        ("qwen3_5_text", dict(intermediate_size=None), "no field intermediate_size"),
        ("olmo_hybrid", dict(rope_parameters=dict(rope_type="yarn")), "rope_parameters.rope_type='yarn'"),
        ("olmo_hybrid", dict(rope_parameters=dict(type="linear")), "rope_parameters.type='linear'"),
        ("olmo_hybrid", dict(attention_bias=True), "attention_bias=True: expected False"),
    ],
)
def test_unsupported_configurations_are_named(name, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_hf(to_hf(CONFIGS[name]) | change)


def test_attention_layers_may_be_given_as_a_list():
    config = CONFIGS["gated_deltanet_h1"]
    fields = to_hf(config)
    assert from_hf(fields | dict(attn=[fields["attn"]])) == from_hf(fields)
    assert from_hf(fields | dict(attn=[])).layers == ("gated_delta_net",) * 4
    mixed = from_hf(fields | dict(attn=[ATTENTION, dict(layers=[3], num_heads=2, num_kv_heads=2)]))
    kinds = ("gated_delta_net", "sliding_window", "gated_delta_net", "full_attention")
    assert (mixed.layers, mixed.window_size, mixed.attention_kv_heads) == (kinds, 4, 2)


def test_versions_name_fields_differently():
    fields = to_hf(CONFIGS["kimi_linear"])
    for old, new in (("num_experts_per_token", "num_experts_per_tok"), ("moe_renormalize", "norm_topk_prob")):
        fields[new] = fields.pop(old)
    linear = fields.pop("linear_attn_config")
    fields |= dict(
        linear_num_heads=linear["num_heads"], linear_head_dim=linear["head_dim"],
        layer_types=["linear_attention"] * 3 + ["full_attention"], mlp_layer_types=["dense"] + ["sparse"] * 3,
        torch_dtype="float32", dtype=None,
    )  # fmt: skip
    assert from_hf(fields) == from_hf(to_hf(CONFIGS["kimi_linear"]))
    fields["n_routed_experts"] = fields.pop("num_experts")
    fields["n_shared_experts"] = fields.pop("num_shared_experts")
    fields["linear_num_key_heads"] = fields.pop("linear_num_heads")
    fields["linear_key_head_dim"] = fields.pop("linear_head_dim")
    fields["layer_types"] = ["kda_attention"] * 3 + ["full_attention"]
    assert from_hf(fields) == from_hf(to_hf(CONFIGS["kimi_linear"]))
    fields = to_hf(CONFIGS["qwen3_next"])
    rope = {name: fields.pop(name) for name in ("rope_theta", "partial_rotary_factor")}
    assert from_hf(fields | {"rope_parameters": rope}) == from_hf(to_hf(CONFIGS["qwen3_next"]))


@pytest.mark.parametrize(
    "preset",
    ["delta_net_1p3b", "delta_net_swa_1p3b", "delta_net_global_1p3b", "gated_delta_net_1p3b",
     "gated_delta_net_h1_1p3b", "kda_1p3b", "kda_hybrid_1p3b", "kimi_linear_48b_a3b", "qwen3_next_80b_a3b"],
)  # fmt: skip
def test_published_shapes_have_a_configuration(preset):
    config = get_preset(preset)
    back = from_hf(to_hf(config))
    assert back.layers == config.layers and back.blocks == config.blocks
    assert back.value_dim == config.value_dim and back.norm_eps == config.norm_eps


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("kda", dict(layer_pattern=("kda", "delta_net")), "layer_pattern"),
        ("kda", dict(kda_gate_bias=False), "kda_gate_bias=False"),
        ("kda", dict(zero_centered_norm=True), "zero_centered_norm=True"),
        ("kimi_linear", dict(rope_theta=10000.0), "rope_theta=10000.0"),
        ("kimi_linear", dict(router="softmax"), "router='softmax'"),
        ("qwen3_next", dict(allow_neg_eigval=True), "allow_neg_eigval=True"),
        ("qwen3_next", dict(num_experts=None, attn_qk_norm=False), "attn_qk_norm=False"),
        ("olmo_hybrid", dict(delta_norm_eps=None), "delta_norm_eps=1e-06"),
        ("olmo_hybrid", dict(attn_output_gate=True), "attn_output_gate=True"),
    ],
)
def test_models_without_that_form_are_not_saved(name, change, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        to_hf(CONFIGS[name].replace(**change))
