"""Named configurations: tiny ones for a laptop, and the published 1.3B shapes."""

from types import MappingProxyType

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
        "gated_delta_net_swa_1p3b": _LARGE.replace(
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
