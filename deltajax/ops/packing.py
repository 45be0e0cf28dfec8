"""Packed rows laid out for chunks: every segment begins at a chunk's first token.

Used when each segment has a state of its own (``num_segments``). Costs at most one partly filled chunk for
each segment; rows whose segments only reset need none of this.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deltajax.ops import segments


class Layout(NamedTuple):
    """Where tokens go, and which segment enters and leaves at each chunk."""

    source: Int[Array, "B T2"]  # token of the row at each aligned position; T where there is none
    target: Int[Array, "B T"]  # aligned position of each token; T2 for padding
    entry: Int[Array, "NC B"]  # segment (0-based) whose first chunk this is, else -1
    exit: Int[Array, "NC B"]  # segment whose last chunk this is, else -1


def aligned_length(T: int, num_segments: int, chunk_size: int) -> int:
    """Enough aligned positions for any split of T tokens into ``num_segments`` segments."""
    return (T + num_segments * (chunk_size - 1)) // chunk_size * chunk_size


def spans(segment_ids: Int[Array, "B T"], num_segments: int, chunk_size: int) -> Int[Array, "B N 2"]:
    """Each segment's first chunk and number of chunks (0 if it has no tokens) in the aligned row."""
    counts = jnp.sum(segment_ids[:, :, None] == jnp.arange(1, num_segments + 1), axis=1)  # [B, N]
    chunks = -(-counts // chunk_size)
    return jnp.stack([jnp.cumsum(chunks, axis=1) - chunks, chunks], axis=-1)  # in order of id


def layout(segment_ids: Int[Array, "B T"], num_segments: int, chunk_size: int) -> Layout:
    """Aligns the segments of each row; ids are 1..N, each segment's tokens together."""
    B, T = segment_ids.shape
    T2 = aligned_length(T, num_segments, chunk_size)
    NC = T2 // chunk_size
    real = segment_ids != 0
    ids = jnp.arange(1, num_segments + 1)
    first_chunk, chunks = jnp.unstack(spans(segment_ids, num_segments, chunk_size), axis=-1)  # [B, N]

    index = jnp.cumsum(real, axis=1) - 1  # among the row's real tokens
    start = jnp.max(
        jnp.where(
            segments.starts(segment_ids)[:, :, None] & (segment_ids[:, :, None] == ids), index[:, :, None], 0
        ),
        axis=1,
    )  # [B, N], index of each segment's first token
    segment = jnp.maximum(segment_ids - 1, 0)
    offset = first_chunk * chunk_size - start
    target = jnp.where(real, index + jnp.take_along_axis(offset, segment, axis=1), T2)

    row = jnp.arange(B)[:, None]
    source = jnp.full((B, T2), T).at[row, target].set(jnp.arange(T)[None], mode="drop")
    segment_index = jnp.broadcast_to(jnp.arange(num_segments), (B, num_segments))
    none = jnp.full((B, NC), -1)
    entry = none.at[row, jnp.where(chunks > 0, first_chunk, NC)].set(segment_index, mode="drop")
    last_chunk = jnp.where(chunks > 0, first_chunk + chunks - 1, NC)
    exit_ = none.at[row, last_chunk].set(segment_index, mode="drop")
    return Layout(source, target, entry.T, exit_.T)


def take(x: Float[Array, "B T ..."], index: Int[Array, "B T2"]) -> Float[Array, "B T2 ..."]:
    """Rows of ``x`` at ``index``; 0 where the index is past the end."""
    return x.at[jnp.arange(x.shape[0])[:, None], index].get(mode="fill", fill_value=0)
