"""A Hugging Face `config.json` as a `ModelConfig`, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from deltajax.models.config import ModelConfig
from deltajax.models.huggingface import fla, kimi, olmo, qwen
from deltajax.models.huggingface.fields import Fields
from deltajax.models.huggingface.names import FLA, MODEL_TYPES, QWEN

# How a model computes, not what.
_RUNTIME = (
    "dtype", "param_dtype", "remat", "scan_layers", "stack_layers", "chunk_size", "implementation",
    "attention_implementation", "expert_implementation", "initializer_range",
)  # fmt: skip


def from_hf(fields: Mapping[str, Any], **changes: Any) -> ModelConfig:
    """The configuration of the model that a `config.json` describes.

    Args:
      fields: its content.
      **changes: fields of the configuration to set instead, such as `dtype` or `stack_layers`.

    Raises:
      ValueError: an architecture that is not known, or a value that our layers do not compute; the message
        names the field.
    """
    c, model_type = Fields(fields), fields.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"config.json: model_type={model_type!r}: expected one of {', '.join(MODEL_TYPES)}")
    if "text_config" in fields:  # of a model that reads images too
        outer = dict(dtype=c.get("dtype", "torch_dtype"), tie_word_embeddings=c.get("tie_word_embeddings"))
        outer = {name: value for name, value in outer.items() if value is not None}
        c = Fields(dict(fields["text_config"]) | outer, "text_config.")
    c.only("hidden_act", "silu", "swish")
    read = _module(model_type).read
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
    write = _module(model_type).write
    fields = {
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.intermediate_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "dtype": config.param_dtype,
        # Of the tokenizer, and not known here; their defaults may lie outside of the vocabulary.
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
        **write(config, model_type),
    }
    wanted, got = _essence(config), _essence(from_hf(fields))
    if lost := [f"{name}={wanted[name]!r}" for name in wanted if wanted[name] != got.get(name)]:
        raise ValueError(f"no {model_type} model of Hugging Face's form has {', '.join(lost)}")
    return fields


def _module(model_type: str) -> Any:
    modules = dict.fromkeys(FLA, fla) | dict.fromkeys(QWEN, qwen) | dict(kimi_linear=kimi, olmo_hybrid=olmo)
    return modules[model_type]


def _architecture(config: ModelConfig) -> str:
    kinds = set(config.layers)
    if kinds <= {"kda", "latent_attention"} and (config.num_experts or "latent_attention" in kinds):
        return "kimi_linear"
    if kinds <= {"gated_delta_net", "full_attention"} and config.zero_centered_norm:
        return "qwen3_5_text" if config.num_experts is None else "qwen3_next"
    if kinds == {"gated_delta_net", "full_attention"} and config.attn_post_norm:
        return "olmo_hybrid"
    deltas = kinds - {"sliding_window", "full_attention"}
    for model_type, kind in fla.DELTA.items():
        if deltas == {kind}:
            return model_type
    raise ValueError(
        f"ModelConfig.layer_pattern={config.layer_pattern}: "
        f"expected the layers of one of {', '.join(MODEL_TYPES)}"
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
        idle |= {
            "attn_head_dim",
            "attn_num_kv_heads",
            "attn_rope_fraction",
            "attn_qk_norm",
            "attn_qk_norm_joint",
            "attn_output_gate",
            "attn_post_norm",
        }
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
    if config.delta_norm_eps is None:
        fields["delta_norm_eps"] = config.norm_eps
    fields["use_gate"] = ("gated_delta_net" in kinds) if config.use_gate is None else config.use_gate
    if not kinds & {"delta_net", "gated_delta_net"}:
        idle.add("use_gate")
    if not config.has_delta:
        idle |= {
            "delta_norm_eps",
            "num_heads",
            "num_v_heads",
            "head_dim",
            "head_v_dim",
            "conv_size",
            "allow_neg_eigval",
        }
    if config.num_experts is None:
        idle |= {name for name in fields if "expert" in name or "router" in name} - {"num_experts"}
        idle.add("num_dense_layers")
    if all(kind.mlp == "experts" for kind in config.blocks):
        idle.add("intermediate_size")
    return {name: value for name, value in fields.items() if name not in idle}
