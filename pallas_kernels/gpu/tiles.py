"""Shared-memory tiles and the small register idioms that every kernel here uses."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 64  # tokens a chunk: one warpgroup's rows in a wgmma

L = plgpu.Layout.WGMMA  # [64, N], rows over warps
ROW = L.reduce(1)  # [64], one value per row
COLUMN = L.reduce(0)  # [N], one value per column


def tile(shape: tuple[int, ...], dtype) -> plgpu.SMEM:
    """A shared-memory tile that TMA fills and (half precision) wgmma reads; its last axis is 64 or 128."""
    tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(128)))


def constant(value: float, layout, n: int = CHUNK) -> jax.Array:
    """[n] of one value, as registers of the given layout."""
    return plgpu.layout_cast(jnp.full((n,), value, jnp.float32), layout)


def rows(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """[R] to [R, N], constant along rows."""
    return lax.broadcast_in_dim(x, shape, [0])


def columns(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """[N] to [R, N], constant along columns."""
    return lax.broadcast_in_dim(x, shape, [1])


def iota(axis: int) -> jax.Array:
    """[64, 64] row (axis 0) or column (axis 1) numbers."""
    return plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=L)


def split(x: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """float32 as the sum of two half-precision numbers, for products that keep about 16 (bf16) bits."""
    high = x.astype(dtype)
    return high, (x - high.astype(jnp.float32)).astype(dtype)


def product(n: int, *pairs) -> jax.Array:
    """[64, n] float32: the sum of ``a @ b`` over pairs (a in registers or SMEM, b in SMEM)."""

    def multiply(acc):
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)
        return acc[...]

    return plgpu.layout_cast(pl.run_scoped(multiply, plgpu.ACC((CHUNK, n), jnp.float32)), L)


def add_product(x: jax.Array, *pairs) -> jax.Array:
    """``x`` plus the sum of ``a @ b`` over pairs, accumulated in x's registers."""

    def multiply(acc):
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)

    return plgpu.layout_cast(pl.run_state(multiply)(plgpu.ACC.init(x)), L)
