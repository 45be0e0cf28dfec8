"""The lookup of token embeddings, and its gradient, where the table lies on several devices."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from deltajax.layers.sharding import MatrixGradient, OpSharding, op_sharding


def embed_tokens(
    table: Float[Array, "vocab D"], tokens: Int[Array, "B T"], dtype: DTypeLike
) -> Float[Array, "B T D"]:
    """``table[tokens]`` in `dtype`; the table's gradient is summed in its own dtype.

    Under `shard_ops` each device looks up its own tokens: the table is rounded, then gathered along the axes
    that the tokens share. Where the vocabulary lies on others, each device looks up what it holds.
    """
    where = op_sharding()
    if where is None:
        return _take(table, tokens, dtype)
    return _sharded(table, tokens, jnp.dtype(dtype), where)


def _take(table, tokens, dtype):
    return jnp.take(table, tokens, axis=0).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _sharded(table, tokens, dtype, where: OpSharding) -> Array:
    per_token, _, placement, columns = _places(table, tokens, where)
    # Pinned where it lay, so that the rounded table is what a gather moves.
    lies = NamedSharding(where.mesh, P(*(axes or None for axes in placement)))
    table = jax.lax.with_sharding_constraint(table.astype(dtype), lies)

    def local(table, tokens):
        index, held = _own(table, tokens, columns)
        x = jnp.take(table, index, axis=0)
        return jax.lax.psum(jnp.where(held[..., None], x, 0), columns) if columns else x

    return jax.shard_map(
        local, mesh=where.mesh, in_specs=(P(columns or None), per_token), out_specs=per_token
    )(table, tokens)


def _sharded_fwd(table, tokens, dtype, where):
    # An empty array carries the table's shape and dtype.
    return _sharded(table, tokens, dtype, where), (tokens, jnp.zeros((0, *table.shape), table.dtype))


def _sharded_bwd(dtype, where, residuals, dx):
    tokens, like = residuals
    table = jax.ShapeDtypeStruct(like.shape[1:], like.dtype)
    per_token, spread, placement, columns = _places(table, tokens, where)
    gradient = MatrixGradient.of(spread, placement, (columns, ()))

    def local(tokens, dx):
        own = jnp.zeros((table.shape[0] // where.size(columns), table.shape[1]), table.dtype)
        index, held = _own(own, tokens, columns)
        return gradient.reduce(own.at[index].add(jnp.where(held[..., None], dx, 0).astype(table.dtype)))

    d_table = jax.shard_map(local, mesh=where.mesh, in_specs=(per_token, per_token), out_specs=gradient.spec)(
        tokens, dx
    )
    return d_table, None


_sharded.defvjp(_sharded_fwd, _sharded_bwd)


def _places(table: Any, tokens: Any, where: OpSharding) -> tuple[P, Any, Any, Any]:
    """The tokens' partition and axes, the axes of the table's dimensions, and of its first those left."""
    rows, sequence = where.token_axes(tokens.shape)
    spread = rows + sequence
    placement = where.dividing(where.vocab, table.shape[0]), where.dividing(where.embed, table.shape[1])
    columns = tuple(axis for axis in placement[0] if axis not in spread)
    return P(rows or None, sequence or None), spread, placement, columns


def _own(table: Array, tokens: Array, columns: tuple[str, ...]) -> tuple[Array, Array]:
    """Each token's row in a device's part of the table, and whether it is there."""
    index = tokens - (jax.lax.axis_index(columns) * table.shape[0] if columns else 0)
    held = (index >= 0) & (index < table.shape[0])
    return jnp.where(held, index, 0), held
