"""One step of generation: a token for every row, chosen from its hidden state and then read."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from deltajax.models.language_model import LanguageModel, ModelCache
from deltajax.models.sampling import Sampling, sample


@dataclasses.dataclass(frozen=True)
class Options:
    """What compiled steps are specialised on."""

    sampling: Sampling
    stop_tokens: tuple[int, ...]
    pad_token: int


class Decoding(NamedTuple):
    """Rows after `step` new tokens, the last of which the caches have not seen."""

    step: Int[Array, ""]
    last: Int[Array, " B"]
    finished: Bool[Array, " B"]
    keys: Key[Array, " B"]
    cache: ModelCache


def begin(
    model: LanguageModel, hidden: Float[Array, "B D"], cache: ModelCache, key: Array, options: Options
) -> Decoding:
    """The first token of every row, from the hidden states after the prompts."""
    B = hidden.shape[0]
    state = Decoding(
        step=jnp.zeros((), jnp.int32),
        last=jnp.zeros((B,), jnp.int32),
        finished=jnp.zeros((B,), bool),
        keys=jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(B)),
        cache=cache,
    )
    return _pick(model, hidden, state, options)


def advance(model: LanguageModel, state: Decoding, options: Options) -> Decoding:
    """The next token of every row. Finished rows are frozen: they are padding to the model."""
    active = (~state.finished).astype(jnp.int32)[:, None]
    hidden, cache = model.hidden_states(state.last[:, None], segment_ids=active, cache=state.cache)
    return _pick(model, hidden[:, 0], state._replace(cache=cache), options)


def _pick(model: LanguageModel, hidden: Float[Array, "B D"], state: Decoding, options: Options) -> Decoding:
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
    token = sample(model.logits(hidden), options.sampling, keys)
    token = jnp.where(state.finished, options.pad_token, token)
    stops = jnp.asarray(options.stop_tokens, jnp.int32)
    finished = state.finished | jnp.any(token[:, None] == stops, axis=1)
    return state._replace(step=state.step + 1, last=token, finished=finished)
