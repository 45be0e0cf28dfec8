"""The configurations of flash-linear-attention's `delta_net`, `gated_deltanet` and `kda`."""

from collections.abc import Mapping
from typing import Any

from deltajax.models.config import ModelConfig
from deltajax.models.huggingface.fields import Fields, shortest, whole

DELTA = {"delta_net": "delta_net", "gated_deltanet": "gated_delta_net", "kda": "kda"}  # their name, our mixer
_CLASSES = {"delta_net": "DeltaNet", "gated_deltanet": "GatedDeltaNet", "kda": "KDA"}


def read(c: Fields, model_type: str) -> dict[str, Any]:
    """Our fields from theirs."""
    c.only("use_short_conv", True)
    c.only("attnres_block_size", None)
    hidden, layers = c.need("hidden_size"), c.need("num_hidden_layers")
    heads = c.need("num_heads")
    width = c.get("intermediate_size")
    if width is None:  # two thirds of the ratio, in steps of 256
        width = -(-int(hidden * c.get("hidden_ratio", default=4) * 2 / 3) // 256) * 256
    expand_v = c.get("expand_v", default=2.0 if model_type == "gated_deltanet" else 1.0)
    own: dict[str, Any] = {}
    if model_type == "delta_net":
        for name, value in (("qk_activation", "silu"), ("qk_norm", "l2")):
            c.only(name, value)
        for name in ("use_beta", "use_output_norm"):
            c.only(name, True)
        keys = whole(c, "expand_k", hidden * c.get("expand_k", default=1.0) / heads)
        values = whole(c, "expand_v", hidden * expand_v / heads)
        own |= dict(use_gate=c.get("use_gate", default=False))
    else:
        keys = c.get("head_dim", default=256 if model_type == "gated_deltanet" else 128)
        values = whole(c, "expand_v", keys * expand_v)
    if model_type == "gated_deltanet":
        c.only("output_gate_activation", "swish", "silu")
        own |= dict(use_gate=c.get("use_gate", default=True))
    if model_type == "kda":
        own |= dict(lower_bound=c.get("lower_bound"))
        if c.get("safe_gate", default=False) and own["lower_bound"] is None:
            c.fail("safe_gate", True, "a lower_bound with it")
    kind = DELTA[model_type]
    pattern = [kind] * layers
    attention = _read_attention(c, pattern)
    return dict(
        layer_pattern=shortest(pattern),
        num_heads=heads,
        num_v_heads=None if model_type == "delta_net" else c.get("num_v_heads"),
        head_dim=keys,
        head_v_dim=values,
        intermediate_size=width,
        conv_size=c.get("conv_size", default=4),
        allow_neg_eigval=c.get("allow_neg_eigval", default=False),
        norm_eps=c.get("norm_eps", default=1e-6),
        **own,
        **attention,
    )


def _read_attention(c: Fields, pattern: list[str]) -> dict[str, Any]:
    """Our fields of the attention layers, which are set in the pattern: one specification, or a list."""
    given, own, taken = c.get("attn", default=[]), dict[str, Any](), set[int]()
    listed = given if isinstance(given, list) else [given]
    for i, spec in enumerate(listed):
        if not isinstance(spec, Mapping):
            c.fail("attn", given, "an object, or a list of them")
        a = Fields(spec, "attn." if given is spec else f"attn[{i}].")
        a.only("qkv_bias", False)
        a.only("qk_norm", False)
        window, heads = a.get("window_size"), a.need("num_heads")
        for layer in a.need("layers"):
            if not 0 <= layer < len(pattern):
                a.fail("layers", spec["layers"], f"layers below {len(pattern)}")
            if layer in taken:
                c.fail("attn", given, "each layer once")
            taken.add(layer)
            pattern[layer] = "full_attention" if window is None else "sliding_window"
        new: dict[str, Any] = dict(
            attn_num_heads=heads,
            attn_num_kv_heads=a.get("num_kv_heads", default=heads),
            rope_theta=float(a.get("rope_theta", default=10000.0)),
        )
        new |= {} if window is None else dict(window_size=window)
        if any(own.get(name, value) != value for name, value in new.items()):
            c.fail("attn", given, "the same heads, rope_theta and window in all of its objects")
        own |= new
    return own


def write(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """Their fields from ours."""
    fields: dict[str, Any] = dict(
        architectures=[_CLASSES[model_type] + "ForCausalLM"],
        num_heads=config.num_heads,
        expand_v=config.value_dim / config.head_dim,
        conv_size=config.conv_size,
        use_short_conv=True,
        allow_neg_eigval=config.allow_neg_eigval,
        hidden_act="swish",
        norm_eps=config.norm_eps,
    )
    if model_type == "delta_net":
        fields["expand_k"] = config.head_dim * config.num_heads / config.hidden_size
        fields["expand_v"] = config.value_dim * config.num_heads / config.hidden_size
        fields["use_gate"] = bool(config.use_gate)
    else:
        fields |= dict(head_dim=config.head_dim, num_v_heads=config.value_heads)
    if model_type == "gated_deltanet":
        fields["use_gate"] = config.use_gate is not False
    if model_type == "kda":
        fields |= dict(lower_bound=config.lower_bound, safe_gate=config.lower_bound is not None)
    if config.has_attention:
        fields["attn"] = dict(
            layers=[i for i, kind in enumerate(config.layers) if kind != DELTA[model_type]],
            num_heads=config.attention_heads,
            num_kv_heads=config.attention_kv_heads,
            qkv_bias=False,
            rope_theta=config.rope_theta,
            window_size=config.window_size if "sliding_window" in config.layers else None,
        )
    return fields
