"""Named configurations: tiny ones for a laptop, and the published shapes."""

from types import MappingProxyType
from typing import Any

from deltajax.models.config import ModelConfig

# About 0.8M to 1M parameters on a byte vocabulary (256 bytes and a few specials).
_TINY = ModelConfig(
    vocab_size=260,
    hidden_size=128,
    num_layers=4,
    layer_pattern=("delta_net",),
    num_heads=2,
    head_dim=64,
    intermediate_size=320,
    window_size=64,
    attn_num_heads=4,
)

# The 1.3B shapes of the DeltaNet and Gated DeltaNet papers, as flash-linear-attention configures them.
_LARGE = ModelConfig(
    vocab_size=32000,
    hidden_size=2048,
    num_layers=24,
    layer_pattern=("delta_net",),
    num_heads=16,
    head_dim=128,
    intermediate_size=5632,
    window_size=2048,
    dtype="bfloat16",
)


def _global_pattern(num_layers: int) -> tuple[str, ...]:
    """DeltaNet with full attention at the 2nd and the (N/2 + 1)-th layer, counted from one."""
    return tuple("full_attention" if i in (1, num_layers // 2) else "delta_net" for i in range(num_layers))


def kda_mla_pattern(num_layers: int, kda_per_mla: int) -> tuple[str, ...]:
    """KDA with latent attention after every `kda_per_mla` of its layers, and in the last layer.

    Raises:
      ValueError: on a negative number.
    """
    if kda_per_mla < 0:
        raise ValueError(f"kda_per_mla={kda_per_mla}: expected a whole number")
    last = num_layers - 1
    return tuple(
        "latent_attention" if i % (kda_per_mla + 1) == kda_per_mla or i == last else "kda"
        for i in range(num_layers)
    )


# Kimi-Linear-48B-A3B: KDA and latent attention without positions 3:1, experts after the first layer.
_KIMI_LINEAR = ModelConfig(
    vocab_size=163840,
    hidden_size=2304,
    num_layers=27,
    layer_pattern=kda_mla_pattern(27, 3),
    num_heads=32,
    head_dim=128,
    intermediate_size=9216,
    kda_gate_bias=False,
    rope_theta=None,
    num_experts=256,
    experts_per_token=8,
    expert_intermediate_size=1024,
    num_shared_experts=1,
    router="sigmoid",
    router_bias=True,
    router_scale=2.446,
    num_dense_layers=1,
    norm_eps=1e-5,
    dtype="bfloat16",
)

# Qwen3-Next-80B-A3B: Gated DeltaNet and gated attention 3:1, experts in every layer.
_QWEN3_NEXT = ModelConfig(
    vocab_size=151936,
    hidden_size=2048,
    num_layers=48,
    layer_pattern=("gated_delta_net", "gated_delta_net", "gated_delta_net", "full_attention"),
    num_heads=16,
    num_v_heads=32,
    head_dim=128,
    intermediate_size=5120,  # of no layer: all have experts
    attn_num_kv_heads=2,
    attn_head_dim=256,
    attn_rope_fraction=0.25,
    attn_qk_norm=True,
    attn_output_gate=True,
    rope_theta=1e7,
    num_experts=512,
    experts_per_token=10,
    expert_intermediate_size=512,
    num_shared_experts=1,
    shared_expert_gate=True,
    zero_centered_norm=True,
    dtype="bfloat16",
)

_SMALL: dict[str, Any] = {
    field: getattr(_TINY, field)
    for field in ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "dtype")
}
_SMALL_EXPERTS: dict[str, Any] = dict(num_experts=8, experts_per_token=2, expert_intermediate_size=96)

PRESETS = MappingProxyType(
    {
        "tiny_delta_net": _TINY,
        "tiny_gated_delta_net": _TINY.replace(
            layer_pattern=("gated_delta_net",), head_dim=32, head_v_dim=64, num_heads=2
        ),
        "tiny_kda": _TINY.replace(layer_pattern=("kda",)),
        "tiny_hybrid": _TINY.replace(
            layer_pattern=("gated_delta_net", "sliding_window", "kda", "full_attention")
        ),
        # KDA and latent attention without positions, 3:1 as in Kimi Linear.
        "tiny_kda_mla": _TINY.replace(
            layer_pattern=("kda", "kda", "kda", "latent_attention"),
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            latent_v_head_dim=32,
            rope_theta=None,
        ),
        # The models below with few and small layers and experts.
        "tiny_kimi_linear": _KIMI_LINEAR.replace(
            **_SMALL,
            **_SMALL_EXPERTS,
            layer_pattern=kda_mla_pattern(4, 3),
            head_dim=32,
            attn_num_heads=4,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            latent_v_head_dim=32,
        ),
        "tiny_qwen3_next": _QWEN3_NEXT.replace(
            **_SMALL, **_SMALL_EXPERTS, num_v_heads=4, head_dim=32, attn_num_heads=4, attn_head_dim=32
        ),
        "tiny_gated_delta_net_h1": _TINY.replace(
            layer_pattern=("gated_delta_net", "sliding_window"), head_dim=32, head_v_dim=64
        ),
        "delta_net_1p3b": _LARGE,
        "delta_net_swa_1p3b": _LARGE.replace(layer_pattern=("delta_net", "sliding_window")),
        "delta_net_global_1p3b": _LARGE.replace(layer_pattern=_global_pattern(24)),
        "gated_delta_net_1p3b": _LARGE.replace(
            layer_pattern=("gated_delta_net",),
            num_layers=21,
            num_heads=6,
            head_dim=256,
            head_v_dim=512,
            attn_num_heads=16,
        ),
        # Gated DeltaNet-H1.
        "gated_delta_net_h1_1p3b": _LARGE.replace(
            layer_pattern=("gated_delta_net", "sliding_window"),
            num_layers=21,
            num_heads=6,
            head_dim=256,
            head_v_dim=512,
            attn_num_heads=16,
        ),
        "kda_1p3b": _LARGE.replace(layer_pattern=("kda",)),
        "kda_hybrid_1p3b": _LARGE.replace(layer_pattern=("kda", "kda", "kda", "full_attention")),
        "kda_mla_1p3b": _LARGE.replace(
            layer_pattern=("kda", "kda", "kda", "latent_attention"), rope_theta=None
        ),
        "kimi_linear_48b_a3b": _KIMI_LINEAR,
        "qwen3_next_80b_a3b": _QWEN3_NEXT,
    }
)


def get_preset(name: str) -> ModelConfig:
    """The preset of that name; `-` and `_` are the same.

    Raises:
      ValueError: on an unknown name, listing the known ones.
    """
    key = name.replace("-", "_")
    if key not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[key]
