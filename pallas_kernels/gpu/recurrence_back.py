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
from pallas_kernels.gpu.recurrence import SMALLEST, WIDTH, Chunks, Plan, run_states
from pallas_kernels.gpu.relations import BETA, DECAY, KEEP, KEY, OUT, READ
from pallas_kernels.gpu.tiles import CHUNK, COLUMN, ROW, L, columns, constant, rows, split, tile


def walk_back(
    chunks: Chunks, do: jax.Array, dfinal: jax.Array, moved: jax.Array, *, gated: bool, plan: Plan
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of what the walk computes from the values.

    In `recurrence.walk`'s terms, with dS the gradient of the state that leaves the chunk:

        dV' = p^T dO + keep (k dS)
        dR  = dV' + solve^T (beta dV')           times beta: the gradient of R
        dS <- decay dS + q^T (out dO) - k^T (read beta dR)

    Args:
      chunks: as for `recurrence.walk`.
      do: [B, T, HV, V] bf16, the gradient of o.
      dfinal: [B, HV, V, K] float32, the transposed gradient of the final state.
      moved: of `recurrence.Kept`.
      gated: whether there is a decay.
      plan: the layout, as for `recurrence.walk` and with as many runs.

    Returns:
      dR [terms, B, T, HV, V] bf16, the sum of two terms with a per-head decay (its gradient needs them); the
      values' gradient ``n beta dR`` [B, T, HV, V] bf16; the transposed gradients of the states that leave the
      chunks [B, HV, NC, V, K] bf16 and, float32, of the initial state [B, HV, V, K].
    """
    plan = dataclasses.replace(plan, stages=2)
    state = dfinal[:, None]
    if plan.runs > 1:
        one = dataclasses.replace(plan, warpgroups=1)
        added = _call(chunks, do, None, gated, one, outputs=False)
        # Backwards, a run takes dS^T to dS^T M + what its outputs add.
        state = run_states(added[:, ::-1], moved[:, ::-1].mT, dfinal, plan.runs)[:, ::-1]
    dr, dv, dstates, dinitial = _call(chunks, do, state, gated, plan, outputs=True)
    return dr, dv, dstates, dinitial[:, 0]


def _call(chunks, do, state, gated, plan, *, outputs):
    """The kernel; without ``outputs``, what the outputs of each run but the first add to the gradient."""
    B, _, HV, V = do.shape
    K, dtype = chunks.reads.shape[-1], chunks.reads.dtype
    NC, num_factors = chunks.factors.shape[2:4]
    channel = chunks.keys is not None
    stages, warpgroups = plan.stages, plan.warpgroups
    scratch = dict(
        q_tile=tile((stages, CHUNK, K), dtype),
        k_tile=tile((stages, CHUNK, K), dtype),
        p_tile=tile((stages, CHUNK, CHUNK), dtype),
        t_tile=tile((stages, CHUNK, CHUNK), dtype),
        do_tile=tile((stages, warpgroups, CHUNK, WIDTH), do.dtype),
        factor_tile=plgpu.SMEM((stages, num_factors, CHUNK), jnp.float32),
        loaded=plgpu.Barrier(num_arrivals=5 + 2 * channel + warpgroups, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    )
    if channel:
        scratch["key_tile"] = tile((stages, CHUNK, K), dtype)
        scratch["decay_tile"] = plgpu.SMEM((stages, K), jnp.float32)
    runs = plan.runs if outputs else plan.runs - 1
    results: Any = jax.ShapeDtypeStruct((B, runs, HV, V, K), jnp.float32)
    if outputs:
        terms = 1 if channel or not gated else 2  # of dR
        scratch["out_tile"] = plgpu.RefUnion(
            tile((warpgroups, WIDTH, K), jnp.bfloat16),
            tile((terms + 1, warpgroups, CHUNK, WIDTH), jnp.bfloat16),
        )
        dr, dv = (jax.ShapeDtypeStruct((*lead, *do.shape), jnp.bfloat16) for lead in ((terms,), ()))
        results = (dr, dv, jax.ShapeDtypeStruct((B, HV, NC, V, K), jnp.bfloat16), results)
    kernel = plgpu.kernel(
        partial(_body, num_chunks=NC, gated=gated, plan=plan, outputs=outputs),
        out_type=results,
        scratch_types=scratch,
        grid=(V // (WIDTH * warpgroups), HV, B * runs),
        grid_names=("columns", "head", "batch_run"),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name="delta_walk_back" if outputs else "delta_runs_back",
        # Staging outputs already keeps the warps together: `commit_smem` and `wait_smem_to_gmem`.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=outputs),
    )
    return kernel(chunks, do, state)


def _body(
    chunks,
    do_ref,
    state_ref,
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
    key_tile=None,
    decay_tile=None,
    out_tile: Any = (None, None),
):
    *out_refs, first_ref = refs
    state_tile, values_tile = out_tile
    h, wg = lax.axis_index("head"), lax.axis_index("warpgroup")
    num_runs = first_ref.shape[1]
    b, run = (lax.div(lax.axis_index("batch_run"), num_runs), lax.rem(lax.axis_index("batch_run"), num_runs))
    first_row = (lax.axis_index("columns") * plan.warpgroups + wg) * WIDTH
    mine = pl.ds(first_row, WIDTH)
    K, dtype = chunks.reads.shape[-1], chunks.reads.dtype
    scaled = dtype == jnp.float16
    square = (WIDTH, CHUNK)
    channel = chunks.keys is not None
    group = do_ref.shape[2] // chunks.reads.shape[2]
    stages, ahead = plan.stages, plan.stages - 1
    per_run = pl.cdiv(num_chunks, plan.runs)
    start = (run if outputs else run + 1) * per_run
    even = num_chunks % plan.runs == 0
    count = per_run if even else lax.min(per_run, num_chunks - start)

    def chunk_of(i):
        return start + count - 1 - i

    def load_chunk(i, slot):
        c, bar = chunk_of(i), loaded.at[slot]
        here = pl.ds(c * CHUNK, CHUNK)
        of_chunk = (b, h, c) if channel else (b, here, h // group)
        plgpu.copy_gmem_to_smem(do_ref.at[b, here, h, mine], do_tile.at[slot, wg], bar)

        @pl.when(wg == 0)
        def _shared():
            plgpu.copy_gmem_to_smem(chunks.reads.at[of_chunk], k_tile.at[slot], bar)
            plgpu.copy_gmem_to_smem(chunks.factors.at[b, h, c], factor_tile.at[slot], bar)
            plgpu.copy_gmem_to_smem(chunks.p.at[b, h, c], p_tile.at[slot], bar)
            plgpu.copy_gmem_to_smem(chunks.solve.at[b, h, c], t_tile.at[slot], bar)
            plgpu.copy_gmem_to_smem(chunks.queries.at[of_chunk], q_tile.at[slot], bar)
            if channel:
                plgpu.copy_gmem_to_smem(chunks.keys.at[b, h, c], key_tile.at[slot], bar)
                plgpu.copy_gmem_to_smem(chunks.decay.at[b, h, c], decay_tile.at[slot], bar)

    @pl.loop(0, min(ahead, per_run) if even else lax.min(ahead, count))
    def _first(i):
        load_chunk(i, i)

    if state_ref is not None:
        S = plgpu.load(state_ref.at[b, run, h, mine], layout=L, optimized=False)
        S = S * 1.0  # in a shard_map what is loaded varies over the mesh, unlike what the loop makes of it
    else:
        S = plgpu.layout_cast(jnp.zeros((WIDTH, K), jnp.float32), L)

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
            state_tile[wg] = leaving.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(state_tile.at[wg], out_refs[2].at[b, h, chunk_of(i), mine])
        plgpu.barrier_wait(loaded.at[slot])
        do = plgpu.load(do_tile.at[slot, wg].transpose((1, 0)), layout=L)
        if scaled:
            wide = do.astype(jnp.float32)
            most = jnp.maximum(jnp.abs(S).max(axis=1) * unit, jnp.abs(wide).max(axis=1))
            most = jnp.maximum(most, SMALLEST)
            root = lax.rsqrt(most)
            per_unit = root * root
            S, do, unit = S * rows(unit * per_unit, S.shape), (wide * rows(per_unit, square)), most
            do = do.astype(dtype)
            S_terms: tuple[jax.Array, ...] = (S.astype(dtype),)
        else:
            S_terms = split(S, dtype)

        kt = (key_tile if channel else k_tile).at[slot].transpose((1, 0))
        kept, own = [(term, kt) for term in S_terms], (do, p_tile.at[slot])
        if gated and not channel:
            added, stored = tiles.product_beside(CHUNK, [own], kept, lambda x: x)  # [V, C]
            dvalues = added + stored * by_token(KEEP)
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
            S = S * columns(plgpu.load(decay_tile.at[slot], layout=COLUMN), S.shape)
            asked: tuple[jax.Array, ...] = (do,)
        else:
            if gated:
                S = S * rows(plgpu.load(factor.at[DECAY], layout=ROW), S.shape)
            asked = split(do.astype(jnp.float32) * by_token(OUT), dtype)
        dvalues = dr * by_token(BETA)
        read = split(-dvalues if channel else dvalues * -by_token(READ), dtype)
        back = [(term, q_tile.at[slot]) for term in asked] + [(term, k_tile.at[slot]) for term in read]
        S = tiles.add_products((S, back))[0]  # [V, K]

        if outputs:
            if scaled:
                dr, dvalues = dr * rows(unit, square), dvalues * rows(unit, square)
            if not channel:
                dvalues = dvalues * by_token(KEY)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # they lie where the state did
            dr_ref, dv_ref = out_refs[:2]
            terms = split(dr, jnp.bfloat16)[: dr_ref.shape[0]]
            for j, x in enumerate((dvalues.astype(jnp.bfloat16), *terms)):
                values_tile.at[j, wg].transpose((1, 0))[...] = x
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(values_tile.at[0, wg], dv_ref.at[b, here, h, mine])
            for j in range(len(terms)):
                plgpu.copy_smem_to_gmem(values_tile.at[1 + j, wg], dr_ref.at[j, b, here, h, mine])

        @pl.when(i + stages < count)  # somebody will wait
        def _free():
            plgpu.barrier_arrive(free.at[slot])

        return S, unit

    S, unit = lax.fori_loop(0, count, step, (S, constant(1.0, ROW)))
    first_ref.at[b, run, h, mine][...] = S * rows(unit, S.shape) if scaled else S
    plgpu.wait_smem_to_gmem(0)
