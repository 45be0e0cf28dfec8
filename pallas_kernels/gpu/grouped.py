"""Products of rows with their group's matrix, where groups of rows are of any size: the experts of a mixture.

Rows lie sorted by group, and each group starts at a multiple of `ROWS`: no block of rows has two groups. What
is left of a group's last block holds zeros. Blocks past the last group are neither read nor written.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import tiles
from pallas_kernels.gpu.limits import EXPERT_COLUMNS as COLUMNS
from pallas_kernels.gpu.limits import EXPERT_ROWS as ROWS

DEPTH = 64  # channels (or rows, for sums over them) that one turn of the pipeline multiplies
STAGED = 64  # rows of a result that pass through shared memory at a time


class Tiling(NamedTuple):
    """How a kernel runs.

    Attributes:
      warpgroups: that multiply, each its own columns. Of 1, it also loads; beside 2, one more does. Rows of a
        result that are no whole number of 256 columns are of 1 always.
      stages: turns whose blocks are in shared memory.
    """

    warpgroups: int
    stages: int


PRODUCT, OUTER = Tiling(2, 4), Tiling(2, 3)  # what fits into shared memory; not yet timed on a card


def grouped_product(
    x: jax.Array, matrices: jax.Array, group: jax.Array, used: jax.Array, *, transposed: bool = False
) -> jax.Array:
    """``y[r] = x[r] @ matrices[group of r]``.

    Args:
      x: [M, n] bfloat16 or float16; M, n multiples of 128.
      matrices: [G, n, m], or [G, m, n] to be transposed; m a multiple of 128.
      group: int32 [M / 128], of each block of rows.
      used: int32 [1], blocks that have a group.

    Returns:
      y: [M, m] in x's dtype, summed in float32; whatever was there in blocks that are not used.
    """
    M, n = x.shape
    m = matrices.shape[1 if transposed else 2]
    tiling = _fitting(PRODUCT, m)
    columns = m // (COLUMNS * tiling.warpgroups)
    return _kernel(
        partial(_product, transposed=transposed, depth=n // DEPTH, columns=columns, tiling=tiling),
        "grouped_product",
        jax.ShapeDtypeStruct((M, m), x.dtype),
        M // ROWS * columns,
        tiling,
    )(x, matrices, group, used)


def grouped_outer(x: jax.Array, y: jax.Array, first: jax.Array, count: jax.Array) -> jax.Array:
    """``x^T y`` of each group's rows.

    Args:
      x: [M, n] bfloat16 or float16; M, n multiples of 128.
      y: [M, m] of the same dtype; m a multiple of 128.
      first: int32 [G], each group's first block of 128 rows.
      count: int32 [G], its blocks.

    Returns:
      [G, n, m] float32; zeros for groups without rows.
    """
    n, m, G = x.shape[1], y.shape[1], first.shape[0]
    tiling = _fitting(OUTER, m)
    rows, columns = n // ROWS, m // (COLUMNS * tiling.warpgroups)
    return _kernel(
        partial(_outer, rows=rows, columns=columns, tiling=tiling),
        "grouped_outer",
        jax.ShapeDtypeStruct((G, n, m), jnp.float32),
        G * rows * columns,
        tiling,
    )(x, y, first, count)


def _fitting(tiling: Tiling, m: int) -> Tiling:
    return tiling if m % (COLUMNS * tiling.warpgroups) == 0 else tiling._replace(warpgroups=1)


def _kernel(body, name: str, out: jax.ShapeDtypeStruct, blocks: int, tiling: Tiling) -> Any:
    """A program of one block of the result for each of so many."""
    # Every warpgroup has a place of its own for what it stores.
    staged = tiles.tile((tiling.warpgroups, STAGED, COLUMNS), out.dtype)
    threads: dict[str, Any] = {}
    if tiling.warpgroups > 1:
        threads = dict(num_threads=tiling.warpgroups + 1, thread_name="wg")
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=dict(staged=staged),
        grid=(blocks,),
        grid_names=("block",),
        **threads,
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _block(shape: tuple[int, int], index) -> Any:
    """Half-precision blocks that wgmma reads; a turn's are kept until the next turn's products run."""
    tiling: Any = plgpu.TilingTransform  # complete, though typed as abstract
    swizzle: Any = plgpu.SwizzleTransform
    return plgpu.BlockSpec(shape, index, transforms=(tiling((8, 64)), swizzle(128)), delay_release=1)


def _product(x_ref, matrices_ref, group_ref, used_ref, y_ref, *, staged, transposed, depth, columns, tiling):
    i = lax.axis_index("block")
    row, column = lax.div(i, columns), lax.rem(i, columns)  # neighbours share rows, then a group's matrix
    width = COLUMNS * tiling.warpgroups

    def own(matrix_tile, wg):
        """A warpgroup's columns of the matrix."""
        part = pl.ds(wg * COLUMNS, COLUMNS)
        return matrix_tile.at[part].transpose((1, 0)) if transposed else matrix_tile.at[:, part]

    @pl.when(row < used_ref[0])
    def _():
        if transposed:
            matrix = _block((width, DEPTH), lambda k: (column, k))
        else:
            matrix = _block((DEPTH, width), lambda k: (k, column))
        _sum_products(
            lambda wg, x_tile, matrix_tile: (x_tile, own(matrix_tile, wg)),
            lambda total, wg: _store(total, staged.at[wg], y_ref, row, column * tiling.warpgroups + wg),
            depth,
            (_block((ROWS, DEPTH), lambda k: (row, k)), matrix),
            (x_ref, matrices_ref.at[group_ref[row]]),
            tiling,
        )


