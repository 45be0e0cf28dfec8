"""Autoregressive generation: one prefill, then a compiled loop of cached single-token steps."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from deltajax.models.language_model import LanguageModel, ModelCache
from deltajax.models.sampling import Sampling, sample
from deltajax.ops.checks import is_concrete


@dataclasses.dataclass(frozen=True)
class _Options:
    """What the compiled loop is specialised on."""

    max_new_tokens: int
    sampling: Sampling
    stop_tokens: tuple[int, ...]
    pad_token: int


class _Loop(NamedTuple):
    """State of the decoding loop after `step` tokens."""

    step: Int[Array, ""]
    tokens: Int[Array, "B N"]
    last: Int[Array, " B"]
    finished: Array  # bool [B]
    cache: ModelCache


def generate(
    model: LanguageModel,
    prompt_tokens: Int[Array, "B T"],
    *,
    prompt_lengths: Int[Array, " B"] | None = None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Array | None = None,
    stop_tokens: tuple[int, ...] = (),
    pad_token: int = 0,
) -> Int[Array, "B N"]:
    """Continues every prompt by up to `max_new_tokens` tokens.

    A row's tokens depend on its own prompt (and row index, for the sampling key) only. A row that has
    produced a stop token is frozen; the loop ends when all are.

    Args:
      model: the language model.
      prompt_tokens: int [B, T], right-padded; all ids, padding too, lie in the vocabulary.
      prompt_lengths: int [B], tokens of each prompt, from 1 to T; None means T.
      max_new_tokens: N, static.
      temperature: 0 takes the most likely token; above, logits are divided by it and sampled.
      top_k: sample among the k most likely tokens only.
      top_p: sample among the fewest most likely tokens whose probability reaches p (nucleus sampling,
        arXiv 1904.09751), after temperature and top_k.
      key: PRNG key, needed when temperature > 0.
      stop_tokens: tokens that end a row; the stop token itself is kept.
      pad_token: fills a row after its stop token.

    Returns:
      int32 [B, N], the new tokens.

    Raises:
      ValueError: on an empty or misshapen prompt, ids or lengths out of range, or invalid sampling options.
    """
    given, prompt_tokens = prompt_tokens, jnp.asarray(prompt_tokens, jnp.int32)
    if prompt_tokens.ndim != 2 or 0 in prompt_tokens.shape:
        raise ValueError(f"prompt_tokens: expected a non-empty [B, T], got shape {prompt_tokens.shape}")
    _check_ids(given, model.config.vocab_size)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: expected a positive integer")
    B, T = prompt_tokens.shape
    sampling = Sampling(temperature, top_k, top_p)
    sampling.check(model.config.vocab_size)
    if key is None and temperature > 0:
        raise ValueError(f"key=None: expected a PRNG key, as temperature={temperature} > 0")
    graph, state = nnx.split(model)
    return _generate(
        graph,
        state,
        prompt_tokens,
        _checked_lengths(prompt_lengths, B, T),
        jax.random.key(0) if key is None else key,
        _Options(max_new_tokens, sampling, tuple(int(t) for t in stop_tokens), pad_token),
    )


def _check_ids(tokens, vocab_size: int) -> None:
    # An id outside the table would embed as NaN, and the row decode to zeros without a word.
    if not is_concrete(tokens):
        return
    values = np.asarray(tokens)
    low, high = values.min(), values.max()
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"prompt_tokens: expected ids from 0 to vocab_size - 1 = {vocab_size - 1}, "
            f"got values from {low} to {high}"
        )


def _checked_lengths(lengths, B: int, T: int) -> Int[Array, " B"]:
    if lengths is None:
        return jnp.full((B,), T, jnp.int32)
    if not isinstance(lengths, jax.core.Tracer):
        values = np.asarray(lengths)
        if values.shape != (B,) or values.min() < 1 or values.max() > T:
            raise ValueError(f"prompt_lengths={values.tolist()}: expected {B} integers from 1 to {T}")
    return jnp.asarray(lengths, jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _generate(graph, state, prompt, lengths, key, options: _Options) -> Int[Array, "B N"]:
    model = nnx.merge(graph, state)
    B, T = prompt.shape
    N = options.max_new_tokens
    stops = jnp.asarray(options.stop_tokens, jnp.int32)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(B))  # one per row

    def pick(hidden, loop: _Loop) -> _Loop:
        """Chooses token number `step` from the hidden state [B, D] before it."""
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, loop.step)
        token = sample(model.logits(hidden), options.sampling, step_keys)
        token = jnp.where(loop.finished, options.pad_token, token)
        return loop._replace(
            step=loop.step + 1,
            tokens=jax.lax.dynamic_update_slice_in_dim(loop.tokens, token[:, None], loop.step, 1),
            last=token,
            finished=loop.finished | jnp.any(token[:, None] == stops, axis=1),
        )

    def advance(loop: _Loop) -> _Loop:
        active = (~loop.finished).astype(jnp.int32)[:, None]  # finished rows are padding: frozen
        hidden, cache = model.hidden_states(loop.last[:, None], segment_ids=active, cache=loop.cache)
        return pick(hidden[:, 0], loop._replace(cache=cache))

    real = (jnp.arange(T) < lengths[:, None]).astype(jnp.int32)
    hidden, cache = model.hidden_states(prompt, segment_ids=real, cache=model.init_cache(B, T + N))
    hidden = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    loop = _Loop(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.full((B, N), options.pad_token, jnp.int32),
        last=jnp.zeros((B,), jnp.int32),
        finished=jnp.zeros((B,), bool),
        cache=cache,
    )
    loop = pick(hidden, loop)
    return jax.lax.while_loop(lambda s: (s.step < N) & ~jnp.all(s.finished), advance, loop).tokens
