"""Checkpoints in Hugging Face's form: flash-linear-attention's models, Kimi Linear, Qwen3-Next."""

from deltajax.models.huggingface.configs import from_hf, to_hf
from deltajax.models.huggingface.pretrained import load_pretrained, save_pretrained

__all__ = ["from_hf", "load_pretrained", "save_pretrained", "to_hf"]
