"""The sequential half of the backward pass: the state's gradient walks back over the chunks.

The mirror image of `recurrence`: a warpgroup holds 64 columns of the gradient, transposed, in float32
registers; sums that could carry rounding from chunk to chunk enter products as two half-precision terms, and
float16 operands (a per-channel gate) see every column in multiples of its largest number.
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
from pallas_kernels.gpu.walks import SMALLEST, WIDTH, Chunks, Enter, Plan, joined, run_states


def walk_back(
    chunks: Chunks,
    do: jax.Array,
    dfinal: jax.Array,
    moved: jax.Array,
    *,
    gated: bool,
    plan: Plan,
    spans: jax.Array | None = None,
    leave: Enter | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of what the walk computes from the values.

    In `recurrence.walk`'s terms, with dS the gradient of the state that leaves the chunk:

        dV' = p^T dO + keep (k dS)
        dR  = dV' + solve^T (beta dV')           times beta: the gradient of R
        dS <- decay dS + q^T (out dO) - k^T (read beta dR)

    Args:
      chunks: as for `recurrence.walk`.
      do: [B, T, HV, V] bf16 or f16, the gradient of o.
      dfinal: [B, HV, V, K] float32, the transposed gradient of the final state.
      moved: of `walks.Kept`.
      gated: whether there is a decay.
      plan: the layout, as for `recurrence.walk` and with as many runs.
      spans: as for `recurrence.walk`, with a gradient of every segment's final and initial state.
      leave: where the walk had ``enter``: takes D^T and M of dS^T -> dS^T M + D^T, what all tokens do to the
        gradient of the state that leaves them, and returns that gradient; ``dfinal`` is not read then.

    Returns:
      dR [terms, B, T, HV, V] bf16, the sum of two terms with a per-head decay (its gradient needs them); the
      values' gradient ``n beta dR`` [B, T, HV, V] in do's dtype; the transposed gradients of the states that
      leave the chunks [B, HV, NC, V, K] bf16 and, float32, of the initial state [B, HV, V, K].
    """
    plan = dataclasses.replace(plan, stages=2)
    if spans is not None:
        plan = dataclasses.replace(plan, runs=spans.shape[1])
        return _call(chunks, do, dfinal, gated, plan, outputs=True, spans=spans)
    state = dfinal[:, None]
    if plan.runs > 1 or leave is not None:
        one = dataclasses.replace(plan, warpgroups=1)
        added = _call(chunks, do, None, gated, one, outputs=False, whole=leave is not None)
        # Backwards, a run takes dS^T to dS^T M + what its outputs add.
        added, moved = added[:, ::-1], moved[:, ::-1].mT
        if leave is not None:
            dfinal = leave(*joined(added, moved))
        state = run_states(added, moved, dfinal, plan.runs)[:, ::-1]
    dr, dv, dstates, dinitial = _call(chunks, do, state, gated, plan, outputs=True)
    return dr, dv, dstates, dinitial[:, 0]


