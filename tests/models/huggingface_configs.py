"""Small configurations of every architecture that has Hugging Face's form."""

from deltajax.models import ModelConfig, get_preset

SMALL = dict(
    vocab_size=24, hidden_size=16, num_layers=4, num_heads=2, head_dim=8, intermediate_size=24,
    attn_num_heads=2, window_size=4, implementation="scan",
)  # fmt: skip
EXPERTS = dict(num_experts=3, experts_per_token=2, expert_intermediate_size=8)
LATENT = dict(kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, latent_v_head_dim=8)


def _of(preset: str, **changes) -> ModelConfig:
    return get_preset(preset).replace(**SMALL, **changes)


CONFIGS = {
    "delta_net": _of("tiny_delta_net", head_v_dim=16, allow_neg_eigval=True),
    "delta_net_gated_tied": _of("tiny_delta_net", use_gate=True, tie_embeddings=True),
    "delta_net_global": _of("tiny_delta_net").replace(layer_pattern=("delta_net", "full_attention")),
    "gated_deltanet": _of("tiny_gated_delta_net", head_v_dim=16, num_v_heads=4),
    "gated_deltanet_h1": _of("tiny_gated_delta_net_h1", head_v_dim=16, attn_num_kv_heads=1),
    "kda": _of("tiny_kda", num_v_heads=4),
    "kda_bounded": _of("tiny_kda", lower_bound=-5.0),
    "kimi_linear": _of("tiny_kimi_linear", dtype="float32", **EXPERTS, **LATENT),
    "kimi_linear_bf16": _of(
        "tiny_kimi_linear", dtype="bfloat16", param_dtype="bfloat16", q_lora_rank=6, **EXPERTS, **LATENT
    ),
    "qwen3_next": _of(
        "tiny_qwen3_next", dtype="float32", num_v_heads=4, head_v_dim=4, attn_head_dim=8, attn_num_kv_heads=1,
        **EXPERTS,
    ),
    "qwen3_next_dense_first": _of(
        "tiny_qwen3_next", dtype="float32", num_v_heads=2, attn_head_dim=8, attn_num_kv_heads=2,
        num_dense_layers=1, **EXPERTS,
    ),
    "qwen3_5_text": _of(
        "tiny_qwen3_next", dtype="float32", num_v_heads=4, attn_head_dim=8, attn_num_kv_heads=1,
        num_experts=None, shared_expert_gate=False, num_shared_experts=0,
    ),
    "olmo_hybrid": _of(
        "tiny_gated_delta_net", head_v_dim=16, attn_num_kv_heads=1, attn_qk_norm=True,
        attn_qk_norm_joint=True, attn_post_norm=True, allow_neg_eigval=True, rope_theta=None,
        delta_norm_eps=1e-5,
        layer_pattern=("gated_delta_net", "gated_delta_net", "full_attention"),
    ),
}  # fmt: skip
