"""Softmax attention over long keys in bounded memory: blocks of queries against blocks of keys.

Plain JAX. Running maxima and sums make the softmax (arXiv 1805.02867). For its derivative the output and each
query's log-sum-exp are kept; the logits are made again (`layers.blockwise_gradient`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from deltajax.layers.attention_blocks import (
    KeysValues,
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
from deltajax.layers.blockwise_gradient import gradients
from deltajax.layers.layout import Layout, causal_mask
from deltajax.ops.dispatch import SAVED
from deltajax.ops.problem import vary_alike

# Logits (batch * heads * queries * keys) of a device that are held at once, 1 GiB in float32: more are made
# block by block.
MAX_LOGITS = 2**28


def many_logits(q: Float[Array, "B T H K"], keys: int) -> bool:
    """Whether the logits of queries with that many keys each are too many to be held at once."""
    B, T, H, _ = q.shape
    return B * T * H * keys > MAX_LOGITS


def attend(
    q: Float[Array, "B T H K"],
    queries: Layout,
    sources: Sequence[Source],
    keys_values: KeysValues,
    dense: Callable[[Array, Array, Array, Array], Array],
    *,
    params: tuple[Array, ...] = (),
    window: int | None = None,
    scale: float,
) -> Float[Array, "B T H V"]:
    """Attention of queries to the keys of all sources: `dense` where all logits are few, else blockwise.

    Args:
      q: [B, T, H, K].
      queries: where they stand.
      sources: keys of the same rows, side by side.
      keys_values: makes keys and values of a source's arrays and `params`; with fewer heads than H, each
        serves H / KV.
      dense: (q, keys, values, mask [B, 1, T, S]) -> [B, T, H, V].
      params: what else `keys_values` computes from.
      window: tokens seen, the current one included; None for all.
      scale: multiplies the logits.
    """
    if many_logits(q, sum(source.layout.run.shape[1] for source in sources)):
        return blockwise_attention(
            q, queries, sources, keys_values, params=params, window=window, scale=scale
        )
    columns = zip(*(source.arrays for source in sources), strict=True)
    arrays = (jnp.concatenate([x.astype(q.dtype) for x in xs], axis=1) for xs in columns)
    keys = sources[0].layout
    for source in sources[1:]:
        keys = keys.then(source.layout)
    return dense(q, *keys_values(*arrays, *params), causal_mask(queries, keys, window))


def blockwise_attention(
    q: Float[Array, "B T H K"],
    queries: Layout,
    sources: Sequence[Source],
    keys_values: KeysValues,
    *,
    params: tuple[Array, ...] = (),
    window: int | None = None,
    scale: float,
) -> Float[Array, "B T H V"]:
    """`attend`, blockwise: a query block visits the key blocks in which it may see something.

    Padding's output is 0. Differentiable, once, in q, the sources' arrays and `params`; traced arrays that
    `keys_values` uses must stand in these.
    """
    arrays = tuple(source.arrays for source in sources)
    layouts = (queries, *(source.layout for source in sources))
    leaves, tree = jax.tree.flatten((q, arrays, params, layouts))
    q, arrays, params, layouts = jax.tree.unflatten(tree, vary_alike(*leaves))
    return _attention(q, arrays, params, layouts, Options.of(q, keys_values, window, scale))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, arrays, params, layouts: tuple[Layout, ...], options: Options) -> Array:
    return _forward(q, arrays, params, layouts, options)[0]


def _attention_fwd(q, arrays, params, layouts, options):
    # The names let remat policies keep these two, so that the loops over blocks do not run again.
    o, lse = (checkpoint_name(x, SAVED) for x in _forward(q, arrays, params, layouts, options))
    return o, (q, arrays, params, layouts, o, lse)


def _attention_bwd(options, saved, d_o):
    q, arrays, params, (queries, *keys), o, lse = saved
    sources = [Source(*pair) for pair in zip(arrays, keys, strict=True)]
    return *gradients(q, queries, sources, params, options, o, lse, d_o), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _forward(q, arrays, params, layouts, options: Options) -> tuple[Array, Array]:
    """o [B, T, H, V] and log-sum-exps [NQ, B, H, query block]."""
    queries, *keys = layouts
    sources = [Source(*pair) for pair in zip(arrays, keys, strict=True)]
    visits = [Visits.of(visible_blocks(queries, layout, options)) for layout in keys]
    B, T, H, K = q.shape
    _, value = options.shapes(sources[0], params, q.dtype)
    heads, V = value.shape[2:]
    size, wide = options.query_block, jnp.promote_types(q.dtype, jnp.float32)

    def one(args: tuple[Array, Layout, list[Visits]]) -> tuple[Array, Array]:
        q, queries, visits = args
        rows = (B, heads, H // heads, size)
        carry: Any = jnp.full(rows, jnp.finfo(wide).min), jnp.zeros(rows, wide), jnp.zeros((*rows, V), wide)
        *carry, q = vary_alike(*carry, q)
        for source, visit in zip(sources, visits, strict=True):
            carry = _visit(q, queries, source, visit, tuple(carry), params, options)
        peak, total, o = carry
        total = jnp.maximum(total, jnp.finfo(wide).tiny)  # nothing seen: o is 0
        o = (o / total[..., None]).transpose(0, 3, 1, 2, 4)
        return o.reshape(B, size, H, V).astype(q.dtype), (peak + jnp.log(total)).reshape(B, H, size)

    blocks = cut_blocks(q.reshape(B, T, heads, H // heads, K), size)
    o, lse = lax.map(one, (blocks, jax.tree.map(lambda x: cut_blocks(x, size), queries), visits))
    return join_blocks(o, T), lse


def _visit(q, queries, source, visits: Visits, carry, params, options: Options) -> Any:
    """The softmax's running maximum and sum [B, N, G, T] and output [B, N, G, T, V] after a source.

    Args:
      q: a block of queries, [B, T, N, G, K]; the rest belongs to it.
    """

    def body(n, carry):
        peak, total, o = carry
        block, _ = key_block(source, options.key_step(source.layout), visits.order[n])
        key, value = options.make(block, params, q.dtype)
        logits, mask = logits_of(q, key, options.scale), options.mask(queries, block.layout)
        new = jnp.maximum(peak, jnp.max(jnp.where(mask, logits, peak[..., None]), axis=-1))
        p = jnp.where(mask, jnp.exp(logits - new[..., None]), 0)
        kept = jnp.exp(peak - new)
        weighed = product("bngts,bsnv->bngtv", p.astype(value.dtype), value)
        return new, total * kept + jnp.sum(p, axis=-1), o * kept[..., None] + weighed

    return lax.fori_loop(0, visits.visible, body, carry)
