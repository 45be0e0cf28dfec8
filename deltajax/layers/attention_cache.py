"""The caches of softmax attention: a fixed ring of slots per sequence, with its own length per sequence."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deltajax.layers.attention_blocks import Source
from deltajax.layers.layout import Layout, layout_of, packed_layout


class AttentionCache(NamedTuple):
    """Keys and values of each sequence: position p sits in slot p mod L.

    With L slots the last L positions are held, so a sliding window of at most L is exact for any length,
    and full attention is exact up to L tokens (beyond, it sees the last L).
    """

    key: Float[Array, "B L KV*K"]  # rotated already
    value: Float[Array, "B L KV*K"]
    length: Int[Array, " B"]  # int32, tokens seen so far of each sequence


class LatentCache(NamedTuple):
    """What multi-head latent attention keeps of a token for all its heads; slots as in `AttentionCache`."""

    latent: Float[Array, "B L C+R"]  # the normalised latent, then the shared rotary key, rotated already
    length: Int[Array, " B"]  # int32, tokens seen so far of each sequence


class NewTokens(NamedTuple):
    """A cache and the tokens of a call that would enter it."""

    cache: Any  # AttentionCache or LatentCache
    arrays: tuple[Array, ...]  # of the tokens, [B, T, ...] each: all of the cache but its length
    layout: Layout

    def append(self, *, packed: bool) -> Any:
        """The cache with them. Those of a row's last segment stay, or of each segment; padding never enters.

        Args:
          packed: there is one row of tokens, its runs being the numbers of the cache's rows, from one.
        """
        *rings, seen = self.cache
        row, slot, length = _place(self.layout, seen, rings[0].shape[1], packed)
        put = lambda ring, x: ring.at[row, slot].set(x.astype(ring.dtype), mode="drop")  # noqa: E731
        return type(self.cache)(*map(put, rings, self.arrays), length)

    def enter(self, *, packed: bool, hold: bool) -> tuple[list[Source], Any]:
        """The keys that the tokens may see, and the cache with them, or, with `hold`, these tokens."""
        if self.layout.run.shape[1] == 1 and not hold:  # its own last key: the ring holds all it sees
            after = self.append(packed=packed)
            return [held(after, packed=packed)], after
        sources = [held(self.cache, packed=packed), Source(self.arrays, self.layout)]
        return sources, self if hold else self.append(packed=packed)

    def keep(self, counts: Int[Array, " B"]) -> Any:
        """The cache with the first `counts` tokens of each row."""
        run, position = self.layout
        kept = jnp.arange(run.shape[1]) < counts[:, None]
        return self._replace(layout=Layout(jnp.where(kept, run, 0), position)).append(packed=False)


def layout_after(
    shape: tuple[int, ...], segment_ids: Int[Array, "B T"] | None, seen: Int[Array, " B"], packed: bool
) -> Layout:
    """Where a call's tokens stand, after those that the cache has seen."""
    if packed and segment_ids is not None:
        return packed_layout(segment_ids, seen)
    return layout_of(shape[0], shape[1], segment_ids, seen)


def held(cache: Any, *, packed: bool) -> Source:
    """A cache's slots as keys of each row's first run, empty ones being padding.

    With `packed`, all slots in one row, with the numbers of the cache's rows, from one, as runs.
    """
    *rings, length = cache
    batch, size = rings[0].shape[:2]
    last = length[:, None] - 1
    position = last - (last - jnp.arange(size)) % size  # negative where a slot holds none
    number = jnp.arange(1, batch + 1)[:, None] if packed else 1
    source = Source(tuple(rings), Layout(jnp.where(position >= 0, number, 0), position))
    return jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), source) if packed else source


def _place(
    layout: Layout, seen: Int[Array, " B"], size: int, packed: bool
) -> tuple[Int[Array, "B T"], Int[Array, "B T"], Int[Array, " B"]]:
    """Each token's row of the cache and slot (`size`, out of range, if it does not stay); the new lengths."""
    run, position = layout
    if packed:
        current, row = run != 0, jnp.maximum(run - 1, 0)
    else:
        last = jnp.max(run, axis=1)  # [B]
        current = (run == last[:, None]) & (run != 0)
        row = jnp.broadcast_to(jnp.arange(run.shape[0])[:, None], run.shape)
        seen = jnp.where(last > 1, 0, seen)
    length = seen.at[row].max(jnp.where(current, position + 1, 0))
    kept = current & (position >= length[row] - size)
    return row, jnp.where(kept, position % size, size), length.astype(jnp.int32)
