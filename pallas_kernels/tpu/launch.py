"""How arrays are cut into the kernels' blocks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.chunk import Refs
from pallas_kernels.tpu.config import VMEM_LANES, Blocks, Config

VMEM_LIMIT = 48 * 2**20  # bytes, of 64 MiB on the smallest of v5e, v5p, v6e and tpu7x


class Saved(NamedTuple):
    """What the backward kernel needs beside the inputs."""

    states: Any  # [B, HV, chunks, V, K]: S^T entering each chunk, as the products read it
    inverses: Any  # [B, HV / n, chunks, C, n C] float32: T


class Segments(NamedTuple):
    """Which state enters and leaves at each block of tokens; int32 [B, blocks]."""

    segment: jax.Array  # the segment of the block
    first: jax.Array  # 1: the block is its segment's first
    last: jax.Array  # 1: the block is its segment's last


def is_first(segments: Segments | None, row, block) -> Any:
    """Whether a state enters at this block of tokens. Without ``segments`` a row is one segment."""
    return block == 0 if segments is None else segments.first[row, block] != 0


def is_last(segments: Segments | None, row, block, blocks) -> Any:
    """Whether a state leaves at this one of a row's ``blocks``."""
    return block == blocks - 1 if segments is None else segments.last[row, block] != 0


def unit_heads(blocks: Blocks) -> list[list[int]]:
    """Value heads of a block in pairs, or alone where they do not come in pairs."""
    n = 2 if blocks.heads % 2 == 0 else 1
    return [list(range(h, h + n)) for h in range(0, blocks.heads, n)]


