"""The taps of a short causal depthwise convolution on Hopper: one pass over memory forward, one backward.

A block has 64 tokens by 64 channels; neighbouring lanes share a row. The tokens before (and,
backward, after) come along as 8 more rows, and shifted rows are read from shared memory.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.channel_decay import sigmoid
from pallas_kernels.gpu.limits import HALO
from pallas_kernels.gpu.limits import TAPS_CHANNELS as CHANNELS
from pallas_kernels.gpu.limits import TAPS_ROWS as ROWS
from pallas_kernels.gpu.tiles import store

INNER = ROWS - HALO  # rows that a backward block finishes: what comes after them it has, too

# Lanes own 8 rows by 4 channels, 16 of them side by side.
TILE = plgpu.Layout.TILED(
    plgpu.Tiling(((ROWS, CHANNELS), (16, CHANNELS), (8, 4))),
    warp_dims=(-6,),
    lane_dims=(-4, -3),
    vector_dim=-1,
)
BY_ROW, BY_CHANNEL = TILE.reduce(1), TILE.reduce(0)
SHAPE = (ROWS, CHANNELS)


def taps(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, counts: jax.Array, *, silu: bool
) -> jax.Array:
    """``y_t = silu(bias + sum_j weight[j] * x_{t-j})``.

    Args:
      x: [B, T, D] bf16 or f16, D a multiple of 64.
      weight: [W, D] float32, W at most 9.
      bias: [D] float32 or None.
      counts: int32 [B, T], bit j: whether tap j counts for a token; bit 0: whether the token does.
      silu: without it, y is the sum.

    Returns:
      y: [B, T, D] in x's dtype, 0 where the token does not count.
    """
    B, T, D = x.shape
    kernel = plgpu.kernel(
        partial(_forward, taps=weight.shape[0], silu=silu),
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=dict(
            x_tile=_tile(HALO + ROWS, x.dtype),
            y_tile=_tile(ROWS, x.dtype),
            loaded=plgpu.Barrier(num_arrivals=2),
        ),
        grid=(D // CHANNELS, pl.cdiv(T, ROWS), B),
        grid_names=("channels", "tokens", "row"),
        kernel_name="short_convolution",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    return kernel(x, weight, bias, _lengthened(counts))


def taps_back(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    counts: jax.Array,
    dy: jax.Array,
    *,
    silu: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of `taps`: dx [B, T, D] in x's dtype, dweight [W, D], dbias [D] float32; dy is as y."""
    B, T, D = x.shape
    W, blocks = weight.shape[0], pl.cdiv(T, INNER)
    kernel = plgpu.kernel(
        partial(_backward, taps=W, silu=silu),
        out_type=(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((B, blocks, W + 1, D), jnp.float32),
        ),
        scratch_types=dict(
            x_tile=_tile(HALO + ROWS, x.dtype),
            dy_tile=_tile(ROWS, x.dtype),
            dz_tile=_tile(ROWS + HALO, jnp.float32),
            loaded=plgpu.Barrier(num_arrivals=3),
        ),
        grid=(D // CHANNELS, blocks, B),
        grid_names=("channels", "tokens", "row"),
        kernel_name="short_convolution_back",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=4096
        ),
    )
    dx, sums = kernel(x, weight, bias, _lengthened(counts), dy)
    sums = sums.sum(axis=(0, 1))
    return dx, sums[:W], sums[W]


def _tile(rows, dtype):
    """Shared memory said to be tiled row by row.

    Else Mosaic swizzles 8 rows at a time: it reads rows from any number but a multiple of 8 on wrongly, and
    refuses such T.
    """
    row_by_row: Any = plgpu.TilingTransform  # complete, though typed as abstract
    return plgpu.SMEM((rows, CHANNELS), dtype, transforms=(row_by_row((1, CHANNELS)),))


def _lengthened(counts: jax.Array) -> jax.Array:
    """With zeros after the last token, as far as any block looks."""
    return jnp.pad(counts, ((0, 0), (0, ROWS + HALO)))


