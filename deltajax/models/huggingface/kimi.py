"""The configurations of `kimi_linear`."""

from typing import Any

from deltajax.models.config import ModelConfig
from deltajax.models.huggingface.fields import Fields, kinds_of, leading


def read(c: Fields, model_type: str) -> dict[str, Any]:
    """Our fields from theirs."""
    layers = c.need("num_hidden_layers")
    linear = c.within("linear_attn_config")
    linear.only("gate_lower_bound", None)
    linear.only("use_full_rank_gate", False)
    c.only("mla_use_nope", True)
    c.only("mla_use_output_gate", False)
    c.only("attention_bias", False)
    c.only("attn_res_block_size", 0)
    c.only("moe_router_activation_func", "sigmoid")
    c.only("moe_layer_freq", 1)
    c.only("num_nextn_predict_layers", 0)
    for name in ("num_expert_group", "n_group", "topk_group"):
        c.only(name, 1)
    if (full := linear.get("full_attn_layers")) is not None:
        types = ["full_attention" if i + 1 in full else "linear_attention" for i in range(layers)]
    else:
        types = c.need("layer_types")
    experts = c.get("num_experts", "num_local_experts", "n_routed_experts")
    dense = leading(c, "mlp_layer_types", "dense", c.get("first_k_dense_replace", default=1))
    own: dict[str, Any] = {}
    if experts is not None:
        own |= dict(
            num_experts=experts,
            experts_per_token=c.need("num_experts_per_token", "num_experts_per_tok"),
            expert_intermediate_size=c.need("moe_intermediate_size"),
            num_shared_experts=c.get("num_shared_experts", "n_shared_experts", default=0),
            router="sigmoid",
            router_bias=True,
            router_renormalize=c.get("moe_renormalize", "norm_topk_prob", default=True),
            router_scale=c.get("routed_scaling_factor", default=1.0),
            num_dense_layers=dense,
        )
    return dict(
        layer_pattern=kinds_of(c, types, "kda", "latent_attention"),
        num_heads=linear.get("num_heads", default=c.get("linear_num_heads", "linear_num_key_heads")),
        head_dim=linear.get("head_dim", default=c.get("linear_head_dim", "linear_key_head_dim")),
        conv_size=linear.get("short_conv_kernel_size", default=c.get("linear_conv_kernel_dim", default=4)),
        intermediate_size=c.need("dense_ffn_hidden", "intermediate_size"),
        kda_gate_bias=False,
        attn_num_heads=c.need("num_attention_heads"),
        kv_lora_rank=c.need("kv_lora_rank"),
        q_lora_rank=c.get("q_lora_rank"),
        qk_nope_head_dim=c.need("qk_nope_head_dim"),
        qk_rope_head_dim=c.need("qk_rope_head_dim"),
        latent_v_head_dim=c.need("v_head_dim"),
        rope_theta=None,
        norm_eps=c.get("rms_norm_eps", default=1e-5),
        **own,
    )


def write(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """Their fields from ours."""
    numbers = {
        kind: [i + 1 for i, own in enumerate(config.layers) if own == kind]
        for kind in ("kda", "latent_attention")
    }
    fields: dict[str, Any] = dict(
        architectures=["KimiLinearForCausalLM"],
        hidden_act="silu",
        linear_attn_config=dict(
            full_attn_layers=numbers["latent_attention"],
            kda_layers=numbers["kda"],
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            short_conv_kernel_size=config.conv_size,
        ),
        num_attention_heads=config.attention_heads,
        num_key_value_heads=config.attention_heads,
        kv_lora_rank=config.kv_lora_rank,
        q_lora_rank=config.q_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.latent_v_head_dim,
        mla_use_nope=True,
        rms_norm_eps=config.norm_eps,
        rope_scaling=None,
    )
    if config.num_experts is not None:
        fields |= dict(
            num_experts=config.num_experts,
            num_experts_per_token=config.experts_per_token,
            moe_intermediate_size=config.expert_intermediate_size,
            num_shared_experts=config.num_shared_experts,
            moe_router_activation_func="sigmoid",
            moe_renormalize=config.router_renormalize,
            routed_scaling_factor=config.router_scale,
            first_k_dense_replace=config.num_dense_layers,
            moe_layer_freq=1,
            use_grouped_topk=True,
            num_expert_group=1,
            topk_group=1,
        )
    return fields
