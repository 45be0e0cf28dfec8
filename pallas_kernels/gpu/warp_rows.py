"""Rows gathered within a warp's 16 rows of a [64, N] register array, which Pallas has no operation for."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, vector

from pallas_kernels.gpu.tiles import L

# A warp holds rows 16 w..16 w + 15: lane l has row l / 4 in registers [.., 0, ..] and row l / 4 + 8 in
# registers [.., 1, ..] of the fifth axis, columns 8 j + 2 (l % 4) and the next one for each j.
_HALF_AXIS = 4


def border_rows(x: jax.Array, size: int) -> jax.Array:
    """Each row replaced by the last row of the even block of its pair of blocks of ``size`` rows.

    Args:
      x: [64, N] float32.
      size: 1, 2, 4 or 8; or 16 for the last row of the warp's own 16.
    """

    @plgpu.inline_mgpu(arg_types=(L,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=L))
    def gather(ctx, x):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        lane = arith.remui(utils.thread_idx(), utils.c(32, i32))
        column = arith.andi(lane, utils.c(3, i32))
        match size:
            case 1:  # row & ~1
                source, half = arith.andi(lane, utils.c(0b11011, i32)), None
            case 2:  # (row & ~3) + 1
                source, half = arith.addi(arith.andi(lane, utils.c(16, i32)), _plus(column, 4)), None
            case 4:  # (row & 8) + 3
                source, half = _plus(column, 12), None
            case 8:  # 7
                source, half = _plus(column, 28), 0
            case 16:  # 15
                source, half = _plus(column, 28), 1
            case _:
                raise ValueError(f"no gather for blocks of {size} rows")
        registers = x.registers.copy()
        for index, register in _enumerate(x.registers):
            if half is None:
                registers[index] = _shuffle(register, source)
            elif index[_HALF_AXIS] == half:
                value = _shuffle(register, source)
                for i in (0, 1):
                    registers[(*index[:_HALF_AXIS], i, *index[_HALF_AXIS + 1 :])] = value
        return type(x)(_registers=registers, _layout=x.layout, _is_signed=x.is_signed)

    return gather(x)


def store_warp_row(x: jax.Array, out) -> None:
    """Writes the first row of each warp's 16 rows of x [64, N] float32 to ``out`` [4, N], plain SMEM."""

    @plgpu.inline_mgpu(arg_types=(L, plgpu.RefType()))
    def store(ctx, x, out):
        del ctx
        i32, index_type = ir.IntegerType.get_signless(32), ir.IndexType.get()
        thread = utils.thread_idx()
        lane = arith.remui(thread, utils.c(32, i32))
        warp = arith.index_cast(
            index_type, arith.divui(arith.remui(thread, utils.c(128, i32)), utils.c(32, i32))
        )
        column = arith.index_cast(index_type, arith.muli(arith.andi(lane, utils.c(3, i32)), utils.c(2, i32)))
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, lane, utils.c(4, i32))):
            for index, register in _enumerate(x.registers):
                if index[_HALF_AXIS] == 0:
                    where = arith.addi(column, utils.c(8 * index[1], index_type))
                    vector.store(register, out, [warp, where])

    store(x, out)


def _plus(x, value: int):
    return arith.addi(x, utils.c(value, ir.IntegerType.get_signless(32)))


def _enumerate(registers):
    return [(index, registers[index]) for index in np.ndindex(registers.shape)]


def _shuffle(pair, lane):
    """A vector of two float32 from another lane of the warp."""
    i32 = ir.IntegerType.get_signless(32)
    for i in (0, 1):
        position = ir.DenseI64ArrayAttr.get([i])
        x = vector.extract(pair, dynamic_position=[], static_position=position)
        x = nvvm.shfl_sync(utils.c(0xFFFFFFFF, i32), x, lane, utils.c(0x1F, i32), nvvm.ShflKind.idx)
        pair = vector.insert(x, pair, dynamic_position=[], static_position=position)
    return pair
