"""The key/value cache of softmax attention: a fixed ring of slots per row, with its own length per row."""

from typing import NamedTuple, Self

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from deltajax.ops import segments


class AttentionCache(NamedTuple):
    """Keys and values of a row's current sequence: position p sits in slot p mod L.

    With L slots the last L positions are held, so a sliding window of at most L is exact for any length,
    and full attention is exact up to L tokens (beyond, it sees the last L).
    """

    key: Float[Array, "B L KV K"]  # rotated already
    value: Float[Array, "B L KV K"]
    length: Int[Array, " B"]  # int32, tokens seen so far in each row

    def positions(self) -> Int[Array, "B L"]:
        """The position each slot holds; negative where it holds none."""
        size = self.key.shape[1]
        last = self.length[:, None] - 1
        return last - (last - jnp.arange(size)) % size

    def append(
        self,
        key: Float[Array, "B T KV K"],
        value: Float[Array, "B T KV K"],
        layout: "Layout",
    ) -> Self:
        """The cache after T more tokens: those of the row's last segment stay, padding never enters."""
        rows, size = jnp.arange(key.shape[0])[:, None], self.key.shape[1]
        last = jnp.max(layout.run, axis=1)  # [B]
        current = (layout.run == last[:, None]) & (layout.run != 0)
        length = jnp.max(jnp.where(current, layout.position + 1, 0), axis=1)
        length = jnp.where(last == 0, self.length, length)
        kept = current & (layout.position >= length[:, None] - size)
        slot = jnp.where(kept, layout.position % size, size)  # `size` is out of range: dropped
        return self._replace(
            key=self.key.at[rows, slot].set(key.astype(self.key.dtype), mode="drop"),
            value=self.value.at[rows, slot].set(value.astype(self.value.dtype), mode="drop"),
            length=length.astype(jnp.int32),
        )


class Layout(NamedTuple):
    """Where each token of a call stands: its run (1, 2, ... in order; 0 padding) and position in it."""

    run: Int[Array, "B T"]
    position: Int[Array, "B T"]


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
