"""The objectives: direct preference optimisation (arXiv 2305.18290) on packed pairs, and fine-tuning.

A pair is a prompt with two answers. Each answer is a sequence of its own, `prompt, answer, eos`, and a packed
batch holds the two as two segments: pair p (from 0) of a row is segments 2p + 1 (chosen) and 2p + 2
(rejected). With log-ratios of the model to a frozen reference, summed over an answer's tokens or averaged,

    r = sum_t log p(y_t | ...) - log p_ref(y_t | ...)       (divided by the number of tokens if normalised)
    loss = -log sigmoid(beta (r_chosen - r_rejected))

`beta r` is the implicit reward. The reference's log-probabilities come with the batch.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deltajax.layers import linear_cross_entropy
from deltajax.models import LanguageModel
from train.objective import Objective, Sums

# tokens, targets, segment_ids, answers (1 where the target belongs to an answer): int32 [B, T];
# DPO also takes reference: float32 [B, T], the frozen model's log-probability of each target.
Batch = dict[str, jax.Array]

# Numbers of logits held at a time, over all devices: 256 MiB in float32.
MAX_LOGITS = 2**26


def token_log_probs(
    hidden: Float[Array, "B T D"], kernel: Float[Array, "D vocab"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Each target's log-probability under `softmax(hidden @ kernel)`, in float32, differentiable.

    Positions are worked on some at a time and their logits are made again for the backward pass, so that
    the logits of all tokens never exist at once.
    """
    B, T, D = hidden.shape
    parts = max(1, -(-B * T * kernel.shape[1] // MAX_LOGITS))
    size = -(-T // parts)
    parts = -(-T // size)
    kernel = kernel.astype(hidden.dtype)

    @jax.checkpoint
    def some(xs: tuple[Array, Array]) -> Array:
        h, t = xs
        logits = jnp.matmul(h, kernel, preferred_element_type=jnp.float32)
        hit = jnp.arange(logits.shape[-1]) == t[..., None]
        return jnp.sum(jnp.where(hit, logits, 0), -1) - jax.nn.logsumexp(logits, axis=-1)

    if parts == 1:
        return some((hidden, targets))
    padding = parts * size - T
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(B, parts, size, D)
    targets = jnp.pad(targets, ((0, 0), (0, padding))).reshape(B, parts, size)
    found = jax.lax.map(some, (hidden.swapaxes(0, 1), targets.swapaxes(0, 1)))
    return found.swapaxes(0, 1).reshape(B, parts * size)[:, :T]


def batch_log_probs(model: LanguageModel, batch: Batch) -> Float[Array, "B T"]:
    """Log-probabilities of a batch's targets; those at padding mean nothing."""
    hidden = model.hidden_states(batch["tokens"], segment_ids=batch["segment_ids"])
    return token_log_probs(hidden, model.head_kernel(), batch["targets"])


def pair_log_ratios(
    log_probs: Float[Array, "B T"], batch: Batch, pairs: int, length_normalized: bool
) -> tuple[Float[Array, "B P 2"], Float[Array, "B P"]]:
    """Every pair's log-ratios of model to reference, of the chosen and of the rejected answer.

    Args:
        log_probs: the model's, of the batch's targets.
        batch: see `Batch`.
        pairs: P, as many as a row may hold.
        length_normalized: average over an answer's tokens instead of summing.

    Returns:
        The log-ratios, and 1.0 where there is such a pair, else 0.0.
    """
    counts = (batch["answers"] > 0) & (batch["segment_ids"] > 0)
    ratio = jnp.where(counts, log_probs - batch["reference"], 0)
    # Sums rather than a product with ones, which accelerators would round.
    of = batch["segment_ids"][..., None] == jnp.arange(1, 2 * pairs + 1)  # [B, T, 2 P]
    shape = (of.shape[0], pairs, 2)
    ratios = jnp.sum(jnp.where(of, ratio[..., None], 0), axis=1).reshape(shape)
    lengths = jnp.sum(of & counts[..., None], axis=1, dtype=jnp.float32).reshape(shape)
    if length_normalized:
        ratios = ratios / jnp.maximum(lengths, 1)
    return ratios, jnp.all(lengths > 0, axis=-1).astype(jnp.float32)


def dpo(beta: float, pairs: int, length_normalized: bool = False) -> Objective:
    """DPO on packed pairs; its count is of pairs, and it reports rewards, their margin and accuracy.

    Args:
        beta: how firmly the reference holds the model, positive.
        pairs: as many as a row may hold.
        length_normalized: log-probabilities averaged over an answer's tokens.

    Raises:
        ValueError: on values that cannot work, naming the argument.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta: expected positive and finite, got {beta}")
    if pairs < 1:
        raise ValueError(f"pairs: expected at least 1, got {pairs}")
    return partial(_dpo, beta=beta, pairs=pairs, length_normalized=length_normalized)


def _dpo(
    model: LanguageModel, batch: Batch, beta: float, pairs: int, length_normalized: bool
) -> tuple[jax.Array, Sums]:
    log_probs = batch_log_probs(model, batch)
    ratios, there = pair_log_ratios(log_probs, batch, pairs, length_normalized)
    chosen, rejected = beta * ratios[..., 0], beta * ratios[..., 1]
    margin = chosen - rejected  # 0 where there is no pair
    total = jnp.sum(there * jax.nn.softplus(-margin))
    sums = {
        "count": jnp.sum(there),
        "tokens": jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32),
        "reward_margin": jnp.sum(there * margin),
        "reward_accuracy": jnp.sum(there * (margin > 0)),
        "chosen_reward": jnp.sum(there * chosen),
        "rejected_reward": jnp.sum(there * rejected),
    }
    return total, sums


def fine_tuning(model: LanguageModel, batch: Batch) -> tuple[jax.Array, Sums]:
    """Cross entropy of the answers' tokens, an objective whose count is of them; prompts do not count."""
    hidden = model.hidden_states(batch["tokens"], segment_ids=batch["segment_ids"])
    counts = (batch["answers"] > 0) & (batch["segment_ids"] > 0)
    total = linear_cross_entropy(hidden, model.head_kernel(), batch["targets"], counts)
    sums = {
        "count": jnp.sum(counts, dtype=jnp.float32),
        "tokens": jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32),
    }
    return total, sums
