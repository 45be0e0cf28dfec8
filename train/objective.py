"""Objectives: sums over a batch and what they count, so that parts of a batch add up exactly."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deltajax.layers import linear_cross_entropy
from deltajax.models import LanguageModel

# float32 scalars of a batch. "count" is what the summed loss is divided by, "tokens" how many tokens were
# worked on; any others are sums of what is reported beside the loss, divided by the count too.
Sums = dict[str, jax.Array]
# (model, batch of arrays [B, T]) -> (summed loss, sums)
Objective = Callable[[LanguageModel, dict[str, jax.Array]], tuple[jax.Array, Sums]]


def batch_loss_sum(
    model: LanguageModel, batch: dict[str, jax.Array], z_loss: float = 0.0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Next-token cross entropy of a packed batch, in float32; padding does not count.

    Args:
        model: the language model.
        batch: tokens, targets and segment_ids, int32 [B, T] each.
        z_loss: weight of the squared log normaliser, see `linear_cross_entropy`.

    Returns:
        The summed loss in nats and the number of targets, float32 scalars.
    """
    hidden = model.hidden_states(batch["tokens"], segment_ids=batch["segment_ids"])  # [B, T, D]
    mask = batch["segment_ids"] > 0
    total = linear_cross_entropy(hidden, model.head_kernel(), batch["targets"], mask, z_loss=z_loss)
    return total, jnp.sum(mask, dtype=jnp.float32)


def next_token(z_loss: float = 0.0) -> Objective:
    """`batch_loss_sum` as an objective."""
    return partial(_next_token, z_loss=z_loss)


def _next_token(model: LanguageModel, batch: dict[str, jax.Array], z_loss: float) -> tuple[jax.Array, Sums]:
    total, count = batch_loss_sum(model, batch, z_loss)
    return total, {"count": count, "tokens": count}
