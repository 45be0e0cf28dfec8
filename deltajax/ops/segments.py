"""The structure of packed rows: where segments begin and end, and which run a token belongs to."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int


def previous_ids(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Id of the last non-padding token before each position; 0 if there is none."""
    B, T = segment_ids.shape
    position = jnp.where(segment_ids != 0, jnp.arange(T), -1)
    latest = lax.cummax(position, axis=1)  # last non-padding position up to and with t
    latest = jnp.concatenate([jnp.full((B, 1), -1, latest.dtype), latest[:, :-1]], axis=1)
    ids = jnp.take_along_axis(segment_ids, jnp.maximum(latest, 0), axis=1)
    return jnp.where(latest < 0, 0, ids)


def starts(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True at the first token of every segment, the row's first segment included."""
    return (segment_ids != 0) & (segment_ids != previous_ids(segment_ids))


def resets(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True where a token must not see the state before it: at every start but the row's first."""
    return starts(segment_ids) & (previous_ids(segment_ids) != 0)


def runs(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """A number 1, 2, ... for each segment of a row in order of appearance; 0 for padding."""
    count = jnp.cumsum(starts(segment_ids), axis=1, dtype=jnp.int32)
    return jnp.where(segment_ids != 0, count, 0)
