"""Packed rows as cuDNN takes them: a list of all rows' segments, each with its place and its length."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deltajax.layers.layout import Layout

# Segments of a call: one for so many tokens, at least a few. For each of them cuDNN's backward half has sums
# in float32 for a whole row: so many bytes in all.
TOKENS, FEWEST = 256, 64
MAX_SUMS = 2**32


class Segments(NamedTuple):
    """The segments of all rows in order; behind the last some without tokens."""

    length: Int[Array, "B M"]
    first: Int[Array, "B M1"]  # token of all rows where it begins, one more than lengths; B T behind the last
    own: Int[Array, "B T"]  # number of each token's segment; B M for padding, and where there are more
    fit: Bool[Array, ""]  # whether these are all, and each lies in one piece


def num_segments(B: int, T: int, width: int) -> int:
    """M, segments for each of B rows of T tokens; 0 where a list will not do.

    Args:
      B, T: see above.
      width: numbers of a token, all heads', in the widest array; places are counted in numbers, in int32.
    """
    M = min(max(B * T // TOKENS, FEWEST), MAX_SUMS // (4 * T * width)) // B
    return M if M > 1 and B * T * width < 2**31 else 0


def whole(layout: Layout) -> Bool[Array, ""]:
    """Whether each row is one segment, with padding at most behind."""
    first = (layout.run == 1) & (layout.position == jnp.arange(layout.run.shape[1]))
    return jnp.all(first | (layout.run == 0))


def segments(layout: Layout, M: int) -> Segments:
    """The list of a layout's segments, M for each of its rows."""
    B, T = layout.run.shape
    before = jnp.pad(layout.run, ((0, 0), (1, 0)))[:, :-1]
    real, goes_on = layout.run != 0, layout.run == before
    begins = real & ~goes_on
    after = jnp.pad(layout.position, ((0, 0), (1, 0)))[:, :-1] + 1
    whole = ~real | (layout.position == jnp.where(goes_on, after, 0))
    number = jnp.cumsum(begins.ravel(), dtype=jnp.int32).reshape(B, T) - 1
    own = jnp.where(real, jnp.minimum(number, B * M), B * M)
    length = jnp.zeros(B * M, jnp.int32).at[own.ravel()].add(1, mode="drop")
    place = jnp.where(begins, own, B * (M + 1)).ravel()
    first = jnp.full(B * (M + 1), B * T, jnp.int32).at[place].set(jnp.arange(B * T), mode="drop")
    fit = jnp.all(whole) & (number[-1, -1] < B * M)
    return Segments(length.reshape(B, M), first.reshape(B, M + 1), own, fit)


def by_token(sums: Float[Array, "N H T"], layout: Layout, own: Int[Array, "B T"]) -> Float[Array, "B H T"]:
    """What there is for each segment's positions, at the tokens that have them; 0 for padding."""
    found = sums.at[own, :, layout.position].get(mode="fill", fill_value=0)  # [B, T, H]
    return found.swapaxes(1, 2)


def by_segment(
    sums: Float[Array, "B H T"], layout: Layout, own: Int[Array, "B T"], M: int
) -> Float[Array, "N H T"]:
    """The other way round, with zeros where a segment has no such position."""
    B, H, T = sums.shape
    return (
        jnp.zeros((B * M, H, T), sums.dtype).at[own, :, layout.position].set(sums.swapaxes(1, 2), mode="drop")
    )