def _outer(x_ref, y_ref, first_ref, count_ref, out_ref, *, staged, rows, columns, tiling):
    i = lax.axis_index("block")
    group, row, column = lax.div(i, rows * columns), lax.rem(lax.div(i, columns), rows), lax.rem(i, columns)
    start, turns = first_ref[group] * (ROWS // DEPTH), count_ref[group] * (ROWS // DEPTH)  # none or >= 2
    x = _block((DEPTH, ROWS), lambda k: (start + k, row))
    y = _block((DEPTH, COLUMNS * tiling.warpgroups), lambda k: (start + k, column))

    def store(total, wg):
        _store(total, staged.at[wg], out_ref.at[group], row, column * tiling.warpgroups + wg)

    _sum_products(
        lambda wg, x_tile, y_tile: (x_tile.transpose((1, 0)), y_tile.at[:, pl.ds(wg * COLUMNS, COLUMNS)]),
        store,
        turns,
        (x, y),
        (x_ref, y_ref),
        tiling,
    )


def _sum_products(factors, store, turns, specs, refs, tiling: Tiling) -> None:
    """Sums products over a pipeline's turns.

    Args:
      factors: of (a warpgroup's number, blocks of a turn), what it multiplies then.
      store: function of the sum [128, 128] of a warpgroup, and its number.
      turns: how many, perhaps none.
      specs, refs: of the blocks.
      tiling: of the kernel.
    """
    accumulator = plgpu.ACC((ROWS, COLUMNS), jnp.float32)
    stages = min(tiling.stages, turns) if isinstance(turns, int) else tiling.stages
    common: dict[str, Any] = dict(grid=(turns,), in_specs=specs, max_concurrent_steps=stages)

    def multiply(total, wg, *blocks):
        plgpu.wgmma(total, *factors(wg, *blocks))
        plgpu.wgmma_wait(1)  # of all turns but this one

    if tiling.warpgroups == 1:

        def alone(total):
            plgpu.emit_pipeline(lambda _, *blocks: multiply(total, 0, *blocks), **common)(*refs)
            return total[...]

        store(pl.run_scoped(alone, accumulator), 0)
        return

    wg = lax.axis_index("wg")

    def turn(_, *args):
        *blocks, total = args
        multiply(total, wg, *blocks)
        return total

    def compute(pipeline):
        def beside(total):
            pipeline(total)
            return total[...]

        store(pl.run_scoped(beside, accumulator), wg)

    plgpu.emit_pipeline_warp_specialized(
        turn,
        memory_registers=40,
        wg_axis="wg",
        num_compute_wgs=tiling.warpgroups,
        compute_context=compute,
        **common,
    )(*refs)


def _store(total, staged, ref, row, column) -> None:
    """A warpgroup's sum to its place in the result, by way of its own shared memory."""
    for start in range(0, ROWS, STAGED):
        staged[...] = total[start : start + STAGED].astype(staged.dtype)
        plgpu.commit_smem()
        where = pl.ds(row * ROWS + start, STAGED), pl.ds(column * COLUMNS, COLUMNS)
        plgpu.copy_smem_to_gmem(staged, ref.at[where])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # before it is written again
