"""Flax NNX layers: the delta-rule mixers and what models and hybrids need beside them."""

from deltajax.layers.attention import Attention
from deltajax.layers.attention_cache import AttentionCache, LatentCache
from deltajax.layers.delta_base import DeltaCache
from deltajax.layers.delta_net import DeltaNet
from deltajax.layers.gated_delta_net import GatedDeltaNet
from deltajax.layers.kimi_delta_attention import KimiDeltaAttention
from deltajax.layers.latent_attention import LatentAttention
from deltajax.layers.linear_cross_entropy import linear_cross_entropy
from deltajax.layers.mixture_of_experts import MixtureOfExperts
from deltajax.layers.norm import GatedRMSNorm, RMSNorm
from deltajax.layers.rotary import RotaryEmbedding
from deltajax.layers.sharding import shard_ops
from deltajax.layers.swiglu import SwiGLU

__all__ = [
    "Attention",
    "AttentionCache",
    "DeltaCache",
    "DeltaNet",
    "GatedDeltaNet",
    "GatedRMSNorm",
    "KimiDeltaAttention",
    "LatentAttention",
    "LatentCache",
    "MixtureOfExperts",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLU",
    "linear_cross_entropy",
    "shard_ops",
]
