"""Register-level work that Pallas has no operation for: rows by index, masks by block level."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.gpu.tiles import ROW, L


def gather(ref, index: jax.Array, n: int) -> jax.Array:
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
    def load(ctx, ref, index):
        del ctx
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        layout = L.to_mgpu()
        registers = np.empty(layout.registers_shape((64, n)), dtype=object)
        for at, row, column in _places(registers.shape, index):
            registers[at] = vector.load(pair, ref, [row, column])
        return FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load(ref, index)


def scatter(ref, index: jax.Array, x: jax.Array) -> None:
    """``ref[index[r], :] = x[r]``; see `gather`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ROW, L))
    def store(ctx, ref, index, x):
        del ctx
        for at, row, column in _places(x.registers.shape, index):
            vector.store(x.registers[at], ref, [row, column])

    store(ref, index, x)


def keep_level(x: jax.Array, s: int) -> jax.Array:
    """x where ``(row ^ column) >> s == 1``, else 0: where tokens meet as blocks of 2^s double.

    `jnp.where` would compare for each number and, after a conversion, select halves of registers. From s = 1
    on the two columns that share a register share their answer.

    Args:
      x: [64, 64] float16.
      s: static, at least 1.
    """

    @plgpu.inline_mgpu(arg_types=(L,), return_type=plgpu.ShapeDtypeStruct((64, 64), jnp.float16, layout=L))
    def keep(ctx, x):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        thread = arith.andi(utils.thread_idx(), utils.c(127, i32))
        # Row 16 w + l / 4 (+ 8) of lane l in warp w; columns 8 j + 2 (l % 4) and the next one.
        line = arith.addi(
            arith.shli(arith.shrui(thread, utils.c(5, i32)), utils.c(4, i32)),
            arith.shrui(arith.andi(thread, utils.c(31, i32)), utils.c(2, i32)),
        )
        first = arith.shli(arith.andi(thread, utils.c(3, i32)), utils.c(1, i32))
        registers = x.registers.copy()
        nothing = utils.c(0, i32)
        for at in np.ndindex(registers.shape):
            column = arith.addi(first, utils.c(8 * at[1], i32))
            row = arith.addi(line, utils.c(8 * at[4], i32))
            meet = arith.shrui(arith.xori(row, column), utils.c(s, i32))
            here = arith.cmpi(arith.CmpIPredicate.eq, meet, utils.c(1, i32))
            bits = arith.select(here, utils.bitcast(registers[at], i32), nothing)
            registers[at] = utils.bitcast(bits, registers[at].type)
        return FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return keep(x)


def pick_level(xs: list[jax.Array], level: jax.Array) -> tuple[jax.Array, ...]:
    """`keep_level` of several arrays, with a traced s of 0..5: ``level`` is s for every row, [64] int32.

    From s = 3 on whole registers stay or go, by the distance ``y ^ j`` of their 8 rows and 8 columns; below,
    those with ``y = j`` stay, in part: the same part of each.
    """
    shape = plgpu.ShapeDtypeStruct((64, 64), jnp.float16, layout=L)

    @plgpu.inline_mgpu(arg_types=(ROW, *[L] * len(xs)), return_type=(shape,) * len(xs))
    def pick(ctx, level, *xs):
        del ctx
        i32 = ir.IntegerType.get_signless(32)

        def c(value):
            return utils.c(value, i32)

        def equal(x, y):
            return arith.cmpi(arith.CmpIPredicate.eq, x, y)

        thread = arith.andi(utils.thread_idx(), c(127))
        warp, lane = arith.shrui(thread, c(5)), arith.andi(thread, c(31))
        s = _scalar(level.registers.flat[0])
        fine = arith.cmpi(arith.CmpIPredicate.ult, s, c(3))
        # Distances that stay, one bit each: {0}, or 2^(s-3) up to 2^(s-2).
        ones = arith.shli(c(1), arith.shli(c(1), arith.subi(s, c(3))))  # 2^(2^(s-3))
        distances = arith.muli(arith.subi(ones, c(1)), ones)
        distances = arith.select(fine, c(1), distances)
        # By columns j of row block 2 warp: distances whose bits trade places as in j ^ 2 warp.
        for bit, low in ((1, 0x33), (2, 0x0F)):
            swap = arith.andi(arith.shrui(warp, c(bit - 1)), c(1))
            shift = c(2 << (bit - 1))
            moved = arith.ori(
                arith.shli(arith.andi(distances, c(low)), shift),
                arith.andi(arith.shrui(distances, shift), c(low)),
            )
            distances = arith.select(equal(swap, c(1)), moved, distances)
        next_row = arith.ori(
            arith.shli(arith.andi(distances, c(0x55)), c(1)),
            arith.andi(arith.shrui(distances, c(1)), c(0x55)),
        )

        # Which of a register's two numbers, where blocks of 8 meet themselves.
        line = arith.shrui(lane, c(2))
        meet = arith.xori(line, arith.shli(arith.andi(lane, c(3)), c(1)))
        low = arith.select(equal(arith.shrui(meet, s), c(1)), c(0xFFFF), c(0))
        odd = arith.shrui(arith.xori(meet, c(1)), s)
        high = arith.select(equal(odd, c(1)), c(0xFFFF0000 - (1 << 32)), c(0))
        part = arith.select(fine, arith.ori(low, high), c(-1))

        picked = [x.registers.copy() for x in xs]
        for at in np.ndindex(picked[0].shape):
            rows = (distances, next_row)[at[4]]
            goes = equal(arith.andi(rows, c(1 << at[1])), c(0))
            mask = arith.select(goes, c(0), part)
            for registers in picked:
                bits = arith.andi(utils.bitcast(registers[at], i32), mask)
                registers[at] = utils.bitcast(bits, registers[at].type)
        return tuple(
            FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)
            for registers, x in zip(picked, xs, strict=True)
        )

    return pick(level, *xs)


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
