"""One pre-norm block: a mixer, then an MLP or experts, each added to the residual stream."""

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
    MixtureOfExperts,
    RMSNorm,
    SwiGLU,
)
from deltajax.layers.sharding import shard_tokens
from deltajax.models.config import ATTENTION_MIXERS, LayerKind, ModelConfig

LayerCache = DeltaCache | AttentionCache | LatentCache


class Block(nnx.Module):
    """`x = x + mixer(attn_norm(x))`, then `x = x + mlp(mlp_norm(x))`.

    With `attn_post_norm`, where the mixer is attention with keys and values of its own:
    `x = x + attn_norm(mixer(x))`, then `x = x + mlp_norm(mlp(x))`.

    Args:
      kind: the mixer, and whether the MLP is one or a mixture of experts.
      config: the model's configuration.
      rngs: parameter randomness.
    """

    def __init__(self, kind: LayerKind, config: ModelConfig, *, rngs: nnx.Rngs):
        common: dict[str, Any] = dict(dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs)
        norm = dict(eps=config.norm_eps, zero_centered=config.zero_centered_norm) | common
        drawn = common | {"initializer_range": config.initializer_range}
        self.attn_norm = RMSNorm(config.hidden_size, **norm)
        self.mixer = _mixer(kind.mixer, config, drawn)
        self.mlp_norm = RMSNorm(config.hidden_size, **norm)
        self.mlp = _mlp(kind.mlp, config, drawn)
        self.post_norm = config.attn_post_norm and kind.mixer in ATTENTION_MIXERS

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None,
        cache: LayerCache | None,
        **options: Any,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Applies the block, the options being the mixers'; the cache is None when none is given."""
        x, cache = self.mix(x, segment_ids=segment_ids, cache=cache, **options)
        return self.feed(x, segment_ids=segment_ids), cache

    def mix(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None,
        cache: LayerCache | None,
        **options: Any,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The block's first half: `x + mixer(attn_norm(x))`, and the cache."""
        given = x if self.post_norm else self.attn_norm(x)
        mixed = self.mixer(given, segment_ids=segment_ids, cache=cache, **options)
        y, cache = (mixed, None) if cache is None else mixed
        return shard_tokens(x + (self.attn_norm(y) if self.post_norm else y)), cache

    def feed(self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"] | None) -> Array:
        """The second: `x + mlp(mlp_norm(x))`."""
        given = {"segment_ids": segment_ids} if isinstance(self.mlp, MixtureOfExperts) else {}
        if self.post_norm:
            return shard_tokens(x + self.mlp_norm(self.mlp(x, **given)))
        return shard_tokens(x + self.mlp(self.mlp_norm(x), **given))

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
            rope_fraction=config.attn_rope_fraction,
            qk_norm=config.attn_qk_norm,
            qk_norm_joint=config.attn_qk_norm_joint,
            output_gate=config.attn_output_gate,
            norm_eps=config.norm_eps,
            zero_centered_norm=config.zero_centered_norm,
            implementation=config.attention_implementation,
        )
        return Attention(**options, **common)
    if kind == "latent_attention":
        options = dict(
            hidden_size=config.hidden_size,
            num_heads=config.attention_heads,
            kv_lora_rank=config.kv_lora_rank,
            q_lora_rank=config.q_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.latent_v_head_dim,
            rope_theta=config.rope_theta,
            implementation=config.attention_implementation,
        )
        return LatentAttention(**options, **common)
    options = dict(
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_v_heads=config.value_heads,
        head_dim=config.head_dim,
        head_v_dim=config.value_dim,
        conv_size=config.conv_size,
        allow_neg_eigval=config.allow_neg_eigval,
        norm_eps=config.norm_eps if config.delta_norm_eps is None else config.delta_norm_eps,
        chunk_size=config.chunk_size,
        implementation=config.implementation,
        **common,
    )
    if kind == "kda":
        return KimiDeltaAttention(lower_bound=config.lower_bound, gate_bias=config.kda_gate_bias, **options)
    if config.use_gate is not None:
        options["use_gate"] = config.use_gate
    return DeltaNet(**options) if kind == "delta_net" else GatedDeltaNet(**options)


def _mlp(kind: str, config: ModelConfig, common: dict[str, Any]) -> Any:
    if kind == "dense":
        return SwiGLU(hidden_size=config.hidden_size, intermediate_size=config.intermediate_size, **common)
    options: dict[str, Any] = dict(
        hidden_size=config.hidden_size,
        intermediate_size=config.expert_intermediate_size,
        num_experts=config.num_experts,
        experts_per_token=config.experts_per_token,
        num_shared_experts=config.num_shared_experts,
        shared_gate=config.shared_expert_gate,
        router=config.router,
        correction_bias=config.router_bias,
        renormalize=config.router_renormalize,
        scale=config.router_scale,
        implementation=config.expert_implementation,
    )
    return MixtureOfExperts(**options, **common)
