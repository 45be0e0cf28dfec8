"""The configurations of `qwen3_next`, and of `qwen3_5_text`, which has dense MLPs."""

from typing import Any

from deltajax.models.config import ModelConfig
from deltajax.models.huggingface.fields import Fields, hybrid_fields, kinds_of, rotary, whole


def read(c: Fields, model_type: str) -> dict[str, Any]:
    """Our fields from theirs."""
    layers = c.need("num_hidden_layers")
    c.only("attention_bias", False)
    c.only("rope_scaling", None)
    rope = rotary(c)
    every = c.get("full_attention_interval", default=4)
    types = c.get("layer_types") or [
        "linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)
    ]
    fraction = c.get("partial_rotary_factor", default=0.25)
    mlp = (
        _read_experts(c)
        if model_type == "qwen3_next"
        else dict(intermediate_size=c.need("intermediate_size"))
    )
    return dict(
        layer_pattern=kinds_of(c, types, "gated_delta_net", "full_attention"),
        num_heads=c.need("linear_num_key_heads"),
        num_v_heads=c.need("linear_num_value_heads"),
        head_dim=c.need("linear_key_head_dim"),
        head_v_dim=c.need("linear_value_head_dim"),
        conv_size=c.get("linear_conv_kernel_dim", default=4),
        attn_num_heads=c.need("num_attention_heads"),
        attn_num_kv_heads=c.need("num_key_value_heads"),
        attn_head_dim=c.need("head_dim"),
        attn_rope_fraction=rope.get("partial_rotary_factor", default=fraction),
        attn_qk_norm=True,
        attn_output_gate=True,
        rope_theta=float(rope.get("rope_theta", default=c.get("rope_theta", default=10000.0))),
        zero_centered_norm=True,
        norm_eps=c.get("rms_norm_eps", default=1e-6),
        **mlp,
    )


def _read_experts(c: Fields) -> dict[str, Any]:
    c.only("decoder_sparse_step", 1)
    width, shared = c.need("moe_intermediate_size"), c.need("shared_expert_intermediate_size")
    dense = sorted(c.get("mlp_only_layers", default=[]))
    if dense != list(range(len(dense))):
        c.fail("mlp_only_layers", dense, "the first layers, or none")
    return dict(
        intermediate_size=c.get("intermediate_size", default=width),
        num_experts=c.need("num_experts"),
        experts_per_token=c.need("num_experts_per_tok"),
        expert_intermediate_size=width,
        num_shared_experts=whole(c, "shared_expert_intermediate_size", shared / width),
        shared_expert_gate=True,
        router_renormalize=c.get("norm_topk_prob", default=True),
        num_dense_layers=len(dense),
    )


def write(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """Their fields from ours."""
    experts = model_type == "qwen3_next"
    return dict(
        architectures=["Qwen3NextForCausalLM" if experts else "Qwen3_5ForCausalLM"],
        **hybrid_fields(config),
        head_dim=config.attention_head_dim,
        **(_write_experts(config) if experts else _write_rotary(config)),
    )


def _write_rotary(config: ModelConfig) -> dict[str, Any]:
    fields = dict(
        rope_type="default", rope_theta=config.rope_theta, partial_rotary_factor=config.attn_rope_fraction
    )
    return dict(rope_parameters=fields)


def _write_experts(config: ModelConfig) -> dict[str, Any]:
    width = config.expert_intermediate_size or 0
    return dict(
        partial_rotary_factor=config.attn_rope_fraction,
        rope_theta=config.rope_theta,
        num_experts=config.num_experts,
        num_experts_per_tok=config.experts_per_token,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=width * config.num_shared_experts,
        norm_topk_prob=config.router_renormalize,
        decoder_sparse_step=1,
        mlp_only_layers=list(range(config.num_dense_layers)),
    )
