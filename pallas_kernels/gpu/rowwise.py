"""Register-level work that Pallas has no operation for: rows by index, masks by block level."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, math, nvvm, vector

from pallas_kernels.gpu.tiles import ROW, L


def gather(ref, index: jax.Array, n: int, together: bool = False) -> jax.Array:
    """``ref[index[r], :]`` as row r.

    Args:
      ref: [R, n] float32, plain shared memory; rows of 32 i + 8 words avoid bank conflicts.
      index: [64] int32 in registers.
      n: number of columns, a multiple of 8.
      together: the promise that rows r and r + 8 of every 16 have the same index: half of the loads.

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
            if together and at[4]:
                registers[at] = registers[*at[:4], 0, *at[5:]]
            else:
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


def corner(near: jax.Array, far: jax.Array) -> jax.Array:
    """near [64, 64] with its lower left 32 x 32 taken from far [64, 32]."""

    @plgpu.inline_mgpu(arg_types=(L, L), return_type=plgpu.ShapeDtypeStruct((64, 64), jnp.float32, layout=L))
    def join(ctx, near, far):
        del ctx
        lower = _bit(utils.thread_idx(), 64)
        registers = near.registers.copy()
        for at in np.ndindex(far.registers.shape):
            registers[at] = arith.select(lower, far.registers[at], registers[at])
        return FragmentedArray(_registers=registers, _layout=near.layout, _is_signed=None)

    return join(near, far)


def diagonal_inverse(a: jax.Array) -> jax.Array:
    """Inverse of I + A for the blocks of 16 on the diagonal of a strictly lower triangular A, else 0.

    A block belongs to a warp: rows are eliminated one after the other, by shuffles, in float32.

    Args:
      a: [64, 64] float32, zero on and above the diagonal.
    """

    @plgpu.inline_mgpu(arg_types=(L,), return_type=plgpu.ShapeDtypeStruct((64, 64), jnp.float32, layout=L))
    def invert(ctx, a):
        del ctx
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        pair = ir.VectorType.get((2,), f32)

        def c(value):
            return utils.c(value, i32)

        def from_lane(x, lane):
            return utils.bitcast(
                nvvm.shfl_sync(c(0xFFFFFFFF), utils.bitcast(x, i32), lane, c(31), nvvm.ShflKind.idx), f32
            )

        def numbers(register):
            return [vector.extract(register, [], ir.DenseI64ArrayAttr.get([i])) for i in range(2)]

        thread = utils.thread_idx()
        warp, lane = arith.andi(arith.shrui(thread, c(5)), c(3)), arith.andi(thread, c(31))
        own_warp = [arith.cmpi(arith.CmpIPredicate.eq, warp, c(w)) for w in range(4)]
        first, place = arith.andi(lane, c(28)), arith.andi(lane, c(3))

        def at(column, high):  # where column block and upper or lower 8 rows are among registers
            return (0, column, 0, 0, high, *[0] * (a.registers.ndim - 5))

        # The block's parts of 8 x 8: upper left and right (zero), lower left and right.
        part = {}
        for high in range(2):
            for side in range(2):
                x = a.registers[at(side, high)]
                for w in range(1, 4):
                    x = arith.select(own_warp[w], a.registers[at(2 * w + side, high)], x)
                part[high, side] = x
        A = {key: numbers(x) for key, x in part.items()}
        minus = {key: [arith.negf(v) for v in A[key]] for key in ((0, 0), (1, 0), (1, 1))}

        def unit(i):  # the identity, whose column 2 place + i this is
            here = arith.cmpi(arith.CmpIPredicate.eq, arith.shrui(lane, c(2)), _add(_twice(place), i))
            return arith.select(here, utils.c(1.0, f32), utils.c(0.0, f32))

        upper, right = [unit(0), unit(1)], [unit(0), unit(1)]
        lower = [utils.c(0.0, f32)] * 2

        def eliminate(x, factor, row):
            return [math.fma(factor, r, v) for r, v in zip(row, x, strict=True)]

        for i in range(8):
            source = arith.ori(first, c(i // 2))
            holds = arith.ori(place, c(4 * i))
            known = [from_lane(v, holds) for v in upper]
            if i < 7:
                upper = eliminate(upper, from_lane(minus[0, 0][i % 2], source), known)
            lower = eliminate(lower, from_lane(minus[1, 0][i % 2], source), known)
        for i in range(7):
            source = arith.ori(first, c(i // 2))
            holds = arith.ori(place, c(4 * i))
            factor = from_lane(minus[1, 1][i % 2], source)
            lower = eliminate(lower, factor, [from_lane(v, holds) for v in lower])
            right = eliminate(right, factor, [from_lane(v, holds) for v in right])

        def joined(values):
            return vector.from_elements(pair, values)

        inverse = {(0, 0): joined(upper), (0, 1): part[0, 1], (1, 0): joined(lower), (1, 1): joined(right)}
        nothing = joined([utils.c(0.0, f32)] * 2)
        registers = a.registers.copy()
        for column in range(8):
            for high in range(2):
                registers[at(column, high)] = arith.select(
                    own_warp[column // 2], inverse[high, column % 2], nothing
                )
        return FragmentedArray(_registers=registers, _layout=a.layout, _is_signed=None)

    return invert(a)


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
            if s < 4:
                column = arith.addi(first, utils.c(8 * at[1], i32))
                row = arith.addi(line, utils.c(8 * at[4], i32))
                meet = arith.shrui(arith.xori(row, column), utils.c(s, i32))
            else:  # whole warps have the same answer
                meet = arith.xori(arith.shrui(thread, utils.c(s + 1, i32)), utils.c(at[1] >> (s - 3), i32))
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


def _bit(x, mask: int):
    i32 = ir.IntegerType.get_signless(32)
    masked = arith.andi(x, utils.c(mask, i32))
    return arith.cmpi(arith.CmpIPredicate.ne, masked, utils.c(0, i32))


def _twice(x):
    return arith.addi(x, x)


def _add(x, value: int):
    return arith.addi(x, utils.c(value, ir.IntegerType.get_signless(32)))


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
