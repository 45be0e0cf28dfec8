"""The short convolution of several sequences packed in rows, each with a cache of its own."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deltajax.ops import checks, segments
from deltajax.ops.taps import apply_taps


def packed_convolution(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D W"],
    *,
    segment_ids: Int[Array, "B T"],
    cache: Float[Array, "B N W1 D"],
    activation: str | None = "silu",
) -> tuple[Float[Array, "B T D"], Float[Array, "B N W1 D"]]:
    """`short_convolution` of every segment by itself, continuing its own cache.

    Args:
      x: [B, T, D] inputs.
      weight: [D, W]; the last column weighs the current token.
      segment_ids: integer [B, T], 1..N, each segment's tokens together; padding (id 0) outputs 0.
      cache: [B, N, W - 1, D], the inputs just before each segment, oldest first.
      activation: "silu" or None.

    Returns:
      y [B, T, D] in x's dtype, and the new caches; a segment without tokens keeps its own.

    Raises:
      ValueError, TypeError: an argument's shape, dtype or visible values do not fit; the message names it.
    """
    checks.check_float("x", x)
    checks.check_float("weight", weight)
    checks.check_float("cache", cache)
    checks.check_rank("x", x, "B T D")
    checks.check_rank("cache", cache, "B N W-1 D")
    (B, T, D), (_, N, W1, _) = x.shape, cache.shape
    checks.check_shape("weight", weight, "D W", (D, W1 + 1))
    checks.check_shape("cache", cache, "B N W-1 D", (B, N, W1, D))
    checks.check_segments(segment_ids, N, B, T)
    real, row = (segment_ids != 0)[..., None], jnp.arange(B)[:, None]
    past = cache.astype(x.dtype)
    joined, numbers, place, last = _join(past, jnp.where(real, x, 0), segment_ids)
    # By XLA, which can split it over a mesh as it likes.
    y = apply_taps(joined, weight, None, numbers, activation, "xla")[row, place]
    new = jnp.where((last >= 0)[..., None], joined[row[..., None], last], past)
    return jnp.where(real, y, 0), new


def _join(past: Array, x: Array, ids: Array) -> tuple[Any, ...]:
    """Packed rows with each segment's past just before it.

    Returns:
      joined [B, T + N W1, D]; its segment numbers, 0 for padding; where each token is [B, T]; where entries
      of the new caches are [B, N, W1], negative for segments without tokens.
    """
    B, N, W1, D = past.shape
    T = x.shape[1]
    row, starts = jnp.arange(B)[:, None], segments.starts(ids)
    place = jnp.arange(T) + W1 * jnp.cumsum(starts, axis=1)
    absent = -W1 - T - N * W1  # negative with every offset
    first = jnp.full((B, N), absent).at[row, jnp.where(starts, ids - 1, N)].set(place, mode="drop")
    count = jnp.sum(ids[:, :, None] == jnp.arange(1, N + 1), axis=1)
    of_past = first[..., None] - W1 + jnp.arange(W1)
    at = jnp.where(of_past < 0, T + N * W1, of_past).reshape(B, -1)  # out of range: dropped
    joined = jnp.zeros((B, T + N * W1, D), x.dtype).at[row, place].set(x)
    joined = joined.at[row, at].set(past.reshape(B, -1, D), mode="drop")
    numbers = jnp.zeros(joined.shape[:2], ids.dtype).at[row, place].set(ids)
    of_segment = jnp.broadcast_to(jnp.repeat(jnp.arange(1, N + 1, dtype=ids.dtype), W1), at.shape)
    return joined, numbers.at[row, at].set(of_segment, mode="drop"), place, of_past + count[..., None]
