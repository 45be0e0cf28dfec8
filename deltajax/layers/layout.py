"""Where each token of a call stands, for attention: its segment, its position there, and what it may see."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from deltajax.ops import segments


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
