"""Checkpoints in Hugging Face's form: FLA, Kimi Linear, Qwen3-Next, Qwen3.5, OLMo-Hybrid."""

from deltajax.models.huggingface.configs import from_hf, to_hf
from deltajax.models.huggingface.pretrained import CONFIG, eos_token, load_pretrained, save_pretrained

__all__ = ["CONFIG", "eos_token", "from_hf", "load_pretrained", "save_pretrained", "to_hf"]
