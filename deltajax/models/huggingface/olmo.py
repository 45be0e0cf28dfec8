"""The configurations of `olmo_hybrid`."""

from typing import Any

from deltajax.models.config import ModelConfig
from deltajax.models.huggingface.fields import Fields, hybrid_fields, kinds_of, rotary

_DELTA_NORM_EPS = 1e-5  # whatever rms_norm_eps says


def read(c: Fields, model_type: str) -> dict[str, Any]:
    """Our fields from theirs."""
    layers, hidden, heads = c.need("num_hidden_layers"), c.need("hidden_size"), c.need("num_attention_heads")
    c.only("attention_bias", False)
    c.only("rope_scaling", None)
    # Null, in either place, means no positions; with nothing there, transformers rotates.
    theta = rotary(c).given("rope_theta", default=c.given("rope_theta", default=10000.0))
    types = c.get("layer_types")
    if types is None:
        types = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)]
        if "full_attention" not in types:
            types[-1] = "full_attention"
    keys = c.get("linear_num_key_heads", default=heads)
    size = c.get("linear_key_head_dim", default=int(0.75 * hidden / keys))
    return dict(
        layer_pattern=kinds_of(c, types, "gated_delta_net", "full_attention"),
        num_heads=keys,
        num_v_heads=c.get("linear_num_value_heads", default=heads),
        head_dim=size,
        head_v_dim=c.get("linear_value_head_dim", default=2 * size),
        conv_size=c.get("linear_conv_kernel_dim", default=4),
        allow_neg_eigval=c.get("linear_allow_neg_eigval", default=True),
        intermediate_size=c.need("intermediate_size"),
        attn_num_heads=heads,
        attn_num_kv_heads=c.get("num_key_value_heads", default=heads),
        attn_qk_norm=True,
        attn_qk_norm_joint=True,
        attn_post_norm=True,
        rope_theta=None if theta is None else float(theta),
        norm_eps=c.get("rms_norm_eps", default=1e-6),
        delta_norm_eps=_DELTA_NORM_EPS,
    )


def write(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """Their fields from ours."""
    return dict(
        architectures=["OlmoHybridForCausalLM"],
        **hybrid_fields(config),
        linear_allow_neg_eigval=config.allow_neg_eigval,
        rope_parameters=dict(rope_type="default", rope_theta=config.rope_theta),
    )
