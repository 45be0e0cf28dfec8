"""Next-token cross entropy, in float32, as a sum and a count so that parts of a batch add up exactly."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deltajax.layers import linear_cross_entropy
from deltajax.models import LanguageModel


def batch_loss_sum(
    model: LanguageModel, batch: dict[str, jax.Array], z_loss: float = 0.0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Loss of a packed batch; padding does not count.

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
