"""Next-token cross entropy, in float32, as a sum and a count so that parts of a batch add up exactly."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from deltajax.models import LanguageModel

# Logits are made for so many (token, vocabulary entry) pairs at a time, 256 MiB in float32.
_MAX_LOGITS = 2**26


def cross_entropy_sum(
    logits: Float[Array, "B T vocab"], targets: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Cross entropy summed over the targets that `mask` lets count, float32, in nats."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    return jnp.sum(jnp.where(mask, losses, 0.0))


def batch_loss_sum(
    model: LanguageModel, batch: dict[str, jax.Array], max_logits: int = _MAX_LOGITS
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Loss of a packed batch; padding does not count.

    Where the batch's logits would exceed `max_logits` numbers they are made, and in the backward pass made
    again, for a part of the positions at a time.

    Args:
        model: the language model.
        batch: tokens, targets and segment_ids, int32 [B, T] each.
        max_logits: largest B * positions * vocabulary held at once.

    Returns:
        The summed cross entropy in nats and the number of targets, float32 scalars.
    """
    hidden = model.hidden_states(batch["tokens"], segment_ids=batch["segment_ids"])  # [B, T, D]
    mask = batch["segment_ids"] > 0
    B, T = mask.shape
    parts = _parts(T, B * T * model.config.vocab_size, max_logits)
    if parts == 1:
        total = cross_entropy_sum(model.logits(hidden), batch["targets"], mask)
    else:

        @jax.checkpoint
        def part_loss(hidden, targets, mask):
            return cross_entropy_sum(model.logits(hidden), targets, mask)

        def cut(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [parts, B, T / parts, ...]
            return x.reshape(B, parts, T // parts, *x.shape[2:]).swapaxes(0, 1)

        def add(total, part):
            return total + part_loss(*part), None

        total, _ = jax.lax.scan(
            add, jnp.zeros((), jnp.float32), (cut(hidden), cut(batch["targets"]), cut(mask))
        )
    return total, jnp.sum(mask, dtype=jnp.float32)


def _parts(length: int, size: int, limit: int) -> int:
    """The smallest divisor of `length` into which `size` must be cut to fit `limit` (at most `length`)."""
    return next((n for n in range(1, length + 1) if length % n == 0 and size <= limit * n), length)
