"""Autoregressive generation: prompts are read, then tokens follow, in one call or as they come."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from deltajax.models.decoding import Decoding, Options, advance, begin
from deltajax.models.language_model import LanguageModel, ModelCache
from deltajax.models.prefill import PREFILL_CHUNK, Prompts, as_prompts, bucket, check_fits, prefill
from deltajax.models.sampling import Sampling


class Step(NamedTuple):
    """One new token of every row."""

    tokens: Int[np.ndarray, " B"]  # `pad_token` in rows that finished before
    finished: Bool[np.ndarray, " B"]  # rows that have produced a stop token, with this step


def generate(
    model: LanguageModel,
    prompt_tokens: Prompts,
    *,
    prompt_lengths: Int[Array, " B"] | Sequence[int] | None = None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Array | None = None,
    stop_tokens: tuple[int, ...] = (),
    pad_token: int = 0,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Int[Array, "B N"]:
    """Continues every prompt by up to `max_new_tokens` tokens, in one compiled loop.

    A row's tokens depend on its own prompt (and row index, for the sampling key) only. A row that has
    produced a stop token is frozen; the loop ends when all are.

    Args:
      model: the language model.
      prompt_tokens: int [B, T], right-padded, or B sequences of any lengths; all ids, padding too, lie in
        the vocabulary.
      prompt_lengths: int [B], tokens of each row of [B, T], from 1 to T; None means T.
      max_new_tokens: N, static.
      temperature: 0 takes the most likely token; above, logits are divided by it and sampled.
      top_k: sample among the k most likely tokens only.
      top_p: sample among the fewest most likely tokens whose probability reaches p (nucleus sampling,
        arXiv 1904.09751), after temperature and top_k.
      key: PRNG key, needed when temperature > 0.
      stop_tokens: tokens that end a row; the stop token itself is kept.
      pad_token: fills a row after its stop token.
      prefill_chunk: prompt tokens read at once, over all rows; see `prefill`.

    Returns:
      int32 [B, N], the new tokens.

    Raises:
      ValueError: on an empty or misshapen prompt, ids or lengths out of range, or invalid sampling options.
    """
    prompts = as_prompts(prompt_tokens, prompt_lengths, model.config.vocab_size)
    options, key = _checked(model, temperature, top_k, top_p, key, stop_tokens, pad_token)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: expected a positive integer")
    max_length = max(map(len, prompts)) + max_new_tokens
    hidden, cache = prefill(model, prompts, max_length=max_length, prefill_chunk=prefill_chunk)
    graph, state = nnx.split(model)
    return _generate(graph, state, hidden, cache, key, options, max_new_tokens)[0]


def stream(
    model: LanguageModel,
    prompt_tokens: Prompts,
    *,
    prompt_lengths: Int[Array, " B"] | Sequence[int] | None = None,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Array | None = None,
    stop_tokens: tuple[int, ...] = (),
    pad_token: int = 0,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[Step]:
    """`generate`, a step at a time: the same tokens, each as soon as it is known.

    Ends when every row has finished, after `max_new_tokens`, or when the longest row's caches are full. Those
    of full and latent attention grow as needed, by doubling, so that few programs are compiled, but to no
    more slots than will be filled.

    Args:
      model, prompt_tokens: as in `generate`, and so are the arguments not named here.
      max_new_tokens: N; None for no limit.
      max_length: tokens of a row, prompt and new, that the caches may hold; None for no limit.

    Returns:
      An iterator of each step's tokens and which rows have finished.

    Raises:
      ValueError: as `generate`, or a prompt is longer than `max_length`; at once, not at the first step.
    """
    prompts = as_prompts(prompt_tokens, prompt_lengths, model.config.vocab_size)
    options, key = _checked(model, temperature, top_k, top_p, key, stop_tokens, pad_token)
    for name, value in (("max_new_tokens", max_new_tokens), ("max_length", max_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: expected a positive integer or None")
    longest = max(map(len, prompts))
    if max_length is not None:
        check_fits(prompts, max_length)
        fits = max_length - longest + 1  # the last token is not read
        max_new_tokens = fits if max_new_tokens is None else min(max_new_tokens, fits)
    slots = bucket(longest + 1)
    if max_new_tokens is not None:
        slots = min(slots, longest + max_new_tokens - 1)
    hidden, cache = prefill(model, prompts, max_length=slots, prefill_chunk=prefill_chunk)
    graph, params = nnx.split(model)
    state = _begin(graph, params, hidden, key, options)._replace(cache=cache)
    return _steps(graph, params, state, options, longest, slots, max_new_tokens)


def _steps(
    graph, params, state: Decoding, options: Options, read: int, slots: int, count: int | None
) -> Iterator[Step]:
    """The steps from `state` on, `count` at most, the caches holding `read` tokens of `slots`."""
    for n in itertools.count(1):
        following = None
        if n != count:  # started before this step's tokens are looked at
            if read + n > slots:
                slots = 2 * slots if count is None else min(2 * slots, read + count - 1)
                state = state._replace(cache=_grow(graph, params, state.cache, slots))
            following = _advance(graph, params, state._replace(cache=()), state.cache, options)
        step = Step(np.asarray(state.last), np.asarray(state.finished))
        yield step
        if following is None or step.finished.all():
            return
        state = following


def _checked(model, temperature, top_k, top_p, key, stop_tokens, pad_token) -> tuple[Options, Array]:
    sampling = Sampling(temperature, top_k, top_p)
    sampling.check(model.config.vocab_size)
    if key is None and temperature > 0:
        raise ValueError(f"key=None: expected a PRNG key, as temperature={temperature} > 0")
    options = Options(sampling, tuple(int(t) for t in stop_tokens), pad_token)
    return options, jax.random.key(0) if key is None else key


@functools.partial(jax.jit, static_argnums=(0, 5, 6), donate_argnums=3)
def _generate(
    graph, params, hidden, cache, key, options: Options, count: int
) -> tuple[Int[Array, "B N"], ModelCache]:
    model = nnx.merge(graph, params)

    def put(tokens, state: Decoding):
        return jax.lax.dynamic_update_slice_in_dim(tokens, state.last[:, None], state.step - 1, 1)

    def going_on(loop: tuple[Array, Decoding]) -> Array:
        return (loop[1].step < count) & ~jnp.all(loop[1].finished)

    def body(loop: tuple[Array, Decoding]) -> tuple[Array, Decoding]:
        state = advance(model, loop[1], options)
        return put(loop[0], state), state

    state = begin(model, hidden, cache, key, options)
    tokens = put(jnp.full((hidden.shape[0], count), options.pad_token, jnp.int32), state)
    tokens, state = jax.lax.while_loop(going_on, body, (tokens, state))
    return tokens, state.cache  # returned, so that the loop may have the memory it was given


@functools.partial(jax.jit, static_argnums=(0, 4))
def _begin(graph, params, hidden, key, options: Options) -> Decoding:
    return begin(nnx.merge(graph, params), hidden, (), key, options)


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=3)
def _advance(graph, params, state: Decoding, cache: ModelCache, options: Options) -> Decoding:
    return advance(nnx.merge(graph, params), state._replace(cache=cache), options)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _grow(graph, params, cache: ModelCache, max_length: int) -> ModelCache:
    return nnx.merge(graph, params).grow_cache(cache, max_length)
