"""Choosing a token from logits: greedy, temperature, top-k and nucleus sampling."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


class Sampling(NamedTuple):
    """Sampling options; see `generate`."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def check(self, vocab_size: int) -> None:
        """Raises ValueError naming the option, the value seen and what was expected."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: expected a finite number >= 0")
        if self.top_k is not None and not 1 <= self.top_k <= vocab_size:
            raise ValueError(f"top_k={self.top_k}: expected 1 to vocab_size={vocab_size}, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected a number in (0, 1], or None")


def sample(logits: Float[Array, "B vocab"], options: Sampling, keys: Key[Array, " B"]) -> Int[Array, " B"]:
    """One token per row, each drawn with its own key, so that rows do not depend on each other.

    Args:
      logits: float32 [B, vocab].
      options: valid options.
      keys: [B] PRNG keys; unused when greedy.

    Returns:
      int32 [B].
    """
    if options.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The largest at zero first: it stays there however small the temperature, and the others go to -inf.
    below = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = jnp.where(below == 0, 0.0, below / options.temperature)
    if options.top_k is not None:
        _, best = jax.lax.top_k(logits, options.top_k)  # ties: exactly k survive
        rows = jnp.arange(logits.shape[0])[:, None]
        logits = jnp.full_like(logits, -jnp.inf).at[rows, best].set(jnp.take_along_axis(logits, best, axis=1))
    if options.top_p is not None and options.top_p < 1:
        logits = _nucleus(logits, options.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _nucleus(logits: Float[Array, "B vocab"], top_p: float) -> Float[Array, "B vocab"]:
    """Keeps the fewest most likely tokens whose probability sums to at least `top_p`."""
    order = jnp.argsort(-logits, axis=-1)
    probability = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability  # mass of the likelier tokens
    rows = jnp.arange(logits.shape[0])[:, None]
    kept = jnp.zeros(logits.shape, bool).at[rows, order].set(before < top_p)
    return jnp.where(kept, logits, -jnp.inf)
