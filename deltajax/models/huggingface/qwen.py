"""The configurations of `qwen3_next`."""

from typing import Any

from deltajax.models.config import ModelConfig
from deltajax.models.huggingface.fields import Fields, kinds_of, whole


def read(c: Fields, model_type: str) -> dict[str, Any]:
    """Our fields from theirs."""
    layers = c.need("num_hidden_layers")
    c.only("attention_bias", False)
    c.only("decoder_sparse_step", 1)
    c.only("rope_scaling", None)
    rope = Fields(c.get("rope_parameters", default={}), "rope_parameters.")
    rope.only("rope_type", "default")
    every = c.get("full_attention_interval", default=4)
    types = c.get("layer_types") or [
        "linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)
    ]
    width, shared = c.need("moe_intermediate_size"), c.need("shared_expert_intermediate_size")
    fraction = c.get("partial_rotary_factor", default=0.25)
    dense = sorted(c.get("mlp_only_layers", default=[]))
    if dense != list(range(len(dense))):
        c.fail("mlp_only_layers", dense, "the first layers, or none")
    return dict(
        layer_pattern=kinds_of(c, types, "gated_delta_net", "full_attention"),
        num_heads=c.need("linear_num_key_heads"),
        num_v_heads=c.need("linear_num_value_heads"),
        head_dim=c.need("linear_key_head_dim"),
        head_v_dim=c.need("linear_value_head_dim"),
        conv_size=c.get("linear_conv_kernel_dim", default=4),
        intermediate_size=c.get("intermediate_size", default=width),
        attn_num_heads=c.need("num_attention_heads"),
        attn_num_kv_heads=c.need("num_key_value_heads"),
        attn_head_dim=c.need("head_dim"),
        attn_rope_fraction=rope.get("partial_rotary_factor", default=fraction),
        attn_qk_norm=True,
        attn_output_gate=True,
        rope_theta=float(rope.get("rope_theta", default=c.get("rope_theta", default=10000.0))),
        num_experts=c.need("num_experts"),
        experts_per_token=c.need("num_experts_per_tok"),
        expert_intermediate_size=width,
        num_shared_experts=whole(c, "shared_expert_intermediate_size", shared / width),
        shared_expert_gate=True,
        router_renormalize=c.get("norm_topk_prob", default=True),
        num_dense_layers=len(dense),
        zero_centered_norm=True,
        norm_eps=c.get("rms_norm_eps", default=1e-6),
    )


def write(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """Their fields from ours."""
    names = {"gated_delta_net": "linear_attention", "full_attention": "full_attention"}
    width = config.expert_intermediate_size or 0
    if config.num_experts is None:
        raise ValueError(f"ModelConfig.num_experts={config.num_experts}: a qwen3_next model has experts")
    return dict(
        architectures=["Qwen3NextForCausalLM"],
        hidden_act="silu",
        layer_types=[names[kind] for kind in config.layers],
        linear_num_key_heads=config.num_heads,
        linear_num_value_heads=config.value_heads,
        linear_key_head_dim=config.head_dim,
        linear_value_head_dim=config.value_dim,
        linear_conv_kernel_dim=config.conv_size,
        num_attention_heads=config.attention_heads,
        num_key_value_heads=config.attention_kv_heads,
        head_dim=config.attention_head_dim,
        partial_rotary_factor=config.attn_rope_fraction,
        rope_theta=config.rope_theta,
        attention_bias=False,
        num_experts=config.num_experts,
        num_experts_per_tok=config.experts_per_token,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=width * config.num_shared_experts,
        norm_topk_prob=config.router_renormalize,
        decoder_sparse_step=1,
        mlp_only_layers=list(range(config.num_dense_layers)),
        rms_norm_eps=config.norm_eps,
    )
