"""From a model and a batch of a task to loss and right answers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deltajax.layers import linear_cross_entropy
from deltajax.models import LanguageModel
from train.tasks import Sample, Task

Params = Any

# A task that reads the last state has this beside the model: two layers that unfold it, position by position.
_DECODER_LAYERS = 2


class Questions(NamedTuple):
    """A batch with its answers gathered, so that nothing is computed where none is asked for.

    Attributes:
        tokens: int32 [B, T].
        places: int32 [B, N], positions of the answers, in order; after the last, any positions.
        targets: int32 [B, N].
        counts: bool [B, N], which are answers.
    """

    tokens: Int[Array, "B T"]
    places: Int[Array, "B N"]
    targets: Int[Array, "B N"]
    counts: Array


def questions(task: Task, batch: Sample) -> Questions:
    """Gathers a batch's answers; N is the task's bound on them."""
    length = batch.tokens.shape[1]
    places = jnp.argsort(~batch.answers, axis=1, stable=True)[:, : task.max_answers(length)]
    targets, counts = (jnp.take_along_axis(x, places, axis=1) for x in (batch.targets, batch.answers))
    return Questions(batch.tokens, places, targets, counts)


def init_decoder(key: jax.Array, hidden_size: int) -> Params:
    """Parameters of the decoder of tasks that read the last state."""
    keys = jax.random.split(key, _DECODER_LAYERS)
    shape = (hidden_size, hidden_size)
    return {
        f"layer{i}": {"kernel": jax.random.normal(k, shape) * hidden_size**-0.5} for i, k in enumerate(keys)
    }


def answer_states(
    task: Task, model: LanguageModel, decoder: Params, asked: Questions
) -> Float[Array, "B N D"]:
    """The hidden states from which the answers are read."""
    hidden = model.hidden_states(asked.tokens)
    if not task.reads_last:
        return jnp.take_along_axis(hidden, asked.places[..., None], axis=1)
    x = hidden[:, -1:] + _positions(asked.places, hidden.shape[-1]).astype(hidden.dtype)
    for i in range(_DECODER_LAYERS):
        x = jax.nn.gelu(_normalised(x) @ decoder[f"layer{i}"]["kernel"].astype(x.dtype))
    return _normalised(x)


def loss(task: Task, model: LanguageModel, decoder: Params, asked: Questions) -> Float[Array, ""]:
    """Mean cross entropy of the answers, nats."""
    hidden = answer_states(task, model, decoder, asked)
    total = linear_cross_entropy(hidden, model.head_kernel(), asked.targets, asked.counts)
    return total / jnp.maximum(jnp.sum(asked.counts), 1)


def right_answers(task: Task, model: LanguageModel, decoder: Params, asked: Questions) -> Array:
    """Which answers are the likeliest token by the model: bool [B, N], False where none is asked for."""
    logits = model.logits(answer_states(task, model, decoder, asked))
    return (jnp.argmax(logits, axis=-1) == asked.targets) & asked.counts


def _positions(places: Int[Array, "B N"], size: int) -> Float[Array, "B N D"]:
    rates = 1e4 ** (-jnp.arange(0, size, 2) / size)
    angles = places[..., None] * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :size]


def _normalised(x: Array) -> Array:
    square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return (x * jax.lax.rsqrt(square + 1e-6)).astype(x.dtype)
