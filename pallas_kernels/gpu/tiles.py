"""Shared-memory tiles and the small register idioms that every kernel here uses."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.limits import CHUNK

HALF = 64  # channels at a time

L = plgpu.Layout.WGMMA  # [64, N], rows over warps
ROW = L.reduce(1)  # [64], one value per row
COLUMN = L.reduce(0)  # [N], one value per column


def tile(shape: tuple[int, ...], dtype) -> Any:
    """A shared-memory tile that TMA fills and (half precision) wgmma reads; its last axis is 64 or 128."""
    tiling: Any = plgpu.TilingTransform  # complete, though typed as abstract
    swizzle: Any = plgpu.SwizzleTransform
    transforms = (tiling((8, 128 // jnp.dtype(dtype).itemsize)), swizzle(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def place_from_the_end(shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """Batch row, head and chunk of a block of a grid ("block",) over all of them, ``shape`` [B, HV, NC].

    The sequences' last chunks come first: what is written for their first ones is still in the L2 cache when
    a walk begins with these.
    """
    B, HV, NC = shape
    i = lax.axis_index("block")
    return lax.rem(lax.div(i, HV), B), lax.rem(i, HV), NC - 1 - lax.div(i, B * HV)


def constant(value: float, layout, n: int = CHUNK) -> jax.Array:
    """[n] of one value, as registers of the given layout."""
    return plgpu.layout_cast(jnp.full((n,), value, jnp.float32), layout)


def rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[R] to [R, N], constant along rows."""
    return lax.broadcast_in_dim(x, shape, [0])


def columns(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[N] to [R, N], constant along columns."""
    return lax.broadcast_in_dim(x, shape, [1])


def iota(axis: int) -> jax.Array:
    """[64, 64] row (axis 0) or column (axis 1) numbers."""
    return plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=L)


def meet() -> None:
    """Waits for the warpgroup's other warps: `commit_smem` where no product or copy reads what was stored."""

    @plgpu.inline_mgpu()
    def wait(ctx):
        del ctx
        utils.warpgroup_barrier()

    wait()


def split(x: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """float32 as the sum of two half-precision numbers, for products that keep about 16 (bf16) bits."""
    high = x.astype(dtype)
    return high, (x - high.astype(jnp.float32)).astype(dtype)


def load(ref) -> jax.Array:
    """A [64, N] tile as float32 in registers."""
    return plgpu.load(ref, layout=L).astype(jnp.float32)


def store(ref, x: jax.Array) -> None:
    """``ref[...] = x`` in global memory, also where a row is no whole number of 128-byte lines."""
    if hasattr(plgpu, "store"):  # since jax 0.12, whose plain stores want whole lines
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


def cut(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`split` into bf16 by cutting bits off: one bit less, and several instructions."""
    high = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & -(1 << 16), jnp.float32)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def product(n: int, *pairs) -> jax.Array:
    """[64, n] float32: the sum of ``a @ b`` over pairs (a in registers or SMEM, b in SMEM)."""
    return products(n, pairs)[0]


def products(n: int, *sums) -> tuple[jax.Array, ...]:
    """Several sums of products at once, each as for `product`; ``a`` may be a function that loads it late."""

    def multiply(*accumulators):
        for pairs in zip(*sums, strict=True):
            for accumulator, (a, b) in zip(accumulators, pairs, strict=True):
                plgpu.wgmma(accumulator, a() if callable(a) else a, b)
        return tuple(accumulator[...] for accumulator in accumulators)

    out = pl.run_scoped(multiply, *[plgpu.ACC((CHUNK, n), jnp.float32)] * len(sums))
    return tuple(plgpu.layout_cast(x, L) for x in out)


def looped_products(n: int, count: int, num: int, turn) -> tuple[jax.Array, ...]:
    """``num`` sums of products over the turns of a loop, each [64, n] float32.

    Args:
      n: columns.
      count: turns.
      num: sums.
      turn: function of the turn's number: returns the pairs of every sum, as for `product` and all in shared
        memory, and a function to call when they are no longer needed.
    """

    def multiply(*accumulators):
        for j in range(count):  # a loop would carry the accumulators: ptxas then serializes products
            sums, done = turn(j)
            for accumulator, pairs in zip(accumulators, sums, strict=True):
                for a, b in pairs:
                    plgpu.wgmma(accumulator, a, b)
            plgpu.wgmma_wait(0)
            done()

        return tuple(accumulator[...] for accumulator in accumulators)

    out = pl.run_scoped(multiply, *[plgpu.ACC((CHUNK, n), jnp.float32)] * num)
    return tuple(plgpu.layout_cast(x, L) for x in out)


def product_beside(n: int, first, second, use) -> tuple[jax.Array, jax.Array]:
    """``use`` of the first sum of products, computed while the second runs; and the second, each [64, n]."""

    def multiply(a_sum, b_sum):
        for a, b in first:
            plgpu.wgmma(a_sum, a, b)
        for a, b in second:
            plgpu.wgmma(b_sum, a, b)
        used = use(plgpu.layout_cast(plgpu.wgmma_accumulator_load(a_sum, wait_n=len(second)), L))
        return used, b_sum[...]

    used, other = pl.run_scoped(multiply, *[plgpu.ACC((CHUNK, n), jnp.float32)] * 2)
    return used, plgpu.layout_cast(other, L)


def add_products(*sums) -> tuple[jax.Array, ...]:
    """For each of the sums (x, pairs): x plus ``a @ b`` over pairs, accumulated in x's registers."""

    def multiply(accumulators):
        for accumulator, (_, pairs) in zip(accumulators, sums, strict=True):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)

    out = pl.run_state(multiply)(tuple(plgpu.ACC.init(x) for x, _ in sums))
    return tuple(plgpu.layout_cast(x, L) for x in out)
