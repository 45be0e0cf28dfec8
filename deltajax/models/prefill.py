"""Reading prompts: one row for each, or, where their lengths differ, all packed in one row."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from deltajax.models.language_model import LanguageModel, ModelCache

Prompts = Int[Array, "B T"] | Sequence[Sequence[int]]
PREFILL_CHUNK = 8192


def prefill(
    model: LanguageModel,
    prompts: Sequence[np.ndarray],
    *,
    max_length: int,
    prefill_chunk: int = PREFILL_CHUNK,
) -> tuple[Float[Array, "B D"], ModelCache]:
    """Reads prompts and returns what follows their last tokens.

    Prompts of one length are the rows of a batch. Others are packed in one row, each with caches of its own,
    so that no work is spent on padding. More tokens than `prefill_chunk` are read piece by piece, each piece
    by the same compiled program: memory is that of one piece and the caches.

    Args:
      model: the language model.
      prompts: what `as_prompts` returns.
      max_length: tokens that the caches of full and latent attention have room for.
      prefill_chunk: tokens of all prompts that are read at once, at most (but one of each at least).

    Returns:
      The hidden state after each prompt's last token [B, D], and the caches.

    Raises:
      ValueError: a prompt is longer than the cache, or `prefill_chunk` is not positive.
    """
    if prefill_chunk < 1:
        raise ValueError(f"prefill_chunk={prefill_chunk}: expected a positive integer")
    check_fits(prompts, max_length)
    lengths = np.array([len(prompt) for prompt in prompts])
    B, packed = len(prompts), len(set(lengths)) > 1
    room = prefill_chunk if packed else max(1, prefill_chunk // B)
    total = int(lengths.sum() if packed else lengths[0])
    size = min(room, bucket(total))
    width = -(-total // size) * size
    tokens = np.zeros((1 if packed else B, width), np.int32)
    ids = np.zeros_like(tokens)
    if packed:
        tokens[0, :total] = np.concatenate(prompts)
        ids[0, :total] = np.repeat(np.arange(1, B + 1), lengths)
        ends = np.cumsum(lengths) - 1
    else:
        tokens[:, :total], ids[:, :total], ends = np.stack(prompts), 1, lengths - 1

    graph, state = nnx.split(model)
    hidden, cache = _start(graph, state, B, max_length)
    for start in range(0, width, size):
        piece = slice(start, start + size)
        hidden, cache = _read(
            graph, state, hidden, cache, tokens[:, piece], ids[:, piece], ends - start, B if packed else None
        )
    return hidden, cache


def as_prompts(
    prompts: Prompts, lengths: Int[Array, " B"] | Sequence[int] | None, vocab_size: int
) -> list[np.ndarray]:
    """Each prompt's tokens as int32 [T_b].

    Args:
      prompts: int [B, T], right-padded, or B sequences of any lengths.
      lengths: tokens of each row of [B, T]; None means T.
      vocab_size: ids are less; an id outside the table would embed as NaN.

    Raises:
      ValueError: an empty or misshapen prompt, ids or lengths out of range; TypeError: they are not integers.
    """
    if isinstance(prompts, np.ndarray | jax.Array):
        if prompts.ndim != 2 or 0 in prompts.shape:
            raise ValueError(f"prompt_tokens: expected a non-empty [B, T], got shape {prompts.shape}")
        rows = list(np.asarray(prompts))
    else:
        rows = [np.asarray(prompt) for prompt in prompts]
        shapes = [row.shape for row in rows]
        if not rows or any(len(shape) != 1 or 0 in shape for shape in shapes):
            raise ValueError(f"prompt_tokens: expected non-empty sequences of ids, got shapes {shapes}")
    if lengths is not None:
        T, values = min(map(len, rows)), np.asarray(lengths)
        if not np.issubdtype(values.dtype, np.integer):
            raise TypeError(f"prompt_lengths: expected integers, got {values.dtype}")
        if values.shape != (len(rows),) or values.min() < 1 or values.max() > T:
            raise ValueError(f"prompt_lengths={values.tolist()}: expected {len(rows)} integers from 1 to {T}")
    everything = np.concatenate(rows)
    if not np.issubdtype(everything.dtype, np.integer):
        raise TypeError(f"prompt_tokens: expected integer ids, got {everything.dtype}")
    low, high = everything.min(), everything.max()
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"prompt_tokens: expected ids from 0 to vocab_size - 1 = {vocab_size - 1}, "
            f"got values from {low} to {high}"
        )
    if lengths is not None:
        rows = [row[:n] for row, n in zip(rows, np.asarray(lengths), strict=True)]
    return [row.astype(np.int32) for row in rows]


def check_fits(prompts: Sequence[np.ndarray], max_length: int) -> None:
    """Raises ValueError where a prompt has more tokens than caches of `max_length` slots have room for."""
    for n, prompt in enumerate(prompts):
        if len(prompt) > max_length:
            raise ValueError(
                f"prompt {n} has {len(prompt)} tokens: expected at most max_length={max_length}, the cache's"
            )


def bucket(n: int) -> int:
    """A number of at least n, of which there are four in an octave: few shapes to compile, little padding."""
    step = max(16, 1 << max(0, n.bit_length() - 3))
    return -(-n // step) * step


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _start(graph, state, batch: int, max_length: int) -> tuple[Array, ModelCache]:
    model = nnx.merge(graph, state)
    hidden = jnp.zeros((batch, model.config.hidden_size), model.config.dtype)
    return hidden, model.init_cache(batch, max_length)


@functools.partial(jax.jit, static_argnums=(0, 7), donate_argnums=(2, 3))
def _read(graph, state, last, cache, tokens, ids, ends, num_segments: int | None) -> tuple[Array, Any]:
    """One piece: `last` [B, D] becomes the hidden state at `ends`, for sequences that end in this piece."""
    model = nnx.merge(graph, state)
    hidden, cache = model.hidden_states(tokens, segment_ids=ids, cache=cache, num_segments=num_segments)
    row = 0 if num_segments is not None else jnp.arange(len(ends))
    here = (ends >= 0) & (ends < tokens.shape[1])
    at_end = hidden[row, jnp.clip(ends, 0, tokens.shape[1] - 1)]
    return jnp.where(here[:, None], at_end, last), cache