def _fetch(x_ref, x_tile, b, start, channels, loaded):
    """Tokens from HALO before ``start`` on; before the first token, whatever: its taps do not count."""
    before = lax.max(start - HALO, 0)
    plgpu.copy_gmem_to_smem(x_ref.at[b, pl.ds(before, HALO), channels], x_tile.at[pl.ds(0, HALO)], loaded)
    plgpu.copy_gmem_to_smem(x_ref.at[b, pl.ds(start, ROWS), channels], x_tile.at[pl.ds(HALO, ROWS)], loaded)


def _by_row(x):
    return lax.broadcast_in_dim(x, SHAPE, [0])


def _load(ref, layout=TILE):
    return plgpu.load(ref, layout=layout, optimized=False)


def _counted(counts, j, x):
    """x where tap j counts, else 0, even for NaN."""
    return jnp.where(_by_row((counts >> j) & 1) != 0, x, 0.0)


def _weighted(x_tile, weight_ref, bias_ref, counts, channels, taps):
    """What the activation is taken of."""
    z = sum(
        _shifted(x_tile, counts, j).astype(jnp.float32) * _weight(weight_ref, j, channels)
        for j in range(taps)
    )
    if bias_ref is not None:
        z += _along(bias_ref.at[channels])
    return z


def _shifted(x_tile, counts, j):
    return _counted(counts, j, _load(x_tile.at[pl.ds(HALO - j, ROWS)]))


def _weight(weight_ref, j, channels):
    return _along(weight_ref.at[j, channels])


def _along(ref):
    return lax.broadcast_in_dim(_load(ref, BY_CHANNEL), SHAPE, [1])


def _place():
    c, i, b = (lax.axis_index(name) for name in ("channels", "tokens", "row"))
    return pl.ds(c * CHANNELS, CHANNELS), i, b


def _forward(x_ref, weight_ref, bias_ref, counts_ref, y_ref, *, x_tile, y_tile, loaded, taps, silu):
    channels, i, b = _place()
    start = i * ROWS
    _fetch(x_ref, x_tile, b, start, channels, loaded)
    counts = _load(counts_ref.at[b, pl.ds(start, ROWS)], BY_ROW)
    plgpu.barrier_wait(loaded)
    z = _weighted(x_tile, weight_ref, bias_ref, counts, channels, taps)
    y_tile[...] = _counted(counts, 0, z * sigmoid(z) if silu else z).astype(y_tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(y_tile, y_ref.at[b, pl.ds(start, ROWS), channels])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _backward(
    x_ref,
    weight_ref,
    bias_ref,
    counts_ref,
    dy_ref,
    dx_ref,
    sums_ref,
    *,
    x_tile,
    dy_tile,
    dz_tile,
    loaded,
    taps,
    silu,
):
    channels, i, b = _place()
    start = i * INNER
    _fetch(x_ref, x_tile, b, start, channels, loaded)
    plgpu.copy_gmem_to_smem(dy_ref.at[b, pl.ds(start, ROWS), channels], dy_tile, loaded)
    counts = _load(counts_ref.at[b, pl.ds(start, ROWS)], BY_ROW)
    plgpu.barrier_wait(loaded)
    z = _weighted(x_tile, weight_ref, bias_ref, counts, channels, taps)
    dz = _counted(counts, 0, _load(dy_tile)).astype(jnp.float32)
    if silu:
        s = sigmoid(z)
        dz = dz * (s + z * (s - s * s))
    dz_tile.at[pl.ds(0, ROWS)][...] = dz

    own = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=BY_ROW) < INNER
    own_dz = jnp.where(_by_row(own), dz, 0.0)
    for j in range(taps):
        x = _shifted(x_tile, counts, j)
        store(sums_ref.at[b, i, j, channels], (own_dz * x.astype(jnp.float32)).sum(axis=0))
    store(sums_ref.at[b, i, taps, channels], own_dz.sum(axis=0))

    plgpu.commit_smem()  # all of dz is there
    dx = jnp.zeros(SHAPE, jnp.float32)
    for j in range(taps):  # a token is tap j of the one j later
        after = _load(counts_ref.at[b, pl.ds(start + j, ROWS)], BY_ROW)
        dz = _counted(after, j, _load(dz_tile.at[pl.ds(j, ROWS)]))
        dx = dx + dz * _weight(weight_ref, j, channels)
    dy_tile[...] = dx.astype(dy_tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(dy_tile.at[pl.ds(0, INNER)], dx_ref.at[b, pl.ds(start, INNER), channels])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
