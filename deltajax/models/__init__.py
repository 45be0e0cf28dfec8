"""Language models over any pattern of delta-rule and attention layers."""

from deltajax.models.abstract import abstract_model
from deltajax.models.config import ModelConfig
from deltajax.models.counting import (
    count_active_parameters,
    count_parameters,
    flops_per_token,
)
from deltajax.models.gate_statistics import gate_statistics
from deltajax.models.generate import Step, generate, stream
from deltajax.models.language_model import LanguageModel, ModelCache
from deltajax.models.presets import PRESETS, get_preset, kda_mla_pattern
from deltajax.models.speculative import accept_greedy, keep, verify
from deltajax.models.weights import load_weights, save_weights

__all__ = [
    "PRESETS",
    "LanguageModel",
    "ModelCache",
    "ModelConfig",
    "Step",
    "abstract_model",
    "accept_greedy",
    "count_active_parameters",
    "count_parameters",
    "flops_per_token",
    "gate_statistics",
    "generate",
    "get_preset",
    "kda_mla_pattern",
    "keep",
    "load_weights",
    "save_weights",
    "stream",
    "verify",
]
