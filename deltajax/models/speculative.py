"""Speculative decoding: drafted tokens are verified in one call, and the caches keep the accepted ones."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deltajax.models.language_model import LanguageModel, ModelCache


def verify(
    model: LanguageModel,
    cache: ModelCache,
    tokens: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T vocab"], Any]:
    """The model's predictions after each of some tokens, which do not enter the caches yet.

    Args:
      model: the language model.
      cache: of B rows; it stays as it is.
      tokens: int [B, T]: in speculative decoding a row's last token, not read yet, and the drafted ones.
      segment_ids: int [B, T] where rows have different numbers of tokens: 1, and 0 for padding at their ends.

    Returns:
      logits float32 [B, T, vocab], and the tokens on hold, for `keep`.
    """
    return model(tokens, segment_ids=segment_ids, cache=cache, hold=True)


def keep(held: Any, counts: Int[Array, " B"]) -> ModelCache:
    """The caches after the first `counts` tokens of each row, exactly as if the others had never been.

    Keys and values of rejected tokens are not written, and the delta rule's states run over the kept ones
    from where they were: each is read and written once, no layer is computed again.

    Args:
      held: what `verify` returned.
      counts: int [B], from 0 to T.
    """

    def layer(tokens: Any) -> Any:  # stacked over the layers of a scan
        if jax.tree.leaves(tokens)[0].shape[0] > 1:
            return jax.lax.map(lambda one: one.keep(counts), tokens)
        kept = jax.tree.map(lambda x: x[0], tokens).keep(counts)
        return jax.tree.map(lambda x: x[None], kept)

    return tuple(tuple(layer(tokens) for tokens in group) for group in held)


def accept_greedy(
    logits: Float[Array, "B T vocab"],
    tokens: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """How many tokens to keep: the first, and the drafted ones up to the first that is not the likeliest.

    Args:
      logits, tokens, segment_ids: of `verify`; padding is never kept, whatever its token.

    Returns:
      counts int32 [B], from 1 to a row's number of tokens (0 where all are padding), and the likeliest token
      after the kept ones [B].
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    right = jnp.pad(tokens[:, 1:] == best[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    if segment_ids is not None:
        right &= segment_ids != 0
    counts = jnp.sum(jnp.cumprod(right.astype(jnp.int32), axis=1), axis=1)
    return counts, jnp.take_along_axis(best, jnp.maximum(counts[:, None] - 1, 0), axis=1)[:, 0]
