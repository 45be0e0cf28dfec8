"""One pre-norm block: a mixer, then an MLP, each added to the residual stream."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from deltajax.layers import (
    Attention,
    AttentionCache,
    DeltaCache,
    DeltaNet,
    GatedDeltaNet,
    KimiDeltaAttention,
    LatentAttention,
    LatentCache,
    RMSNorm,
    SwiGLU,
)
from deltajax.layers.sharding import shard_tokens
from deltajax.models.config import ModelConfig

LayerCache = DeltaCache | AttentionCache | LatentCache


class Block(nnx.Module):
    """`x = x + mixer(attn_norm(x))`, then `x = x + mlp(mlp_norm(x))`.

    Args:
      kind: the mixer, one of `config.MIXERS`.
      config: the model's configuration.
      rngs: parameter randomness.
    """

    def __init__(self, kind: str, config: ModelConfig, *, rngs: nnx.Rngs):
        common: dict[str, Any] = dict(dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs)
        self.attn_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, **common)
        self.mixer = _mixer(kind, config, common | {"initializer_range": config.initializer_range})
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, **common)
        self.mlp = SwiGLU(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            initializer_range=config.initializer_range,
            **common,
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None,
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Applies the block; the cache is None when none is given."""
        mixed = self.mixer(self.attn_norm(x), segment_ids=segment_ids, cache=cache)
        y, cache = (mixed, None) if cache is None else mixed
        x = shard_tokens(x + y)
        return shard_tokens(x + self.mlp(self.mlp_norm(x))), cache

    def init_cache(self, batch: int, max_length: int) -> LayerCache:
        """The mixer's empty cache."""
        if isinstance(self.mixer, (Attention, LatentAttention)):
            return self.mixer.init_cache(batch, max_length)
        return self.mixer.init_cache(batch)


def _mixer(kind: str, config: ModelConfig, common: dict[str, Any]) -> Any:
    if kind in ("sliding_window", "full_attention"):
        options: dict[str, Any] = dict(
            hidden_size=config.hidden_size,
            num_heads=config.attention_heads,
            num_kv_heads=config.attention_kv_heads,
            head_dim=config.attention_head_dim,
            window_size=config.window_size if kind == "sliding_window" else None,
            rope_theta=config.rope_theta,
            implementation=config.attention_implementation,
        )
        return Attention(**options, **common)
    if kind == "latent_attention":
        return LatentAttention(
            hidden_size=config.hidden_size,
            num_heads=config.attention_heads,
            kv_lora_rank=config.kv_lora_rank,
            q_lora_rank=config.q_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.latent_v_head_dim,
            rope_theta=config.rope_theta,
            **common,
        )
    options = dict(
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_v_heads=config.value_heads,
        head_dim=config.head_dim,
        head_v_dim=config.value_dim,
        conv_size=config.conv_size,
        allow_neg_eigval=config.allow_neg_eigval,
        norm_eps=config.norm_eps,
        chunk_size=config.chunk_size,
        implementation=config.implementation,
        **common,
    )
    if kind == "kda":
        return KimiDeltaAttention(lower_bound=config.lower_bound, **options)
    if config.use_gate is not None:
        options["use_gate"] = config.use_gate
    return DeltaNet(**options) if kind == "delta_net" else GatedDeltaNet(**options)
