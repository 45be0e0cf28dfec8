"""The sequential half of every gate kind: the state walks over the chunks, 64 columns to a warpgroup.

A warpgroup holds S^T [64, K] in float32 registers, so that every product takes its left side from registers
and nothing but the chunk's tiles passes through shared memory; of K > 128 two warpgroups hold 128 channels
each (`sides`). What rounding could let grow from chunk to chunk (S, R and V' as operands) enters the products
as a sum of two half-precision numbers. Where operands are float16, every state column is kept in multiples of
the largest number in it or its chunk of v (the recurrence is linear in both), so that nothing overflows, and
S itself needs but one term.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import tiles
from pallas_kernels.gpu.relations import BETA, DECAY, KEEP, KEY, OUT, READ
from pallas_kernels.gpu.sides import Sides, scratch, sides_of, stages_of
from pallas_kernels.gpu.tiles import CHUNK, COLUMN, ROW, L, columns, constant, rows, split, tile
from pallas_kernels.gpu.walk_loads import Loads, Tiles, square_of
from pallas_kernels.gpu.walks import SMALLEST, WIDTH, Chunks, Enter, Kept, Plan, joined, run_states


def walk(
    chunks: Chunks,
    v: jax.Array,
    state: jax.Array | None,
    *,
    gated: bool,
    plan: Plan,
    keep: bool = False,
    spans: jax.Array | None = None,
    enter: Enter | None = None,
) -> tuple[jax.Array, jax.Array, Kept | None]:
    """Outputs and final state.

    With a chunk's factors (beta, read, out, keep, decay) and k's inverse norms n:

        R  = n v - read (k S)
        U  = R + solve (beta R)                  what is to be written, before the write strength
        V' = beta U
        o  = out (q S) + p V'
        S <- decay S + k^T (keep V')

    With nothing to ``keep`` solve has beta in it, and no U is made: V' = beta R + solve (beta R).
    With a per-channel gate norms and decays are in the operands and n = read = out = keep = 1.

    Args:
      chunks: of every 64 tokens.
      v: [B, T, HV, V]; T a multiple of 8, V of 64 ``plan.warpgroups``.
      state: [B, HV, V, K] float32, the transposed initial state, or None for zeros.
      gated: whether there is a decay (always with a per-channel gate).
      plan: the layout.
      keep: whether to return what the backward pass needs.
      spans: [B, N, 2] int32, first chunk and number of chunks of each segment, where every segment has a
        state of its own, [B, N, HV, V, K] the initial and final ones. Nothing is written for other chunks.
      enter: where the state that enters (``state`` is None then) depends on what the tokens do to it: takes
        N^T [B, HV, V, K] and M^T [B, HV, K, K], float32, of S^T -> S^T M^T + N^T. Not with ``spans``.

    Returns:
      o [B, T, HV, V] in v's dtype, the transposed final state [B, HV, V, K] float32, `Kept` or None.
    """
    B, _, HV, V = v.shape
    K = chunks.reads.shape[-1]
    call = partial(_call, chunks, v, gated=gated, weighed=not keep)
    if spans is not None:
        plan = dataclasses.replace(plan, runs=spans.shape[1])
        no_runs = jnp.zeros((B, 0, HV, K, K), jnp.float32)
        o, final, *kept = call(state, plan=plan, outputs=True, keep=keep, spans=spans)
        return o, final, Kept(kept[0], kept[1], no_runs) if keep else None
    moved = jnp.zeros((B, 0, HV, K, K), jnp.float32)
    if plan.runs > 1 or enter is not None:
        whole = keep or enter is not None
        action = call(None, plan=plan, outputs=False, keep=whole)
        added, moved = action[..., :V, :], action[..., V:, :]
        if enter is not None:
            state = enter(*joined(added, moved))
        state = run_states(added, moved, state, plan.runs)
    elif state is not None:
        state = state[:, None]
    o, final, *kept = call(state, plan=plan, outputs=True, keep=keep)
    return o, final[:, -1], Kept(kept[0], kept[1], moved) if keep else None


def _call(chunks, v, state, *, gated, plan, weighed, outputs, keep=False, spans=None):
    """The kernel: ``outputs``, states behind each run and what to ``keep``; or the runs' actions.

    ``weighed`` says that solve has beta in it.
    Of the last run's action nobody but a backward pass, for which one is to ``keep``, makes use.
    """
    if not outputs:
        plan = dataclasses.replace(plan, warpgroups=1)
    elif keep:
        plan = dataclasses.replace(plan, stages=2)  # shared memory goes to what is kept
    B, _, HV, V = v.shape
    K, dtype = chunks.reads.shape[-1], chunks.reads.dtype
    channel = chunks.keys is not None
    NC, num_factors = chunks.factors.shape[2], chunks.num_factors
    stages, warpgroups, sides = plan.stages, plan.warpgroups, sides_of(K)
    width, ring = K // sides, stages_of(stages, K)
    late = channel and sides == 2  # one stage of what only a step's second half reads: memory holds no more
    late_ring = (sides,) if late else ring
    squares = (CHUNK, CHUNK) if late else (stages, CHUNK, CHUNK)
    num_late = late * (1 + outputs + 2 * sides)
    shared: dict[str, Any] = scratch(K) | dict(
        k_tile=tile((*ring, CHUNK, width), dtype),
        v_tile=tile((stages, warpgroups, CHUNK, WIDTH), v.dtype),
        t_tile=tile(squares, dtype),
        factor_tile=plgpu.SMEM((stages + sides * late, num_factors, CHUNK), jnp.float32),
        loaded=plgpu.Barrier(
            num_arrivals=2 + outputs + sides * (1 + 2 * channel + outputs) + warpgroups - num_late,
            num_barriers=stages,
        ),
        free=plgpu.Barrier(num_arrivals=warpgroups * sides, num_barriers=stages),
    )
    if channel:
        shared["key_tile"] = tile((*late_ring, CHUNK, width), dtype)
        shared["decay_tile"] = plgpu.SMEM((*late_ring, width), jnp.float32)
    if late:
        del shared["most_tile"]  # lies behind the factors: a small array takes a KiB
        shared["late_loaded"] = plgpu.Barrier(num_arrivals=num_late)
        shared["late_free"] = plgpu.Barrier(num_arrivals=sides)
    shared["out_tiles"] = _out_tiles(
        plan.warpgroups * sides, width, v.dtype, sides, outputs, outputs and keep
    )
    if outputs:
        q_tile = tile((*ring, CHUNK, width), dtype)
        # A side's product with the state goes where its part of q lay.
        asked = tile((*ring, CHUNK, WIDTH), jnp.float32)
        shared["q_tile"] = plgpu.RefUnion(q_tile, asked) if sides == 2 else q_tile
        shared["p_tile"] = tile(squares, dtype)
        runs, rows_out = plan.runs, V
    else:
        runs, rows_out = plan.runs - 1 + keep, V + K
    states_out = jax.ShapeDtypeStruct((B, runs, HV, rows_out, K), jnp.float32)
    results: tuple[Any, ...] = (jax.ShapeDtypeStruct(v.shape, v.dtype), states_out)
    if keep and outputs:
        results += (
            jax.ShapeDtypeStruct((B, HV, NC, V, K), jnp.bfloat16),
            jax.ShapeDtypeStruct((2, *v.shape), jnp.bfloat16),
        )
    no_scratch: dict[str, Any] = dict(reduction_scratch_bytes=0) if late else {}  # no sum crosses warps
    kernel = plgpu.kernel(
        partial(_body, num_chunks=NC, gated=gated, plan=plan, weighed=weighed, outputs=outputs),
        out_type=results if outputs else states_out,
        scratch_types=shared,
        grid=(rows_out // (WIDTH * warpgroups), HV, B * runs),
        grid_names=("columns", "head", "batch_run"),
        num_threads=warpgroups * sides,
        thread_name="warpgroup",
        kernel_name="delta_walk" if outputs else "delta_runs",
        # Staging outputs already keeps the warps together: `commit_smem` and `wait_smem_to_gmem`.
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=outputs,
            **no_scratch,
        ),
    )
    return kernel(chunks, v, state, spans)


def _out_tiles(warpgroups, width, dtype, sides, outputs, keep) -> Any:
    """A warpgroup's own shared memory, for one after the other: the state, what sides share, U's terms, o."""
    several = 2 if keep or sides == 2 else 1
    union = []
    if outputs:
        union.append(tile((warpgroups, several, CHUNK, WIDTH), dtype))
    if keep:
        union.append(tile((warpgroups, 2, CHUNK, WIDTH), jnp.bfloat16))
        union.append(tile((warpgroups, 2 * CHUNK * WIDTH // width, width), jnp.bfloat16))
    if sides == 2:
        union.append(tile((warpgroups, CHUNK, WIDTH), jnp.float32))
    return plgpu.RefUnion(*union) if len(union) > 1 else tuple(union)


def _body(
    chunks,
    v_ref,
    state_ref,
    spans_ref,
    *refs,
    k_tile,
    v_tile,
    t_tile,
    factor_tile,
    loaded,
    free,
    num_chunks,
    gated,
    plan,
    weighed,
    outputs,
    q_tile=None,
    p_tile=None,
    out_tiles: Any = (),
    key_tile=None,
    decay_tile=None,
    late_loaded=None,
    late_free=None,
    **met,
):
    o_ref, final_ref, *kept_refs = refs if outputs else (None, *refs)
    own_tiles = list(out_tiles)
    out_tile: Any = own_tiles.pop(0) if outputs else None
    written_tile: Any = own_tiles.pop(0) if kept_refs else None
    state_tile: Any = own_tiles.pop(0) if kept_refs else None
    share_tile: Any = own_tiles.pop(0) if own_tiles else None
    h, wg = lax.axis_index("head"), lax.axis_index("warpgroup")
    if late_loaded is not None:
        met["most_tile"] = factor_tile.at[pl.ds(plan.stages, 2), 0]
    sides = Sides(chunks.reads.shape[-1], **met)
    side, of_side = sides.mine, sides.channels(sides.mine)
    asked_tile: Any = None
    if sides.number == 2 and outputs:
        q_tile, asked_tile = q_tile
    num_runs = final_ref.shape[1]
    b, run = (lax.div(lax.axis_index("batch_run"), num_runs), lax.rem(lax.axis_index("batch_run"), num_runs))
    of_block = 0 if sides.number == 2 else wg  # which of the block's column tiles
    first_row = (lax.axis_index("columns") * plan.warpgroups + of_block) * WIDTH
    mine = pl.ds(first_row, WIDTH)
    width, dtype, V = sides.width, chunks.reads.dtype, v_ref.shape[-1]
    scaled = dtype == jnp.float16
    square = (WIDTH, CHUNK)
    channel = chunks.keys is not None
    group = v_ref.shape[2] // chunks.reads.shape[2]
    stages, ahead = plan.stages, plan.stages - 1
    # Rows past V are of M: they start from the identity and see no values.
    v_columns = mine if outputs else pl.ds(lax.min(first_row, V - WIDTH), WIDTH)
    per_run = pl.cdiv(num_chunks, plan.runs)
    start = run * per_run
    even = num_chunks % plan.runs == 0
    count: Any = per_run if even else lax.min(per_run, num_chunks - start)
    if spans_ref is not None:
        even, start, count = False, spans_ref[b, run, 0], spans_ref[b, run, 1]

    loads = Loads(
        chunks,
        v_ref,
        Tiles(k_tile, v_tile, t_tile, factor_tile, loaded, q_tile, p_tile, key_tile, decay_tile, late_loaded),
        sides,
        wg,
        place=(b, h, h // group),
        start=start,
        of_block=of_block,
        v_columns=v_columns,
    )

    @pl.loop(0, min(ahead, per_run) if even else lax.min(ahead, count))
    def _first(i):
        loads.chunk(i, i)

    if late_loaded is not None:

        @pl.when((wg == 0) & (count > 0))
        def _first_late():
            loads.late(0)

    if state_ref is not None:
        S = plgpu.load(state_ref.at[b, run, h, mine, of_side], layout=L, optimized=False)
        S = S * 1.0  # in a shard_map what is loaded varies over the mesh, unlike what the loop makes of it
    elif outputs:
        S = plgpu.layout_cast(jnp.zeros((WIDTH, width), jnp.float32), L)
    else:
        row, column = (plgpu.broadcasted_iota(jnp.int32, (WIDTH, width), axis, layout=L) for axis in (0, 1))
        S = jnp.where(column == row + (first_row - V - side * width), 1.0, 0.0)

    def first_side(f):
        if sides.number == 1:
            f()
        else:
            pl.when(side == 0)(f)

    def step(i, carry):
        S, unit = carry  # S^T [V, K] in multiples of unit [V]
        slot = lax.rem(i, stages)
        factor = factor_tile.at[slot]

        def by_token(which):
            return columns(plgpu.load(factor.at[which], layout=COLUMN), square)

        def load_v():
            v = plgpu.load(v_tile.at[slot, of_block].transpose((1, 0)), layout=L).astype(jnp.float32)
            if outputs:
                return v
            of_state = plgpu.broadcasted_iota(jnp.int32, square, 0, layout=L) + first_row < V
            return jnp.where(of_state, v, 0.0)

        if scaled:
            plgpu.barrier_wait(loaded.at[slot])
            v = load_v()
            most = jnp.maximum(sides.most(jnp.abs(S).max(axis=1)) * unit, jnp.abs(v).max(axis=1))
            most = jnp.maximum(most, SMALLEST)
            root = lax.rsqrt(most)
            per_unit = root * root
            S, v, unit = S * rows(unit * per_unit, S.shape), v * rows(per_unit, square), most
            S_terms: tuple[jax.Array, ...] = (S.astype(dtype),)
        else:
            S_terms = split(S, dtype)
            plgpu.barrier_wait(loaded.at[slot])

        def residual(kS):
            values = v if scaled else load_v()
            return values - kS if channel else values * by_token(KEY) - kS * by_token(READ)

        if state_tile is not None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            entering = S * rows(unit, S.shape) if scaled else S
            state = state_tile.at[wg, pl.ds(0, WIDTH)]
            state[...] = entering.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(state, kept_refs[0].at[b, h, start + i, mine, of_side])

        kt = sides.part(k_tile, slot).transpose((1, 0))
        reads = [(term, kt) for term in S_terms]

        def shared(x, before=lambda: None):
            if outputs:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            return sides.add(share_tile, x, before=before)

        if outputs:
            asks = [(S_terms[0], sides.part(q_tile, slot).transpose((1, 0)))]
            if sides.number == 1:
                R, o = tiles.product_beside(CHUNK, reads, asks, residual)  # [V, C]
            else:
                kS, o = tiles.product_beside(CHUNK, reads, asks, lambda x: x)

                def share_asked():
                    @pl.when(side == 1)
                    def _asked():
                        asked_tile[slot, 1] = o

                R = residual(shared(kS, share_asked))
        else:
            kS = tiles.product(CHUNK, *reads)
            R = residual(kS if sides.number == 1 else shared(kS))
        if sides.number == 2:
            sides.take()

        @pl.when(i + ahead < count)
        def _prefetch():
            next_slot = lax.rem(i + ahead, stages)

            @pl.when((wg == 0) & (i > 0))
            def _wait():
                plgpu.barrier_wait(free.at[next_slot])

            loads.chunk(i + ahead, next_slot)

        late_slot: Any = slot
        if late_loaded is not None:
            plgpu.barrier_wait(late_loaded)
            late_slot = None
        tt = square_of(t_tile, late_slot).transpose((1, 0))
        strong = R * by_token(BETA)
        solved = [(term, tt) for term in split(strong, dtype)]
        written = tiles.add_products((strong if weighed else R, solved))[0]  # V'^T or U^T [V, C]

        if sides.number == 2:
            sides.wait_taken()
        if state_tile is not None:
            terms = split(written * rows(unit, square) if scaled else written, jnp.bfloat16)
            here = pl.ds((start + i) * CHUNK, CHUNK)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for j, term in enumerate(terms):
                written_tile.at[wg, j].transpose((1, 0))[...] = term
            plgpu.commit_smem()

            def keep_written():
                for j in range(2):
                    plgpu.copy_smem_to_gmem(written_tile.at[wg, j], kept_refs[1].at[j, b, here, h, mine])

            first_side(keep_written)
        values = written if weighed else written * by_token(BETA)
        new_terms = kept_terms = split(values, dtype)
        if channel:
            S = S * columns(plgpu.load(sides.part(decay_tile, late_slot), layout=COLUMN), S.shape)
        elif gated:
            kept_terms = split(values * by_token(KEEP), dtype)
            S = S * rows(plgpu.load(factor.at[DECAY], layout=ROW), S.shape)
        keys = sides.part(key_tile, late_slot) if channel else sides.part(k_tile, slot)
        kept = [(term, keys) for term in kept_terms]
        if outputs:
            asked = [(term, square_of(p_tile, late_slot).transpose((1, 0))) for term in new_terms]
        if outputs and sides.number == 1:
            S, o = tiles.add_products(
                (S, kept), (o if channel else o * by_token(OUT), asked)
            )  # [V, K], [V, C]
        else:
            S = tiles.add_products((S, kept))[0]

        def leave(o):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if scaled:
                o = o * rows(unit, square)
            out_tile.at[wg, 0].transpose((1, 0))[...] = o.astype(out_tile.dtype)
            plgpu.commit_smem()
            here = pl.ds((start + i) * CHUNK, CHUNK)
            plgpu.copy_smem_to_gmem(out_tile.at[wg, 0], o_ref.at[b, here, h, mine])

        if outputs and sides.number == 2:

            @pl.when(side == 0)
            def _both():
                both = o + tiles.load(asked_tile.at[slot, 1])
                leave(tiles.add_products((both if channel else both * by_token(OUT), asked))[0])

        @pl.when(i + stages < count)  # somebody will wait
        def _free():
            plgpu.barrier_arrive(free.at[slot])

        if late_free is not None:

            @pl.when(i + 1 < count)
            def _late():
                plgpu.barrier_arrive(late_free)

                @pl.when(wg == 0)
                def _next():
                    plgpu.barrier_wait(late_free)
                    loads.late(i + 1)

        if outputs and sides.number == 1:
            leave(o)
        return S, unit

    S, unit = lax.fori_loop(0, count, step, (S, constant(1.0, ROW)))
    final_ref.at[b, run, h, mine, of_side][...] = S * rows(unit, S.shape) if scaled else S
    plgpu.wait_smem_to_gmem(0)
