"""The rows that a mixture's experts multiply: one per token and choice, sorted by expert."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deltajax.layers.sharding import accumulator
from deltajax.ops.pallas_gpu import HALF, other_gpu
from pallas_kernels.gpu.limits import EXPERT_COLUMNS, EXPERT_ROWS


class Rows(NamedTuple):
    """Sorted rows one behind the other; those of no expert at hand come last."""

    order: Int[Array, " M"]  # sorted row -> token * J + choice, or N = tokens * J where a row is unused
    place: Int[Array, " N"]  # token * J + choice -> its row, or one that is not real
    expert: Int[Array, " M"]  # of each sorted row
    sizes: Int[Array, " E"]  # rows of each expert
    real: Array  # bool [M, 1], whether a sorted row has an expert

    @classmethod
    def of(cls, choice: Int[Array, "B T J"], first: Array | int, experts: int) -> Self:
        """Of the experts from number ``first`` on."""
        order, expert, starts = _sorted(choice, first, experts)
        place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
        real = jnp.arange(order.size) < starts[-1]
        return cls(order, place, expert, jnp.diff(starts).astype(jnp.int32), real[:, None])

    def times(self, x: Float[Array, "M n"], kernel: Float[Array, "E n m"]) -> Float[Array, "M m"]:
        """Each row by its expert's matrix; zeros for rows without an expert."""
        if few(x.shape[0], kernel.shape[0]):
            y = jnp.einsum("rn,rnm->rm", x, jnp.take(kernel, self.expert, axis=0, mode="clip"))
        else:
            y = jax.lax.ragged_dot(x, kernel, self.sizes)
        return jnp.where(self.real, y, 0)

    def back(self, x: Float[Array, "M n"], kernel: Float[Array, "E m n"]) -> Float[Array, "M m"]:
        """Each row by its expert's transposed matrix."""
        return self.times(x, kernel.swapaxes(1, 2))

    def outer(self, x: Float[Array, "M n"], y: Float[Array, "M m"]) -> Float[Array, "E n m"]:
        """`x^T y` of each expert's rows, in the accumulators' dtype."""
        rows = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
        return jax.lax.ragged_dot_general(x, y, self.sizes, rows, preferred_element_type=accumulator(x.dtype))


class Blocks(NamedTuple):
    """Rows for the Hopper kernels: each expert's start at a whole block of `EXPERT_ROWS`.

    XLA makes of `ragged_dot` on a GPU one product of all rows with all experts, each row as long as all
    experts together: 16 GiB for 65,536 rows and 64 experts of 2048 x 1024.
    """

    order: Int[Array, " M"]
    place: Int[Array, " N"]
    real: Array
    group: Int[Array, " blocks"]  # expert of each block
    first: Int[Array, " E"]  # block of each expert
    blocks: Int[Array, " E"]  # of each expert

    @classmethod
    def of(cls, choice: Int[Array, "B T J"], first: Array | int, experts: int) -> Self:
        """Of the experts from number ``first`` on. The last block, for rows of none, is not used."""
        size = EXPERT_ROWS
        order, expert, starts = _sorted(choice, first, experts)
        N = order.size
        begun = min(experts, N)  # experts that have a row, at most, and each of them one that begins a block
        M = ((N - begun) // size + begun + 1) * size
        blocks = -(-jnp.diff(starts) // size)
        block = jnp.cumulative_sum(blocks, include_initial=True)  # [E + 1]
        rank = jnp.arange(N) - starts[expert]
        row = jnp.where(expert < experts, block[expert] * size + rank, M - 1)
        taken = jnp.full(M, N, order.dtype).at[row].set(order).at[M - 1].set(N)
        place = jnp.zeros_like(order).at[order].set(row.astype(order.dtype))
        group = jnp.searchsorted(block[1:], jnp.arange(M // size), side="right")
        i32 = jnp.int32
        real = (taken < N)[:, None]
        return cls(taken, place, real, group.astype(i32), block[:-1].astype(i32), blocks.astype(i32))

    def times(self, x: Float[Array, "M n"], kernel: Float[Array, "E n m"]) -> Float[Array, "M m"]:
        """As of `Rows`."""
        return self._product(x, kernel)

    def back(self, x: Float[Array, "M n"], kernel: Float[Array, "E m n"]) -> Float[Array, "M m"]:
        """As of `Rows`."""
        return self._product(x, kernel, transposed=True)

    def outer(self, x: Float[Array, "M n"], y: Float[Array, "M m"]) -> Float[Array, "E n m"]:
        """As of `Rows`."""
        from pallas_kernels.gpu import grouped

        return grouped.grouped_outer(x, y, self.first, self.blocks)

    def _product(self, x: Array, kernel: Array, *, transposed: bool = False) -> Array:
        from pallas_kernels.gpu import grouped  # here: Mosaic GPU is slow to import

        y = grouped.grouped_product(x, kernel, self.group, self._used, transposed=transposed)
        return jnp.where(self.real, y, 0)

    @property
    def _used(self) -> Int[Array, "1"]:
        return (self.first[-1:] + self.blocks[-1:]).astype(jnp.int32)


def few(rows: int, experts: int) -> bool:
    """Whether rows are multiplied by a copy each of a matrix, as in decoding: fewer than all are read."""
    return rows <= experts


def take(rows: Rows | Blocks, x: Float[Array, "B T D"], choices: int) -> Float[Array, "M D"]:
    """Each sorted row's token; zeros for rows without an expert."""
    return jnp.where(rows.real, x.reshape(-1, x.shape[-1])[rows.order // choices], 0)


def add_up(rows: Rows | Blocks, y: Float[Array, "M D"], shape: tuple[int, ...]) -> Float[Array, "B T D"]:
    """Each token's sum over its choices, in the accumulators' dtype; `shape` is [B, T, J]."""
    y = y[rows.place].reshape(*shape, -1)
    return jnp.sum(y, axis=2, dtype=accumulator(y.dtype))


def blocks_unsupported(x: Array, width: int) -> str | None:
    """Why the Hopper kernels cannot multiply these rows, or None if they can."""
    if x.dtype not in HALF:
        return f"x must be bfloat16 or float16, got {x.dtype}"
    for name, n in (("hidden_size", x.shape[-1]), ("intermediate_size", width)):
        if n % EXPERT_COLUMNS:
            return f"{name} is a multiple of {EXPERT_COLUMNS}, got {n}"
    return other_gpu()


# Lowering platform -> its rows, which go through its own kernels.
KERNEL_ROWS: Mapping[str, Any] = {"cuda": Blocks}


def _sorted(choice: Int[Array, "B T J"], first: Array | int, experts: int) -> tuple[Array, Array, Array]:
    """token * J + choice of each row in experts' order; its expert, E for none at hand; E + 1 starts."""
    choice = choice.reshape(-1) - first
    choice = jnp.where((choice >= 0) & (choice < experts), choice, experts)
    order = jnp.argsort(choice)  # stable
    expert = choice[order]
    return order, expert, jnp.searchsorted(expert, jnp.arange(experts + 1))
