"""A Hugging Face `config.json` as a `ModelConfig`, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

from deltajax.models.config import ModelConfig
from deltajax.models.huggingface.names import FLA, MODEL_TYPES

_DELTA = {"delta_net": "delta_net", "gated_deltanet": "gated_delta_net", "kda": "kda"}
# How a model computes, not what.
_RUNTIME = (
    "dtype", "param_dtype", "remat", "scan_layers", "stack_layers", "chunk_size", "implementation",
    "attention_implementation", "initializer_range",
)  # fmt: skip


class _Fields:
    """A config's fields, read with the names that versions gave them."""

    def __init__(self, fields: Mapping[str, Any], where: str = ""):
        self._fields, self._where = fields, where

    def get(self, *names: str, default: Any = None) -> Any:
        """The first that is there and not null."""
        for name in names:
            if self._fields.get(name) is not None:
                return self._fields[name]
        return default

    def need(self, *names: str) -> Any:
        value = self.get(*names)
        if value is None:
            raise ValueError(f"config.json: no field {self._where}{' or '.join(names)}")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Refuses a field that has none of these values, the first being its default."""
        value = self.get(name, default=allowed[0])
        if value not in allowed:
            self.fail(name, value, " or ".join(map(repr, allowed)))

    def fail(self, name: str, value: Any, expected: str) -> NoReturn:
        raise ValueError(f"config.json: {self._where}{name}={value!r}: expected {expected}")


def from_hf(fields: Mapping[str, Any], **changes: Any) -> ModelConfig:
    """The configuration of the model that a `config.json` describes.

    Args:
      fields: its content.
      **changes: fields of the configuration to set instead, such as `dtype` or `stack_layers`.

    Raises:
      ValueError: an architecture that is not known, or a value that our layers do not compute; the message
        names the field.
    """
    c, model_type = _Fields(fields), fields.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"config.json: model_type={model_type!r}: expected one of {', '.join(MODEL_TYPES)}")
    c.only("hidden_act", "silu", "swish")
    read = _fla if model_type in FLA else _kimi if model_type == "kimi_linear" else _qwen
    dtype = str(c.get("dtype", "torch_dtype", default="float32")).removeprefix("torch.")
    common = dict(
        vocab_size=c.need("vocab_size"),
        hidden_size=c.need("hidden_size"),
        num_layers=c.need("num_hidden_layers"),
        tie_embeddings=c.get("tie_word_embeddings", default=False),
        initializer_range=c.get("initializer_range", default=0.02),
        dtype=dtype,
        param_dtype=dtype,
    )
    return ModelConfig(**(common | read(c, model_type) | changes))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of such a model, its architecture found by its layers.

    Raises:
      ValueError: no known architecture is like it; the message names the fields that it would lose.
    """
    model_type = _architecture(config)
    write = _to_fla if model_type in FLA else _to_kimi if model_type == "kimi_linear" else _to_qwen
    fields = {
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.intermediate_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "dtype": config.param_dtype,
        **write(config, model_type),
    }
    wanted, got = _essence(config), _essence(from_hf(fields))
    if lost := [f"{name}={wanted[name]!r}" for name in wanted if wanted[name] != got.get(name)]:
        raise ValueError(f"no {model_type} model of Hugging Face's form has {', '.join(lost)}")
    return fields


def _architecture(config: ModelConfig) -> str:
    kinds = set(config.layers)
    if kinds <= {"kda", "latent_attention"} and (config.num_experts or "latent_attention" in kinds):
        return "kimi_linear"
    if kinds <= {"gated_delta_net", "full_attention"} and config.zero_centered_norm:
        return "qwen3_next"
    deltas = kinds - {"sliding_window", "full_attention"}
    for model_type, kind in _DELTA.items():
        if deltas == {kind}:
            return model_type
    raise ValueError(
        f"ModelConfig.layer_pattern={config.layer_pattern}: expected the layers of one of {', '.join(MODEL_TYPES)}"
    )