def units_of(blocks: Blocks, config: Config) -> list[tuple[int, list[int]]]:
    """(chunk, heads) of each unit of a block, in the order of the recurrence."""
    return [(c, heads) for c in range(blocks.tokens // config.chunk) for heads in unit_heads(blocks)]


At = Callable[[Any], Any]  # grid step -> block of tokens


class Layout:
    """Block specifications and arranged operands of one call. Grid: (row, block of heads, step)."""

    def __init__(self, arrays: Refs, blocks: Blocks, config: Config):
        self.arrays, self.blocks, self.config = arrays, blocks, config
        self.B, self.T, self.HV, _ = arrays.v.shape
        self.steps = pl.cdiv(self.T, blocks.tokens)
        self.chunks = blocks.tokens // config.chunk  # of one block
        self.n = len(unit_heads(blocks)[0])
        inputs = [x for x in arrays if x is not None]
        # Inside a shard_map, results vary over every mesh axis that an input varies over.
        self.varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in inputs))

    def shape(self, shape, dtype) -> jax.ShapeDtypeStruct:
        """Of a result."""
        return jax.ShapeDtypeStruct(
            shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=self.varying)
        )

    def token_block(self, width: int, heads: int, at: At, part: int = 0) -> pl.BlockSpec:
        """[1, tokens, heads, width] of [B, T, heads, .], lanes from part * width."""
        return pl.BlockSpec((1, self.blocks.tokens, heads, width), lambda b, h, t, _: (b, at(t), h, part))

    def token_blocks(self, D: int, heads: int, at: At) -> tuple[pl.BlockSpec, ...]:
        """The same, 128 lanes a block: of wider blocks a head cannot be read with strides."""
        width = min(D, VMEM_LANES)
        return tuple(self.token_block(width, heads, at, part) for part in range(D // width))

    def row_block(self, at: At) -> pl.BlockSpec:
        """Per-token scalars [1, 1, 1, heads, tokens], arranged by `by_block`."""
        return pl.BlockSpec(
            (1, 1, 1, self.blocks.heads, self.blocks.tokens), lambda b, h, t, _: (b, h, at(t), 0, 0)
        )

    def state_block(self, at: At) -> pl.BlockSpec:
        """[1, 1, heads, K, V] of the state of the segment at a block of tokens."""
        return pl.BlockSpec(
            (1, 1, self.blocks.heads, self.blocks.K, self.blocks.V),
            lambda b, h, t, segments: (b, 0 if segments is None else segments.segment[b, at(t)], h, 0, 0),
        )

    def input_specs(self, at: At) -> Refs:
        """Of `inputs`."""
        a, blocks = self.arrays, self.blocks
        head_block = pl.BlockSpec((1, blocks.heads, blocks.K), lambda b, h, t, _: (h, 0, 0))
        g = (
            self.token_blocks(blocks.K, blocks.heads, at)
            if self.config.gate == "channel"
            else self.row_block(at)
        )
        return Refs(
            q=self.token_blocks(blocks.K, blocks.key_heads, at),
            k=self.token_blocks(blocks.K, blocks.key_heads, at),
            v=self.token_blocks(blocks.V, blocks.heads, at),
            g=None if a.g is None else g,
            beta=self.row_block(at),
            rate=None if a.rate is None else head_block,
            dt_bias=None if a.dt_bias is None else head_block,
            marks=None if a.marks is None
            else pl.BlockSpec((1, 1, 4, blocks.tokens), lambda b, h, t, _: (b, at(t), 0, 0)),
        )  # fmt: skip

    def by_block(self, x: jax.Array) -> jax.Array:
        """[B, T, HV] -> [B, HV / heads, steps, heads, tokens]: a block's scalars as rows; zeros behind T."""
        x = jnp.pad(x, ((0, 0), (0, self.steps * self.blocks.tokens - self.T), (0, 0)))
        x = x.reshape(self.B, self.steps, self.blocks.tokens, self.HV // self.blocks.heads, self.blocks.heads)
        return x.transpose(0, 3, 1, 4, 2)

    def from_blocks(self, x: jax.Array) -> jax.Array:
        """The inverse of `by_block`."""
        return x.transpose(0, 2, 4, 1, 3).reshape(self.B, -1, self.HV)[:, : self.T]

    def inputs(self) -> Refs:
        """The operands as `input_specs` cuts them."""
        a, blocks = self.arrays, self.blocks

        def parts(x):
            return (x,) * max(1, x.shape[-1] // VMEM_LANES)

        def by_head(x):
            return None if x is None else x.reshape(self.HV // blocks.heads, blocks.heads, blocks.K)

        g: Any = a.g
        if g is not None:
            g = parts(g) if self.config.gate == "channel" else self.by_block(g)
        marks = a.marks
        if marks is not None:
            marks = marks.reshape(self.B, 4, self.steps, blocks.tokens).transpose(0, 2, 1, 3)
        return Refs(
            parts(a.q),
            parts(a.k),
            parts(a.v),
            g,
            self.by_block(a.beta),
            by_head(a.rate),
            by_head(a.dt_bias),
            marks,
        )

    def saved_specs(self, states_at: At, inverses_at: At) -> Saved:
        """Of `Saved`."""
        heads, C, n = self.blocks.heads, self.config.chunk, self.n
        V, K, chunks = self.blocks.V, self.blocks.K, self.chunks
        return Saved(
            pl.BlockSpec((1, heads, chunks, V, K), lambda b, h, t, _: (b, h, states_at(t), 0, 0)),
            pl.BlockSpec((1, heads // n, chunks, C, n * C), lambda b, h, t, _: (b, h, inverses_at(t), 0, 0)),
        )

    def saved_shapes(self) -> Saved:
        """Of `Saved`."""
        C, n, chunks = self.config.chunk, self.n, self.steps * self.chunks
        return Saved(
            self.shape((self.B, self.HV, chunks, self.blocks.V, self.blocks.K), self.blocks.work),
            self.shape((self.B, self.HV // n, chunks, C, n * C), jnp.float32),
        )

    def compiler_params(self) -> pltpu.CompilerParams:
        """Rows and heads may go to different cores; tokens go in order."""
        return pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        )
