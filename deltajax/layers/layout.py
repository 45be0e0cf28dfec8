"""Where each token of a call stands, for attention: its segment, its position there, and what it may see."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from deltajax.ops import segments
from deltajax.ops.checks import check_segments


class Layout(NamedTuple):
    """Where each token of a call stands: its run (1, 2, ... in order; 0 padding) and position in it."""

    run: Int[Array, "B T"]
    position: Int[Array, "B T"]

    def then(self, other: "Layout") -> "Layout":
        """These tokens, and behind them others."""
        return Layout(*(jnp.concatenate(pair, axis=1) for pair in zip(self, other, strict=True)))


def layout_of(
    batch: int, length: int, segment_ids: Int[Array, "B T"] | None, seen: Int[Array, " B"] | None
) -> Layout:
    """Runs and positions of a call's tokens; the first run continues after `seen` earlier tokens."""
    if segment_ids is None:
        run = jnp.ones((batch, length), jnp.int32)
        position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    else:
        run = segments.runs(segment_ids)
        count = jnp.cumsum(segment_ids != 0, axis=1, dtype=jnp.int32)  # real tokens so far
        first = lax.cummax(jnp.where(segments.starts(segment_ids), count, 0), axis=1)
        position = jnp.where(segment_ids != 0, count - first, 0)
    if seen is not None:
        position = position + jnp.where(run == 1, seen[:, None], 0)
    return Layout(run, position)


def packs_sequences(
    shape: tuple[int, ...],
    segment_ids: Int[Array, "B T"] | None,
    num_segments: int | None,
    hold: bool,
    rows: int | None,
) -> bool:
    """Whether a layer's call packs several sequences with caches of their own in its one row.

    Args:
      shape: of the input, [B, T, D].
      segment_ids, num_segments, hold: as given to the layer.
      rows: of the cache; None where none is given.

    Raises:
      ValueError, TypeError: on arguments that do not go together; the message names them.
    """
    check_segments(segment_ids, num_segments, *shape[:2])
    if hold and (rows is None or num_segments is not None):
        raise ValueError("hold=True: expected a cache, and num_segments=None")
    if num_segments is None:
        if rows is not None and rows != shape[0]:
            raise ValueError(f"cache: expected one of {shape[0]} rows, as many as the input's, got {rows}")
        return False
    if rows is None:
        raise ValueError(f"num_segments={num_segments}: expected a cache with as many rows, got none")
    if shape[0] != 1 or rows != num_segments:
        raise ValueError(
            f"num_segments={num_segments}: expected one row of tokens and a cache of {num_segments} rows, "
            f"got {shape[0]} and {rows}"
        )
    return num_segments > 1


def packed_layout(segment_ids: Int[Array, "1 T"], seen: Int[Array, " N"]) -> Layout:
    """Of a row of sequences 1..N: the ids as runs, each continuing after `seen` earlier tokens."""
    layout = layout_of(1, segment_ids.shape[1], segment_ids, None)
    earlier = seen[jnp.maximum(segment_ids - 1, 0)]
    return Layout(segment_ids, layout.position + jnp.where(segment_ids != 0, earlier, 0))


def layouts_on_axis(
    batch: int, length: int, segment_ids: Int[Array, "B T"] | None, axis_name: str | None
) -> tuple[Layout, Layout]:
    """The layout of a device's tokens and that of the whole rows, which are spread over that axis if any."""
    if axis_name is None:
        own = layout_of(batch, length, segment_ids, None)
        return own, own
    if segment_ids is not None:
        segment_ids = lax.all_gather(segment_ids, axis_name, axis=1, tiled=True)
    whole = layout_of(batch, length * lax.axis_size(axis_name), segment_ids, None)
    start = lax.axis_index(axis_name) * length
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, length, axis=1), whole), whole


def without_padding(o: Float[Array, "B T H V"], segment_ids: Int[Array, "B T"] | None) -> Array:
    """``o`` with zeros for padding."""
    return o if segment_ids is None else jnp.where((segment_ids != 0)[..., None, None], o, 0)


def causal_mask(queries: Layout, keys: Layout, window: int | None = None) -> Bool[Array, "B 1 T S"]:
    """Which keys each query sees: those of its run at its position or before, less than `window` back."""
    run = queries.run[:, :, None]
    distance = queries.position[:, :, None] - keys.position[:, None, :]
    mask = (run == keys.run[:, None, :]) & (run != 0) & (distance >= 0)
    if window is not None:
        mask = mask & (distance < window)
    return mask[:, None]