def _essence(config: ModelConfig) -> dict[str, Any]:
    """What decides a model's function, resolved, without fields that no layer reads."""
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in _RUNTIME}
    fields |= dict(num_v_heads=config.value_heads, head_v_dim=config.value_dim, layer_pattern=config.layers)
    fields |= dict(attn_num_heads=config.attention_heads, attn_num_kv_heads=config.attention_kv_heads)
    kinds, idle = set(config.layers), set()
    if config.has_attention:
        fields["attn_head_dim"] = config.attention_head_dim
    else:
        idle |= {"attn_head_dim", "attn_num_kv_heads", "attn_rope_fraction", "attn_qk_norm", "attn_output_gate"}
    if not config.has_latent_attention:
        idle |= {"kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "latent_v_head_dim"}
    if not (config.has_attention or config.has_latent_attention):
        idle |= {"attn_num_heads", "rope_theta"}
    if config.rope_theta is None:
        idle.add("attn_rope_fraction")
    if "sliding_window" not in kinds:
        idle.add("window_size")
    if "kda" not in kinds:
        idle |= {"lower_bound", "kda_gate_bias"}
    fields["use_gate"] = ("gated_delta_net" in kinds) if config.use_gate is None else config.use_gate
    if not kinds & {"delta_net", "gated_delta_net"}:
        idle.add("use_gate")
    if not config.has_delta:
        idle |= {"num_heads", "num_v_heads", "head_dim", "head_v_dim", "conv_size", "allow_neg_eigval"}
    if config.num_experts is None:
        idle |= {name for name in fields if "expert" in name or "router" in name} - {"num_experts"}
        idle.add("num_dense_layers")
    if all(kind.mlp == "experts" for kind in config.blocks):
        idle.add("intermediate_size")
    return {name: value for name, value in fields.items() if name not in idle}


def _fla(c: _Fields, model_type: str) -> dict[str, Any]:
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
        keys = _whole(c, "expand_k", hidden * c.get("expand_k", default=1.0) / heads)
        values = _whole(c, "expand_v", hidden * expand_v / heads)
        own |= dict(use_gate=c.get("use_gate", default=False))
    else:
        keys = c.get("head_dim", default=256 if model_type == "gated_deltanet" else 128)
        values = _whole(c, "expand_v", keys * expand_v)
    if model_type == "gated_deltanet":
        c.only("output_gate_activation", "swish", "silu")
        own |= dict(use_gate=c.get("use_gate", default=True))
    if model_type == "kda":
        own |= dict(lower_bound=c.get("lower_bound"))
        if c.get("safe_gate", default=False) and own["lower_bound"] is None:
            c.fail("safe_gate", True, "a lower_bound with it")
    kind = _DELTA[model_type]
    pattern = [kind] * layers
    if (given := c.get("attn")) is not None:
        a = _Fields(given, "attn.")
        a.only("qkv_bias", False)
        a.only("qk_norm", False)
        window = a.get("window_size")
        for layer in a.need("layers"):
            if not 0 <= layer < layers:
                a.fail("layers", given["layers"], f"layers below {layers}")
            pattern[layer] = "full_attention" if window is None else "sliding_window"
        own |= dict(
            attn_num_heads=a.need("num_heads"),
            attn_num_kv_heads=a.get("num_kv_heads"),
            rope_theta=float(a.get("rope_theta", default=10000.0)),
        )
        own |= {} if window is None else dict(window_size=window)
    return dict(
        layer_pattern=_shortest(pattern),
        num_heads=heads,
        num_v_heads=None if model_type == "delta_net" else c.get("num_v_heads"),
        head_dim=keys,
        head_v_dim=values,
        intermediate_size=width,
        conv_size=c.get("conv_size", default=4),
        allow_neg_eigval=c.get("allow_neg_eigval", default=False),
        norm_eps=c.get("norm_eps", default=1e-6),
        **own,
    )


def _to_fla(config: ModelConfig, model_type: str) -> dict[str, Any]:
    fields: dict[str, Any] = dict(
        architectures=[dict(zip(FLA, ("DeltaNet", "GatedDeltaNet", "KDA"), strict=True))[model_type] + "ForCausalLM"],
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
            layers=[i for i, kind in enumerate(config.layers) if kind != _DELTA[model_type]],
            num_heads=config.attention_heads,
            num_kv_heads=config.attention_kv_heads,
            qkv_bias=False,
            rope_theta=config.rope_theta,
            window_size=config.window_size if "sliding_window" in config.layers else None,
        )
    return fields


def _kimi(c: _Fields, model_type: str) -> dict[str, Any]:
    layers = c.need("num_hidden_layers")
    linear = _Fields(c.get("linear_attn_config", default={}), "linear_attn_config.")
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
    dense = _leading(c, "mlp_layer_types", "dense", c.get("first_k_dense_replace", default=1))
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
        layer_pattern=_kinds(c, types, "kda", "latent_attention"),
        num_heads=linear.get("num_heads", default=c.get("linear_num_heads")),
        head_dim=linear.get("head_dim", default=c.get("linear_head_dim")),
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


def _to_kimi(config: ModelConfig, model_type: str) -> dict[str, Any]:
    numbers = {
        kind: [i + 1 for i, own in enumerate(config.layers) if own == kind] for kind in ("kda", "latent_attention")
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


def _qwen(c: _Fields, model_type: str) -> dict[str, Any]:
    layers = c.need("num_hidden_layers")
    c.only("attention_bias", False)
    c.only("decoder_sparse_step", 1)
    c.only("rope_scaling", None)
    rope = _Fields(c.get("rope_parameters", default={}), "rope_parameters.")
    rope.only("rope_type", "default")
    every = c.get("full_attention_interval", default=4)
    types = c.get("layer_types") or [
        "linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)
    ]
    width, shared = c.need("moe_intermediate_size"), c.need("shared_expert_intermediate_size")
    dense = sorted(c.get("mlp_only_layers", default=[]))
    if dense != list(range(len(dense))):
        c.fail("mlp_only_layers", dense, "the first layers, or none")
    return dict(
        layer_pattern=_kinds(c, types, "gated_delta_net", "full_attention"),
        num_heads=c.need("linear_num_key_heads"),
        num_v_heads=c.need("linear_num_value_heads"),
        head_dim=c.need("linear_key_head_dim"),
        head_v_dim=c.need("linear_value_head_dim"),
        conv_size=c.get("linear_conv_kernel_dim", default=4),
        intermediate_size=c.get("intermediate_size", default=width),
        attn_num_heads=c.need("num_attention_heads"),
        attn_num_kv_heads=c.need("num_key_value_heads"),
        attn_head_dim=c.need("head_dim"),
        attn_rope_fraction=rope.get("partial_rotary_factor", default=c.get("partial_rotary_factor", default=0.25)),
        attn_qk_norm=True,
        attn_output_gate=True,
        rope_theta=float(rope.get("rope_theta", default=c.get("rope_theta", default=10000.0))),
        num_experts=c.need("num_experts"),
        experts_per_token=c.need("num_experts_per_tok"),
        expert_intermediate_size=width,
        num_shared_experts=_whole(c, "shared_expert_intermediate_size", shared / width),
        shared_expert_gate=True,
        router_renormalize=c.get("norm_topk_prob", default=True),
        num_dense_layers=len(dense),
        zero_centered_norm=True,
        norm_eps=c.get("rms_norm_eps", default=1e-6),
    )


def _to_qwen(config: ModelConfig, model_type: str) -> dict[str, Any]:
    names = {"gated_delta_net": "linear_attention", "full_attention": "full_attention"}
    width = config.expert_intermediate_size or 0
    if not width:
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


def _whole(c: _Fields, name: str, size: float) -> int:
    if round(size) < 1 or abs(size - round(size)) > 1e-6 * size:
        c.fail(name, c.get(name), "sizes that are whole numbers")
    return round(size)


def _kinds(c: _Fields, types: list[str], linear: str, full: str) -> tuple[str, ...]:
    kinds = {"linear_attention": linear, "full_attention": full}
    if len(types) != c.need("num_hidden_layers") or not set(types) <= set(kinds):
        c.fail("layer_types", types, f"one of {', '.join(kinds)} for each of the layers")
    return _shortest([kinds[t] for t in types])


def _leading(c: _Fields, name: str, kind: str, default: int) -> int:
    """How many first layers are of a kind that no later one is."""
    if (types := c.get(name)) is None:
        return default
    count = types.count(kind)
    if types[:count] != [kind] * count:
        c.fail(name, types, f"{kind} layers before all others")
    return count


def _shortest(pattern: list[str]) -> tuple[str, ...]:
    """The shortest unit whose repetition is the pattern."""
    n = len(pattern)
    size = next(s for s in range(1, n + 1) if all(pattern[i] == pattern[i % s] for i in range(n)))
    return tuple(pattern[:size])
