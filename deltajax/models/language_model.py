"""The language model: embedding, scanned groups of blocks, final norm, LM head."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from deltajax.layers import RMSNorm
from deltajax.layers.embedding import embed_tokens
from deltajax.layers.parameters import parameter
from deltajax.models.config import ModelConfig
from deltajax.models.groups import layer_groups
from deltajax.models.scan import GroupCache, ScannedBlocks

ModelCache = tuple[GroupCache, ...]


class LanguageModel(nnx.Module):
    """A causal language model over any pattern of delta-rule and attention layers.

    Embedding; `num_layers` pre-norm blocks (mixer, then SwiGLU or experts), scanned by runs of a repeated
    unit; RMSNorm; LM head, untied unless `config.tie_embeddings`. As in the reference models, embeddings and
    all kernels and convolution taps start at normal(0, `config.initializer_range` = 0.02), norms at one.

    Args:
      config: shapes and arithmetic.
      rngs: parameter randomness.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        normal = nnx.initializers.normal(config.initializer_range)
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = parameter(normal, shape, ("vocab", "embed"), config.param_dtype, rngs)
        self.groups = nnx.List([ScannedBlocks(group, config, rngs=rngs) for group in layer_groups(config)])
        self.norm = RMSNorm(
            config.hidden_size,
            eps=config.norm_eps,
            zero_centered=config.zero_centered_norm,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        if not config.tie_embeddings:
            self.lm_head = parameter(normal, shape[::-1], ("embed", "vocab"), config.param_dtype, rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: ModelCache | None = None,
        num_segments: int | None = None,
        hold: bool = False,
    ) -> Any:
        """Next-token logits.

        Args:
          tokens: int32 [B, T].
          segment_ids: int32 [B, T] for packed rows; sequences do not see each other, id 0 is padding
            (its logits mean nothing), which stands between sequences or at a row's ends, not inside one.
          cache: what earlier calls returned (or `init_cache`); it belongs to each row's first segment.
          num_segments: static N: B = 1, and the row packs tokens of sequences 1..N, each together, which
            continue the N rows of `cache`.
          hold: return what the tokens would add to the cache instead of adding it, for `keep`.

        Returns:
          logits float32 [B, T, vocab]; `(logits, cache)` when a cache is given.
        """
        hidden = self.hidden_states(
            tokens, segment_ids=segment_ids, cache=cache, num_segments=num_segments, hold=hold
        )
        if cache is None:
            return self.logits(hidden)
        hidden, cache = hidden
        return self.logits(hidden), cache

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: ModelCache | None = None,
        num_segments: int | None = None,
        hold: bool = False,
    ) -> Any:
        """The normalised final hidden states, before the LM head; arguments as `__call__`.

        Returns:
          hidden [B, T, D] in the compute dtype; `(hidden, cache)` when a cache is given.
        """
        x = embed_tokens(self.embedding[...], tokens, self.config.dtype)
        new_cache = []
        for i, group in enumerate(self.groups):
            x, new = group(
                x,
                segment_ids=segment_ids,
                cache=None if cache is None else cache[i],
                num_segments=num_segments,
                hold=hold,
            )
            new_cache.append(new)
        x = self.norm(x)
        return x if cache is None else (x, tuple(new_cache))

    def head_kernel(self) -> Float[Array, "D vocab"]:
        """The LM head's kernel (the transposed embedding where tied), in the parameter dtype."""
        return self.embedding[...].T if self.config.tie_embeddings else self.lm_head[...]

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B vocab"]:
        """`hidden @ head_kernel()` with operands in the compute dtype, accumulated to float32."""
        kernel = self.head_kernel().astype(self.config.dtype)
        return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)

    def init_cache(self, batch: int, max_length: int) -> ModelCache:
        """An empty cache for `batch` sequences of at most `max_length` tokens."""
        return tuple(group.init_cache(batch, max_length) for group in self.groups)

    def grow_cache(self, cache: ModelCache, max_length: int) -> ModelCache:
        """The same cache with room for sequences of `max_length` tokens, no less than before.

        No sequence may have outgrown the old one: a full ring no longer tells its first slot.

        Raises:
          ValueError: the cache has more slots.
        """
        batch = jax.tree.leaves(cache)[0].shape[1]

        def put(old: Array, new: Array) -> Array:
            if old.shape == new.shape:
                return old
            if old.shape[2] > new.shape[2]:  # [layers, B, slots, .]
                raise ValueError(
                    f"max_length={max_length}: expected at least {old.shape[2]}, the cache's slots"
                )
            return jax.lax.dynamic_update_slice(new, old, (0,) * new.ndim)

        return jax.tree.map(put, cache, self.init_cache(batch, max_length))
