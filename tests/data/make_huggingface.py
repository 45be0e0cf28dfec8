"""Writes the hf_*.npz files beside this file (README.md says what they hold).

    uv run --no-project --with torch --with "transformers==5.24.*" python tests/data/make_huggingface.py

Tensors and configurations are read from what `save_pretrained` put on disk, so they have the names there.
"""

import pathlib
import tempfile

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import (
    KimiLinearConfig,
    KimiLinearForCausalLM,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

HERE = pathlib.Path(__file__).parent
COMMON = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=4,
    num_attention_heads=4, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    tie_word_embeddings=False, dtype="float32",
)  # fmt: skip
KIMI = KimiLinearConfig(
    **COMMON, num_key_value_heads=4, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    mla_use_nope=True, num_experts=6, num_experts_per_token=2, num_shared_experts=1, moe_renormalize=True,
    routed_scaling_factor=2.446, first_k_dense_replace=1, rms_norm_eps=1e-5,
    linear_attn_config=dict(
        full_attn_layers=[4], kda_layers=[1, 2, 3], num_heads=2, head_dim=16, short_conv_kernel_size=4
    ),
)  # fmt: skip
QWEN = Qwen3NextConfig(
    **COMMON, num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=8, linear_value_head_dim=16, num_experts=6, num_experts_per_tok=2,
    shared_expert_intermediate_size=16, rope_parameters=dict(
        rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25
    ),
)  # fmt: skip
DENSE = {name: value for name, value in COMMON.items() if name != "moe_intermediate_size"}
QWEN3_5 = Qwen3_5TextConfig(
    **DENSE, num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=8, linear_value_head_dim=16, rope_parameters=dict(
        rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25
    ),
)  # fmt: skip
OLMO = OlmoHybridConfig(
    **DENSE, num_key_value_heads=2, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
    linear_value_head_dim=16, rope_parameters=dict(rope_type="default", rope_theta=None),
)  # fmt: skip


def draw(model: torch.nn.Module) -> None:
    """Numbers of their own for all parameters, norms and biases too."""
    generator = torch.Generator().manual_seed(3)
    tensors = dict(model.named_parameters()) | {
        name: x for name, x in model.named_buffers() if "correction_bias" in name
    }
    for name, x in tensors.items():
        noise = torch.randn(x.shape, generator=generator)
        if "A_log" in name:
            value = noise * 0.5
        elif "dt_bias" in name:
            value = noise - 2
        elif "norm" in name:
            value = x.data + 0.3 * noise
        else:
            value = noise * (0.2 if x.ndim > 1 else 0.1)
        x.data.copy_(value)


def _split_convolutions(weights: dict[str, np.ndarray], model) -> None:
    """Gives q, k and v of an OLMo-Hybrid their own taps: `save_pretrained` cuts them in thirds."""
    for name in [n for n in weights if n.endswith("q_conv1d.weight") and "linear_attn" in n]:
        layer = model.get_submodule(name.removesuffix(".q_conv1d.weight"))
        parts = layer.conv1d.weight.numpy()
        keys = layer.key_dim
        for letter, rows in (("q", parts[:keys]), ("k", parts[keys : 2 * keys]), ("v", parts[2 * keys :])):
            weights[name.replace("q_conv1d", f"{letter}_conv1d")] = rows.copy()


@torch.no_grad()
def write(name: str, model) -> None:
    draw(model.eval())
    generator = torch.Generator().manual_seed(7)
    data = {}
    with tempfile.TemporaryDirectory() as path:
        model.save_pretrained(path)
        data["config"] = np.array(pathlib.Path(path, "config.json").read_text())
        weights = load_file(pathlib.Path(path, "model.safetensors"))
    _split_convolutions(weights, model)
    data |= {f"weights/{key}": x for key, x in weights.items()}
    for prefix, length in (("", 70), ("short_", 2)):
        ids = torch.randint(3, 64, (2, length), generator=generator)
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, min_new_tokens=8,
            output_logits=True, return_dict_in_generate=True, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        data[prefix + "input_ids"] = ids.numpy()
        data[prefix + "gen_ids"] = made.sequences[:, length:].numpy()
        if not prefix:
            data["logits"] = model(ids, use_cache=False).logits.numpy()
            data["gen_logits"] = torch.stack(made.logits, dim=1).numpy()
    ids, mask = torch.randint(3, 64, (2, 24), generator=generator), torch.ones(2, 24, dtype=torch.long)
    mask[0, :9] = 0
    ids = torch.where(mask == 0, 0, ids)
    data["padded_input_ids"], data["padded_attention_mask"] = ids.numpy(), mask.numpy()
    data["padded_logits"] = model(ids, attention_mask=mask, use_cache=False).logits.numpy()
    np.savez_compressed(HERE / f"{name}.npz", **data)


if __name__ == "__main__":
    write("hf_kimi_linear", KimiLinearForCausalLM(KIMI))
    write("hf_qwen3_next", Qwen3NextForCausalLM(QWEN))
    write("hf_qwen3_5_text", Qwen3_5ForCausalLM(QWEN3_5))
    write("hf_olmo_hybrid", OlmoHybridForCausalLM(OLMO))
