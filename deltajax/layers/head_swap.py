"""Tokens swapped for heads, where a mesh axis spreads rows; inside `jax.shard_map`.

Softmax attention with own queries on each device is unbalanced: a row's last tokens see the most.
After an exchange (arXiv 2309.14509) each device has all of the rows' tokens and some of the heads: equal
work, in a call like one without the axis.
"""

import math

from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


def swaps(q: Float[Array, "B T H K"], axis_name: str) -> bool:
    """Whether the axis' devices can share a device's heads evenly."""
    return q.shape[2] % lax.axis_size(axis_name) == 0


def queries_by_heads(q: Shaped[Array, "B T H K"], axis_name: str) -> Shaped[Array, "B nT H/n K"]:
    """All of the rows' tokens of this device's share of the heads; the n devices take them in order."""
    return lax.all_to_all(q, axis_name, split_axis=2, concat_axis=1, tiled=True)


def keys_by_heads(x: Shaped[Array, "B T KV K"], axis_name: str) -> Shaped[Array, "B nT M K"]:
    """All of the rows' tokens of those key (or value) heads that this device's query heads use.

    With H query heads, a multiple of both KV and the number of devices. A head that several devices use goes
    to each: M = lcm(KV, n) / n heads a device, which serve its H / n query heads in equal groups, in order.
    """
    heads = x.shape[2]
    copies = math.lcm(heads, lax.axis_size(axis_name)) // heads
    return queries_by_heads(jnp.repeat(x, copies, axis=2) if copies > 1 else x, axis_name)


def outputs_by_tokens(o: Shaped[Array, "B nT H/n V"], axis_name: str) -> Shaped[Array, "B T H V"]:
    """Back: this device's tokens, of all heads."""
    return lax.all_to_all(o, axis_name, split_axis=1, concat_axis=2, tiled=True)


def heads_of(x: Shaped[Array, "C H N"], axis_name: str) -> Shaped[Array, "C H/n N"]:
    """This device's heads, as `queries_by_heads` deals them, of an array that has all."""
    count = x.shape[1] // lax.axis_size(axis_name)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axis_name) * count, count, axis=1)


def whole_rows(x: Shaped[Array, "B T ..."], axis_name: str) -> Shaped[Array, "B nT ..."]:
    """An array of all of the rows' tokens."""
    return lax.all_gather(x, axis_name, axis=1, tiled=True)


def whole_ids(segment_ids: Int[Array, "B T"] | None, axis_name: str) -> Int[Array, "B nT"] | None:
    """Segment ids of all of the rows' tokens; None for None."""
    return None if segment_ids is None else whole_rows(segment_ids, axis_name)
