"""The caches of softmax attention: a fixed ring of slots per row, with its own length per row."""

from typing import NamedTuple, Self

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deltajax.layers.layout import Layout


class AttentionCache(NamedTuple):
    """Keys and values of a row's current sequence: position p sits in slot p mod L.

    With L slots the last L positions are held, so a sliding window of at most L is exact for any length,
    and full attention is exact up to L tokens (beyond, it sees the last L).
    """

    key: Float[Array, "B L KV K"]  # rotated already
    value: Float[Array, "B L KV K"]
    length: Int[Array, " B"]  # int32, tokens seen so far in each row

    def held(self) -> Layout:
        """What the slots hold, as keys of the row's first run; empty slots are padding."""
        return _held(self.length, self.key.shape[1])

    def append(
        self,
        key: Float[Array, "B T KV K"],
        value: Float[Array, "B T KV K"],
        layout: Layout,
    ) -> Self:
        """The cache after T more tokens: those of the row's last segment stay, padding never enters."""
        slot, length = _place(layout, self.length, self.key.shape[1])
        return self._replace(
            key=_put(self.key, key, slot), value=_put(self.value, value, slot), length=length
        )


class LatentCache(NamedTuple):
    """What multi-head latent attention keeps of a token for all its heads; slots as in `AttentionCache`."""

    latent: Float[Array, "B L C+R"]  # the normalised latent, then the shared rotary key, rotated already
    length: Int[Array, " B"]  # int32, tokens seen so far in each row

    def held(self) -> Layout:
        """What the slots hold, as keys of the row's first run; empty slots are padding."""
        return _held(self.length, self.latent.shape[1])

    def append(self, latent: Float[Array, "B T C+R"], layout: Layout) -> Self:
        """The cache after T more tokens: those of the row's last segment stay, padding never enters."""
        slot, length = _place(layout, self.length, self.latent.shape[1])
        return self._replace(latent=_put(self.latent, latent, slot), length=length)


def _held(length: Int[Array, " B"], size: int) -> Layout:
    last = length[:, None] - 1
    position = last - (last - jnp.arange(size)) % size  # negative where a slot holds none
    return Layout((position >= 0).astype(jnp.int32), position)


def _place(layout: Layout, seen: Int[Array, " B"], size: int) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """The slot of each token, `size` for those that do not stay, and the rows' new lengths."""
    last = jnp.max(layout.run, axis=1)  # [B]
    current = (layout.run == last[:, None]) & (layout.run != 0)
    length = jnp.max(jnp.where(current, layout.position + 1, 0), axis=1)
    length = jnp.where(last == 0, seen, length)
    kept = current & (layout.position >= length[:, None] - size)
    return jnp.where(kept, layout.position % size, size), length.astype(jnp.int32)


def _put(ring: Array, x: Array, slot: Int[Array, "B T"]) -> Array:
    rows = jnp.arange(ring.shape[0])[:, None]
    return ring.at[rows, slot].set(x.astype(ring.dtype), mode="drop")  # slot `size` is out of range: dropped
