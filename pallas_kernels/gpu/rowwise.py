"""Rows of a shared-memory array by a row index that differs between threads, which Pallas has no load for."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.gpu.tiles import ROW, L


def gather_rows(ref, index: jax.Array, n: int) -> jax.Array:
    """``ref[index[r], :]`` as row r.

    Args:
      ref: [R, n] float32, plain shared memory; rows of 32 i + 8 words avoid bank conflicts.
      index: [64] int32 in registers.
      n: number of columns, a multiple of 8.

    Returns:
      [64, n] float32.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), ROW),
        return_type=plgpu.ShapeDtypeStruct((64, n), jnp.float32, layout=L),
    )
    def gather(ctx, ref, index):
        del ctx
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        layout = L.to_mgpu()
        registers = np.empty(layout.registers_shape((64, n)), dtype=object)
        for at, row, column in _places(registers.shape, index):
            registers[at] = vector.load(pair, ref, [row, column])
        return FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return gather(ref, index)


def scatter_rows(ref, index: jax.Array, x: jax.Array) -> None:
    """``ref[index[r], :] = x[r]``; see `gather_rows`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ROW, L))
    def scatter(ctx, ref, index, x):
        del ctx
        for at, row, column in _places(x.registers.shape, index):
            vector.store(x.registers[at], ref, [row, column])

    scatter(ref, index, x)


def _places(shape: tuple[int, ...], index):
    """(place in the array of registers, row, column) of every pair of numbers that the thread holds.

    Thread l of a warp has rows l / 4 and l / 4 + 8 of the warp's 16 (fifth axis of the registers) and columns
    8 j + 2 (l % 4) and the next one (second axis).
    """
    i32, number = ir.IntegerType.get_signless(32), ir.IndexType.get()
    column = arith.muli(arith.andi(utils.thread_idx(), utils.c(3, i32)), utils.c(2, i32))
    column = arith.index_cast(number, column)
    rows = [arith.index_cast(number, _scalar(register)) for register in index.registers.flat]
    for at in np.ndindex(shape):
        yield at, rows[at[4]], arith.addi(column, utils.c(8 * at[1], number))


def _scalar(register):
    if isinstance(register.type, ir.VectorType):
        return vector.extract(register, [], ir.DenseI64ArrayAttr.get([0]))
    return register