def _call(chunks, do, state, gated, plan, *, outputs, spans=None, whole=False):
    """The kernel; without ``outputs``, what those of each run but the first (``whole``: of each) add."""
    B, _, HV, V = do.shape
    K, dtype = chunks.reads.shape[-1], chunks.reads.dtype
    NC, num_factors = chunks.factors.shape[2], chunks.num_factors
    channel = chunks.keys is not None
    stages, warpgroups, sides = plan.stages, plan.warpgroups, sides_of(K)
    width, ring = K // sides, stages_of(stages, K)
    late = channel and sides == 2  # one stage of what only a step's end reads: memory holds no more
    late_ring = (sides,) if late else ring
    shared: dict[str, Any] = scratch(K) | dict(
        q_tile=tile((*late_ring, CHUNK, width), dtype),
        k_tile=tile((*late_ring, CHUNK, width), dtype),
        p_tile=tile((stages, CHUNK, CHUNK), dtype),
        t_tile=tile((stages, CHUNK, CHUNK), dtype),
        do_tile=tile((stages, warpgroups, CHUNK, WIDTH), do.dtype),
        factor_tile=plgpu.SMEM((stages, num_factors, CHUNK), jnp.float32),
        loaded=plgpu.Barrier(
            num_arrivals=3 + sides * (2 + 2 * channel - 2 * late) + warpgroups, num_barriers=stages
        ),
        free=plgpu.Barrier(num_arrivals=warpgroups * sides, num_barriers=stages),
    )
    if channel:
        shared["key_tile"] = tile((*ring, CHUNK, width), dtype)
        shared["decay_tile"] = plgpu.SMEM((*ring, width), jnp.float32)
    if late:
        shared["late_loaded"] = plgpu.Barrier(num_arrivals=2 * sides)
        shared["late_free"] = plgpu.Barrier(num_arrivals=sides)
    first_run = 0 if outputs or whole else 1
    runs = plan.runs - first_run
    results: Any = jax.ShapeDtypeStruct((B, runs, HV, V, K), jnp.float32)
    # A warpgroup's own, one after the other: the state, gradients of values, what sides share.
    terms = 1 if channel or not gated else 2  # of dR
    several = 1 + terms if sides == 1 else 2
    union = [tile((warpgroups * sides, CHUNK, WIDTH), jnp.float32)] if sides == 2 else []
    if outputs:
        union.append(tile((warpgroups * sides, several * CHUNK * WIDTH // width, width), jnp.bfloat16))
        union += [
            tile((warpgroups * sides, several, CHUNK, WIDTH), t) for t in (jnp.bfloat16, do.dtype)
        ]  # dR, dV
    shared["out_tiles"] = plgpu.RefUnion(*union) if len(union) > 1 else tuple(union)
    if outputs:
        dr = jax.ShapeDtypeStruct((terms, *do.shape), jnp.bfloat16)
        dv = jax.ShapeDtypeStruct(do.shape, do.dtype)
        results = (dr, dv, jax.ShapeDtypeStruct((B, HV, NC, V, K), jnp.bfloat16), results)
    kernel = plgpu.kernel(
        partial(_body, num_chunks=NC, gated=gated, plan=plan, outputs=outputs, first_run=first_run),
        out_type=results,
        scratch_types=shared,
        grid=(V // (WIDTH * warpgroups), HV, B * runs),
        grid_names=("columns", "head", "batch_run"),
        num_threads=warpgroups * sides,
        thread_name="warpgroup",
        kernel_name="delta_walk_back" if outputs else "delta_runs_back",
        # Staging outputs already keeps the warps together: `commit_smem` and `wait_smem_to_gmem`.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=outputs),
    )
    return kernel(chunks, do, state, spans)


def _body(
    chunks,
    do_ref,
    state_ref,
    spans_ref,
    *refs,
    q_tile,
    k_tile,
    p_tile,
    t_tile,
    do_tile,
    factor_tile,
    loaded,
    free,
    num_chunks,
    gated,
    plan,
    outputs,
    first_run,
    key_tile=None,
    decay_tile=None,
    out_tiles: Any = (),
    late_loaded=None,
    late_free=None,
    **met,
):
    *out_refs, first_ref = refs
    own_tiles = list(out_tiles)
    sides = Sides(chunks.reads.shape[-1], **met)
    side, of_side = sides.mine, sides.channels(sides.mine)
    share_tile: Any = own_tiles.pop(0) if sides.number == 2 else None
    state_tile: Any = own_tiles.pop(0) if own_tiles else None
    dr_tile: Any = own_tiles.pop(0) if own_tiles else None
    dv_tile: Any = own_tiles.pop(0) if own_tiles else None
    h, wg = lax.axis_index("head"), lax.axis_index("warpgroup")
    num_runs = first_ref.shape[1]
    b, run = (lax.div(lax.axis_index("batch_run"), num_runs), lax.rem(lax.axis_index("batch_run"), num_runs))
    of_block = 0 if sides.number == 2 else wg  # which of the block's column tiles
    first_row = (lax.axis_index("columns") * plan.warpgroups + of_block) * WIDTH
    mine = pl.ds(first_row, WIDTH)
    width, dtype = sides.width, chunks.reads.dtype
    scaled = dtype == jnp.float16
    square = (WIDTH, CHUNK)
    channel = chunks.keys is not None
    group = do_ref.shape[2] // chunks.reads.shape[2]
    stages, ahead = plan.stages, plan.stages - 1
    per_run = pl.cdiv(num_chunks, plan.runs)
    start = (run + first_run) * per_run
    even = num_chunks % plan.runs == 0
    count: Any = per_run if even else lax.min(per_run, num_chunks - start)
    if spans_ref is not None:
        even, start, count = False, spans_ref[b, run, 0], spans_ref[b, run, 1]

    def chunk_of(i):
        return start + count - 1 - i

    def by_sides(ref, at, to, slot, bar):
        for i in range(sides.number):
            plgpu.copy_gmem_to_smem(ref.at[*at, sides.channels(i)], sides.part(to, slot, i), bar)

    def load_late(i):
        for ref, to in ((chunks.reads, k_tile), (chunks.queries, q_tile)):
            by_sides(ref, (b, h, chunk_of(i), slice(None)), to, None, late_loaded)

    def load_chunk(i, slot):
        c, bar = chunk_of(i), loaded.at[slot]
        here = pl.ds(c * CHUNK, CHUNK)
        of_chunk = (b, h, c, slice(None)) if channel else (b, here, h // group)

        def load_do():
            plgpu.copy_gmem_to_smem(do_ref.at[b, here, h, mine], do_tile.at[slot, of_block], bar)

        if sides.number == 1:
            load_do()

        @pl.when(wg == 0)
        def _shared():
            if sides.number == 2:
                load_do()
            if late_loaded is None:
                by_sides(chunks.reads, of_chunk, k_tile, slot, bar)
            factors = chunks.factors.at[b, h, c, pl.ds(0, factor_tile.shape[1])]
            plgpu.copy_gmem_to_smem(factors, factor_tile.at[slot], bar)
            plgpu.copy_gmem_to_smem(chunks.p.at[b, h, c], p_tile.at[slot], bar)
            plgpu.copy_gmem_to_smem(chunks.solve.at[b, h, c], t_tile.at[slot], bar)
            if late_loaded is None:
                by_sides(chunks.queries, of_chunk, q_tile, slot, bar)
            if channel:
                by_sides(chunks.keys, of_chunk, key_tile, slot, bar)
                by_sides(chunks.decay, (b, h, c), decay_tile, slot, bar)

    @pl.loop(0, min(ahead, per_run) if even else lax.min(ahead, count))
    def _first(i):
        load_chunk(i, i)

    if late_loaded is not None:

        @pl.when((wg == 0) & (count > 0))
        def _first_late():
            load_late(0)

    if state_ref is not None:
        S = plgpu.load(state_ref.at[b, run, h, mine, of_side], layout=L, optimized=False)
        S = S * 1.0  # in a shard_map what is loaded varies over the mesh, unlike what the loop makes of it
    else:
        S = plgpu.layout_cast(jnp.zeros((WIDTH, width), jnp.float32), L)

    def step(i, carry):
        S, unit = carry  # dS^T [V, K] in multiples of unit [V]
        slot = lax.rem(i, stages)
        factor = factor_tile.at[slot]
        here = pl.ds(chunk_of(i) * CHUNK, CHUNK)

        def by_token(which):
            return columns(plgpu.load(factor.at[which], layout=COLUMN), square)

        if outputs:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            leaving = S * rows(unit, S.shape) if scaled else S
            state = state_tile.at[wg, pl.ds(0, WIDTH)]
            state[...] = leaving.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(state, out_refs[2].at[b, h, chunk_of(i), mine, of_side])
        plgpu.barrier_wait(loaded.at[slot])
        do = plgpu.load(do_tile.at[slot, of_block].transpose((1, 0)), layout=L)
        if scaled:
            wide = do.astype(jnp.float32)
            most = jnp.maximum(sides.most(jnp.abs(S).max(axis=1)) * unit, jnp.abs(wide).max(axis=1))
            most = jnp.maximum(most, SMALLEST)
            root = lax.rsqrt(most)
            per_unit = root * root
            S, do, unit = S * rows(unit * per_unit, S.shape), (wide * rows(per_unit, square)), most
            do = do.astype(dtype)
            S_terms: tuple[jax.Array, ...] = (S.astype(dtype),)
        else:
            S_terms = split(S, dtype)

        kt = sides.part(key_tile if channel else k_tile, slot).transpose((1, 0))
        kept, own = [(term, kt) for term in S_terms], (do, p_tile.at[slot])
        if sides.number == 2 or (gated and not channel):
            added, stored = tiles.product_beside(CHUNK, [own], kept, lambda x: x)  # [V, C]
            if sides.number == 2:
                if outputs:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                stored = sides.add(share_tile, stored)
                sides.take()
            dvalues = added + (stored * by_token(KEEP) if gated and not channel else stored)
        else:
            dvalues = tiles.product(CHUNK, own, *kept)

        @pl.when(i + ahead < count)
        def _prefetch():
            next_slot = lax.rem(i + ahead, stages)

            @pl.when((wg == 0) & (i > 0))
            def _wait():
                plgpu.barrier_wait(free.at[next_slot])

            load_chunk(i + ahead, next_slot)

        t = t_tile.at[slot]
        dr = tiles.add_products((dvalues, [(term, t) for term in split(dvalues * by_token(BETA), dtype)]))[
            0
        ]  # dR^T [V, C]

        if channel:
            S = S * columns(plgpu.load(sides.part(decay_tile, slot), layout=COLUMN), S.shape)
            asked: tuple[jax.Array, ...] = (do,)
        else:
            if gated:
                S = S * rows(plgpu.load(factor.at[DECAY], layout=ROW), S.shape)
            asked = split(do.astype(jnp.float32) * by_token(OUT), dtype)
        dvalues = dr * by_token(BETA)
        read = split(-dvalues if channel else dvalues * -by_token(READ), dtype)
        late_slot: Any = slot
        if late_loaded is not None:
            plgpu.barrier_wait(late_loaded)
            late_slot = None
        back = [(term, sides.part(q_tile, late_slot)) for term in asked]
        back += [(term, sides.part(k_tile, late_slot)) for term in read]
        S = tiles.add_products((S, back))[0]  # [V, K]

        if late_free is not None:

            @pl.when(i + 1 < count)
            def _late():
                plgpu.barrier_arrive(late_free)

                @pl.when(wg == 0)
                def _next():
                    plgpu.barrier_wait(late_free)
                    load_late(i + 1)

        if sides.number == 2:
            sides.wait_taken()
        if outputs:
            if scaled:
                dr, dvalues = dr * rows(unit, square), dvalues * rows(unit, square)
            if not channel:
                dvalues = dvalues * by_token(KEY)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # they lie where the state did
            dr_ref, dv_ref = out_refs[:2]
            terms = split(dr, jnp.bfloat16)[: dr_ref.shape[0]]
            leaving = [(dvalues.astype(dv_ref.dtype), dv_tile, dv_ref)]
            leaving += [(x, dr_tile, dr_ref.at[j]) for j, x in enumerate(terms)]

            def leave(leaving):
                for j, (x, to, _) in enumerate(leaving):
                    to.at[wg, j].transpose((1, 0))[...] = x
                plgpu.commit_smem()
                for j, (_, to, ref) in enumerate(leaving):
                    plgpu.copy_smem_to_gmem(to.at[wg, j], ref.at[b, here, h, mine])

            if sides.number == 1:
                leave(leaving)
            else:  # both have the same values
                pl.when(side == 0)(lambda: leave(leaving[:1]))
                pl.when(side == 1)(lambda: leave(leaving[1:]))

        @pl.when(i + stages < count)  # somebody will wait
        def _free():
            plgpu.barrier_arrive(free.at[slot])

        return S, unit

    S, unit = lax.fori_loop(0, count, step, (S, constant(1.0, ROW)))
    first_ref.at[b, run, h, mine, of_side][...] = S * rows(unit, S.shape) if scaled else S
    plgpu.wait_smem_to_gmem(0)
