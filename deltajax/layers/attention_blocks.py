"""Blocks of queries and of keys: which may see something of which, and how they are cut from arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from deltajax.layers.layout import Layout, causal_mask

# Logits (batch * heads * queries * keys) that a step holds; fewer than 512 x 512 a head make slow products.
STEP_LOGITS = 2**26
MAX_QUERIES, MIN_KEYS = 2048, 512


class Source(NamedTuple):
    """Keys in the form they are kept in, and where each stands."""

    arrays: tuple[Array, ...]  # each [B, S, ...]
    layout: Layout  # [B, S]


# Keys [B, S, KV, K] and values [B, S, KV, V] of a source's arrays, given with the parameters behind them.
KeysValues = Callable[..., tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class Options:
    """What blockwise attention is besides its arrays: who makes keys and values, what is seen, the blocks."""

    keys_values: KeysValues
    window: int | None
    scale: float
    query_block: int
    key_block: int

    @classmethod
    def of(cls, q: Array, keys_values: KeysValues, window: int | None, scale: float) -> "Options":
        """With blocks of at most `STEP_LOGITS` logits where B * H allows products of 16 x `MIN_KEYS`."""
        B, T, H, _ = q.shape
        query_block = min(T, MAX_QUERIES, max(16, STEP_LOGITS // (B * H * MIN_KEYS)))
        key_block = max(MIN_KEYS, STEP_LOGITS // (B * H * query_block))
        return cls(keys_values, window, scale, query_block, key_block)

    def key_step(self, layout: Layout) -> int:
        """Keys of a block of a source with that layout."""
        return min(self.key_block, layout.run.shape[1])

    def make(self, source: Source, params: tuple[Array, ...], dtype: Any) -> tuple[Array, Array]:
        """Keys and values of a source, in the queries' dtype."""
        return self.keys_values(*(x.astype(dtype) for x in source.arrays), *params)

    def shapes(self, source: Source, params: tuple[Array, ...], dtype: Any) -> tuple[Any, Any]:
        """Of what `make` returns."""
        return jax.eval_shape(lambda source, params: self.make(source, params, dtype), source, params)

    def mask(self, queries: Layout, keys: Layout) -> Bool[Array, "B 1 1 T S"]:
        """Which keys each query sees."""
        return causal_mask(queries, keys, self.window)[:, :, None]


class Visits(NamedTuple):
    """For each block of one side the blocks of the other to visit: the first `visible` of `order`."""

    order: Int[Array, "N M"]
    visible: Int[Array, " N"]

    @classmethod
    def of(cls, visible: Bool[Array, "N M"]) -> "Visits":
        """To the blocks that are visible."""
        return cls(jnp.argsort(~visible, axis=1, stable=True), jnp.sum(visible, axis=1))


def visible_blocks(queries: Layout, keys: Layout, options: Options) -> Bool[Array, "NQ NK"]:
    """Whether a block of queries may see a key of a block of keys."""
    of_queries = jax.tree.map(lambda x: x[:, None], _extents(queries, options.query_block))
    return of_queries.may_see(_extents(keys, options.key_step(keys)), options.window)


def cut_blocks(x: Array, size: int) -> Array:
    """[B, T, ...] as [N, B, size, ...]; zeros (in a layout: padding) fill the last block."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def join_blocks(x: Array, length: int) -> Array:
    """[N, B, size, ...] as [B, length, ...]: what `cut_blocks` cut."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]


def key_block(source: Source, step: int, i: Int[Array, ""]) -> tuple[Source, Int[Array, ""]]:
    """A source's block i, and where it starts.

    The last block begins early enough to be whole; what it repeats is padding in its layout.
    """
    start = jnp.minimum(i * step, source.layout.run.shape[1] - step)
    block = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, step, axis=1), source)
    run, position = block.layout
    run = jnp.where(start + jnp.arange(step) >= i * step, run, 0)
    return Source(block.arrays, Layout(run, position)), start


def logits_of(q: Float[Array, "B T N G K"], key: Float[Array, "B S N K"], scale: float) -> Array:
    """[B, N, G, T, S], in float32 or wider."""
    return product("btngk,bsnk->bngts", q, key) * scale


def product(terms: str, a: Array, b: Array) -> Array:
    """An einsum of arrays of one dtype, summed and returned in float32 or wider."""
    return jnp.einsum(terms, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


class _Extents(NamedTuple):
    """Least and greatest run and position in each block, padding left out."""

    first_run: Int[Array, "*N"]
    last_run: Int[Array, "*N"]
    first: Int[Array, "*N"]
    last: Int[Array, "*N"]

    def may_see(self, keys: "_Extents", window: int | None) -> Bool[Array, "*N"]:
        """For blocks of queries: the blocks of keys that they need not skip."""
        seen = (self.first_run <= keys.last_run) & (keys.first_run <= self.last_run)
        seen = seen & (keys.first <= self.last)
        return seen if window is None else seen & (keys.last > self.first - window)


def _extents(layout: Layout, size: int) -> _Extents:
    run, position = (cut_blocks(x, size) for x in layout)  # [N, B, size]
    real, top = run != 0, jnp.iinfo(jnp.int32).max

    def ends(x: Array) -> tuple[Array, Array]:
        axes = (1, 2)
        return jnp.min(jnp.where(real, x, top), axes), jnp.max(jnp.where(real, x, -1), axes)

    return _Extents(*ends(run), *ends(position))


def one_size(q: Array, key: Array, value: Array, unit: int = 1) -> tuple[Array, Array, Array]:
    """With heads of one size, a multiple of the unit: zeros fill the smaller."""
    size = -(-max(key.shape[-1], value.shape[-1]) // unit) * unit
    return widened(q, size), widened(key, size), widened(value, size)


def widened(x: Float[Array, "B T H K"], size: int) -> Float[Array, "B T H {size}"]:
    """With so many channels, zeros behind its own."""
    return jnp.pad(x, [(0, 0)] * 3 + [(0, size - x.shape[-1])]) if size > x.shape[-1] else x
