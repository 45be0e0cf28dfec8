"""The derivative of blockwise attention: a block of keys visits the blocks of queries that may see it.

With p = exp(logits - lse), per pair of blocks:

    dv += p^T do,   ds = p (do v^T - rowsum(do o)),   dk += scale ds^T q,   dq += scale ds k

A block of keys sums its dk and dv over its queries before they pass through the function that made them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from deltajax.layers.attention_blocks import (
    Options,
    Source,
    Visits,
    cut_blocks,
    join_blocks,
    key_block,
    logits_of,
    product,
    visible_blocks,
)
from deltajax.layers.layout import Layout
from deltajax.ops.problem import vary_like


def gradients(
    q: Float[Array, "B T H K"],
    queries: Layout,
    sources: Sequence[Source],
    params: tuple[Array, ...],
    options: Options,
    o: Float[Array, "B T H V"],
    lse: Float[Array, "NQ B H query_block"],
    d_o: Float[Array, "B T H V"],
) -> tuple[Array, tuple[tuple[Array, ...], ...], tuple[Array, ...]]:
    """Gradients of q, of each source's arrays and of the parameters, each in its array's dtype.

    Sums over blocks are in float32 or wider. `o` and `lse` are the forward's.
    """
    B, T, H, _ = q.shape
    size, wide = options.query_block, jnp.promote_types(q.dtype, jnp.float32)
    key, _ = options.shapes(sources[0], params, q.dtype)
    heads = key.shape[2]

    def grouped(x: Array) -> Array:  # [B, T, H, ...] -> [NQ, B, size, N, G, ...]
        return cut_blocks(x.reshape(B, T, heads, H // heads, *x.shape[3:]), size)

    delta = jnp.sum(d_o.astype(wide) * o.astype(wide), axis=-1)  # [B, T, H]
    per_query = (
        grouped(q),
        jax.tree.map(lambda x: cut_blocks(x, size), queries),
        grouped(d_o.astype(q.dtype)),
        lse.reshape(-1, B, heads, H // heads, size),
        jnp.moveaxis(grouped(delta), 2, -1),  # [NQ, B, N, G, size]
    )
    d_q = _zeros(per_query[0], wide)
    d_params = jax.tree.map(lambda x: _zeros(x, wide), params)
    d_sources = []
    for source in sources:
        visits = Visits.of(visible_blocks(queries, source.layout, options).T)
        d_q, d_params, d_arrays = _source(source, visits, per_query, d_q, d_params, params, options)
        d_sources.append(d_arrays)
    d_q = join_blocks(d_q, T).reshape(q.shape).astype(q.dtype)
    d_params = jax.tree.map(lambda d, x: d.astype(x.dtype), d_params, params)
    return d_q, tuple(d_sources), d_params


def _source(source: Source, visits: Visits, per_query, d_q, d_params, params, options: Options) -> Any:
    """The gradients of q (its blocks) and params with a source's part added, and those of its arrays."""
    step = options.key_step(source.layout)
    dtype = per_query[0].dtype

    def body(i, carry):
        d_q, d_params, d_arrays = carry
        block, start = key_block(source, step, i)
        (key, value), pull = jax.vjp(
            lambda arrays, params: options.make(Source(arrays, block.layout), params, dtype),
            block.arrays,
            params,
        )
        visit = jax.tree.map(lambda x: x[i], visits)
        d_q, d_key, d_value = _block(key, value, block.layout, visit, per_query, d_q, options)
        d_block, d_made = pull((d_key.astype(key.dtype), d_value.astype(value.dtype)))
        d_params = jax.tree.map(lambda total, d: total + d.astype(total.dtype), d_params, d_made)

        def put(total: Array, d: Array) -> Array:  # what the last block repeats gets zeros
            d = d + lax.dynamic_slice_in_dim(total, start, step, axis=1)
            return lax.dynamic_update_slice_in_dim(total, d, start, axis=1)

        return d_q, d_params, tuple(map(put, d_arrays, d_block))

    d_arrays = tuple(_zeros(x, x.dtype) for x in source.arrays)
    return lax.fori_loop(0, len(visits.visible), body, (d_q, d_params, d_arrays))


def _block(key, value, keys: Layout, visit: Visits, per_query, d_q, options: Options) -> Any:
    """dq (all blocks) with a block of keys' part added, and this block's dk and dv."""

    def body(n, carry):
        d_q, d_key, d_value = carry
        i = visit.order[n]
        q, queries, d_o, lse, delta = jax.tree.map(
            lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), per_query
        )
        logits, mask = logits_of(q, key, options.scale), options.mask(queries, keys)
        p = jnp.where(mask, jnp.exp(logits - lse[..., None]), 0)
        d_p = product("btngv,bsnv->bngts", d_o, value)
        d_logits = (p * (d_p - delta[..., None]) * options.scale).astype(q.dtype)
        d_value = d_value + product("bngts,btngv->bsnv", p.astype(q.dtype), d_o)
        d_key = d_key + product("bngts,btngk->bsnk", d_logits, q)
        own = lax.dynamic_index_in_dim(d_q, i, keepdims=False) + product("bngts,bsnk->btngk", d_logits, key)
        return lax.dynamic_update_index_in_dim(d_q, own, i, 0), d_key, d_value

    return lax.fori_loop(0, visit.visible, body, (d_q, _zeros(key, d_q.dtype), _zeros(value, d_q.dtype)))


def _zeros(like: Array, dtype: Any) -> Array:
    """Varying over the mesh axes that `like` varies over."""
    return vary_like(jnp.zeros(like.shape, dtype), like)
