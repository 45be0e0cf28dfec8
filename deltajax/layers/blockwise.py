"""Softmax attention over long keys in bounded memory: blocks of queries against blocks of keys.

Plain JAX for inference: the number of key blocks that a query block visits is found at run time, so there is
no reverse-mode gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from deltajax.layers.layout import Layout, causal_mask

# Logits (batch * heads * queries * keys) that are held at once: more are made block by block.
MAX_LOGITS = 2**28
# The same within a step of the blockwise form.
STEP_LOGITS = 2**26
MAX_QUERIES, MIN_KEYS = 2048, 512


class Source(NamedTuple):
    """Keys in the form they are kept in, and where each stands."""

    arrays: tuple[Array, ...]  # each [B, S, ...]
    layout: Layout  # [B, S]


# Keys [B, S, KV, K] and values [B, S, KV, V] of a source's arrays.
KeysValues = Callable[..., tuple[Array, Array]]


def attend(
    q: Float[Array, "B T H K"],
    queries: Layout,
    sources: Sequence[Source],
    keys_values: KeysValues,
    dense: Callable[[Array, Array, Array, Array], Array],
    *,
    window: int | None = None,
    scale: float,
) -> Float[Array, "B T H V"]:
    """Attention of queries to the keys of all sources: `dense` where all logits are few, else blockwise.

    Args:
      q: [B, T, H, K].
      queries: where they stand.
      sources: keys of the same rows, side by side.
      keys_values: makes keys and values of a source's arrays; with fewer heads than H, each serves H / KV.
      dense: (q, keys, values, mask [B, 1, T, S]) -> [B, T, H, V].
      window: tokens seen, the current one included; None for all.
      scale: multiplies the logits.
    """
    B, T, H, _ = q.shape
    size = sum(source.layout.run.shape[1] for source in sources)
    if B * T * H * size > MAX_LOGITS:
        return blockwise_attention(q, queries, sources, keys_values, window=window, scale=scale)
    arrays = (jnp.concatenate([x.astype(q.dtype) for x in xs], axis=1) for xs in _columns(sources))
    keys = sources[0].layout
    for source in sources[1:]:
        keys = keys.then(source.layout)
    return dense(q, *keys_values(*arrays), causal_mask(queries, keys, window))


def _columns(sources: Sequence[Source]) -> Any:
    return zip(*(source.arrays for source in sources), strict=True)


def blockwise_attention(
    q: Float[Array, "B T H K"],
    queries: Layout,
    sources: Sequence[Source],
    keys_values: KeysValues,
    *,
    window: int | None = None,
    scale: float,
) -> Float[Array, "B T H V"]:
    """`attend`, blockwise: a query block visits the key blocks in which it may see something.

    Running maxima and sums make the softmax (arXiv 1805.02867). Padding's output is 0.
    """
    B, T, H, _ = q.shape
    block = min(T, MAX_QUERIES, max(16, STEP_LOGITS // (B * H * MIN_KEYS)))
    key_block = max(MIN_KEYS, STEP_LOGITS // (B * H * block))
    q, queries = (jax.tree.map(lambda x: _cut(x, block), x) for x in (q, queries))
    extents = [_extents(source.layout, min(key_block, source.layout.run.shape[1])) for source in sources]

    def one(args: tuple[Array, Layout]) -> Array:
        q, queries = args
        carry: Any = None
        for source, extent in zip(sources, extents, strict=True):
            carry = _visit(q, queries, source, extent, carry, keys_values, key_block, window, scale)
        _, total, o = carry
        o = o / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]  # nothing seen: 0
        return o.transpose(0, 3, 1, 2, 4).reshape(*q.shape[:3], -1).astype(q.dtype)

    o = lax.map(one, (q, queries))  # [NQ, B, block, H, V]
    return jnp.moveaxis(o, 0, 1).reshape(B, -1, *o.shape[3:])[:, :T]


def _cut(x: Array, size: int) -> Array:
    """[B, T, ...] as [N, B, size, ...]; zeros (in a layout: padding) fill the last block."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


class _Extents(NamedTuple):
    """Least and greatest run and position in each block, padding left out."""

    first_run: Int[Array, " N"]
    last_run: Int[Array, " N"]
    first: Int[Array, " N"]
    last: Int[Array, " N"]

    def may_see(self, keys: "_Extents", window: int | None) -> Bool[Array, " N"]:
        """For one block of queries: the blocks of keys that it need not skip."""
        seen = (self.first_run <= keys.last_run) & (keys.first_run <= self.last_run)
        seen = seen & (keys.first <= self.last)
        return seen if window is None else seen & (keys.last > self.first - window)


def _extents(layout: Layout, size: int) -> _Extents:
    run, position = (_cut(x, size) for x in layout)  # [N, B, size]
    real, top = run != 0, jnp.iinfo(jnp.int32).max

    def ends(x: Array) -> tuple[Array, Array]:
        axes = (1, 2)
        return jnp.min(jnp.where(real, x, top), axes), jnp.max(jnp.where(real, x, -1), axes)

    return _Extents(*ends(run), *ends(position))


def _visit(q, queries, source, extents, carry, keys_values, key_block, window, scale):
    """The softmax's running maximum and sum [B, KV, G, T] and output [B, KV, G, T, V] after a source."""
    size = source.layout.run.shape[1]
    step = min(key_block, size)
    B, T, H, K = q.shape

    def block(i: Array) -> tuple[Array, Array, Array]:
        start = jnp.minimum(i * step, size - step)  # the last block overlaps the one before: masked
        cut = lambda x: lax.dynamic_slice_in_dim(x, start, step, axis=1)  # noqa: E731
        key, value = keys_values(*(cut(x).astype(q.dtype) for x in source.arrays))
        mask = causal_mask(queries, jax.tree.map(cut, source.layout), window)
        return key, value, mask & (start + jnp.arange(step) >= i * step)

    if carry is None:
        heads, V = jax.eval_shape(lambda: block(jnp.int32(0))[1]).shape[2:]
        shape = (B, heads, H // heads, T)
        lowest = jnp.full(shape, jnp.finfo(jnp.float32).min)
        carry = (lowest, jnp.zeros(shape), jnp.zeros((*shape, V)))
    heads = carry[0].shape[1]
    q = q.reshape(B, T, heads, H // heads, K)

    own = jax.tree.map(lambda x: x[0], _extents(queries, T))
    visible = own.may_see(extents, window)
    order = jnp.argsort(~visible, stable=True)

    def body(n, carry):
        peak, total, o = carry
        key, value, mask = block(order[n])
        logits = jnp.einsum("btngk,bsnk->bngts", q, key, preferred_element_type=jnp.float32) * scale
        mask = mask[:, :, None]  # [B, 1, 1, T, S]
        new = jnp.maximum(peak, jnp.max(jnp.where(mask, logits, peak[..., None]), axis=-1))
        p = jnp.where(mask, jnp.exp(logits - new[..., None]), 0)
        kept = jnp.exp(peak - new)
        weighed = jnp.einsum(
            "bngts,bsnv->bngtv", p.astype(value.dtype), value, preferred_element_type=jnp.float32
        )
        return new, total * kept + jnp.sum(p, axis=-1), o * kept[..., None] + weighed

    return lax.fori_loop(0, jnp.sum(visible), body, carry)
