"""The sequential half of every gate kind: the state walks over the chunks, 64 columns to a warpgroup.

A warpgroup holds S^T [64, K] in float32 registers, so that every product takes its left side from registers
and nothing but the chunk's tiles passes through shared memory. What rounding could let grow from chunk to
chunk (S, R and V' as operands) enters the products as a sum of two half-precision numbers. Where operands are
float16, every state column is kept in multiples of the largest number in it or its chunk of v (the recurrence
is linear in both), so that nothing overflows, and S itself needs but one term.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.relations import DECAY, KEEP, OUT, READ, VALUE
from pallas_kernels.gpu.tiles import CHUNK, COLUMN, ROW, L, add_product, columns, constant, rows, split, tile

WIDTH = 64  # state columns of a warpgroup
SMALLEST = 1e-30


class Chunks(NamedTuple):
    """What the walk reads of q, k, g and beta; every half-precision array of one dtype.

    No gate or a per-head gate (`relations.head_relations`): ``queries`` and ``reads`` are q and k as they
    are, [B, T, H, K]; ``keys`` and ``decay`` are None; factors are [B, HV, NC, 5, 64].
    Per-channel gate (`channel_relations`): queries, reads, keys [B, HV, NC, 64, K], decay [B, HV, NC, K]
    float32, factors [B, HV, NC, 1, 64], beta alone.
    """

    queries: jax.Array
    reads: jax.Array
    keys: jax.Array | None
    inverse: jax.Array  # [B, HV, NC, 64, 64]
    p: jax.Array  # [B, HV, NC, 64, 64]
    factors: jax.Array  # float32
    decay: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the walk is laid out on the chip.

    Attributes:
      warpgroups: of a block; a block owns 64 state columns for each.
      stages: chunks in flight.
    """

    warpgroups: int
    stages: int


def walk(
    chunks: Chunks, v: jax.Array, state: jax.Array | None, *, gated: bool, plan: Plan
) -> tuple[jax.Array, jax.Array]:
    """Outputs and final state.

    With a chunk's factors (value, read, out, keep, decay):

        R  = value v - read (k S)
        V' = R + inverse R                       T R, scaled by k's inverse norm
        o  = out (q S) + p V'
        S <- decay S + k^T (keep V')

    With a per-channel gate the decays are in the operands, value = read = beta, and out = keep = 1.

    Args:
      chunks: of every 64 tokens.
      v: [B, T, HV, V]; T a multiple of 8, V of 64 ``plan.warpgroups``.
      state: [B, HV, V, K] float32, the transposed initial state, or None for zeros.
      gated: whether there is a decay (always with a per-channel gate).
      plan: the layout.

    Returns:
      o [B, T, HV, V] in v's dtype, the transposed final state [B, HV, V, K] float32.
    """
    B, _, HV, V = v.shape
    K, dtype = chunks.reads.shape[-1], chunks.reads.dtype
    NC, num_factors = chunks.factors.shape[2:4]
    channel = chunks.keys is not None
    stages, warpgroups = plan.stages, plan.warpgroups
    scratch = dict(
        q_tile=tile((stages, CHUNK, K), dtype),
        k_tile=tile((stages, CHUNK, K), dtype),
        v_tile=tile((stages, warpgroups, CHUNK, WIDTH), v.dtype),
        t_tile=tile((stages, CHUNK, CHUNK), dtype),
        p_tile=tile((stages, CHUNK, CHUNK), dtype),
        factor_tile=plgpu.SMEM((stages, num_factors, CHUNK), jnp.float32),
        o_tile=tile((warpgroups, CHUNK, WIDTH), v.dtype),
        loaded=plgpu.Barrier(num_arrivals=5 + 2 * channel + warpgroups, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    )
    if channel:
        scratch["key_tile"] = tile((stages, CHUNK, K), dtype)
        scratch["decay_tile"] = plgpu.SMEM((stages, K), jnp.float32)
    kernel = plgpu.kernel(
        partial(_body, num_chunks=NC, gated=gated, plan=plan),
        out_type=(
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct((B, HV, V, K), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(V // (WIDTH * warpgroups), HV, B),
        grid_names=("columns", "head", "batch"),
        kernel_name="delta_walk",
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return kernel(chunks, v, state)


def _body(
    chunks,
    v_ref,
    state_ref,
    o_ref,
    final_ref,
    *,
    q_tile,
    k_tile,
    v_tile,
    t_tile,
    p_tile,
    factor_tile,
    o_tile,
    loaded,
    free,
    num_chunks,
    gated,
    plan,
    key_tile=None,
    decay_tile=None,
):
    h, b = lax.axis_index("head"), lax.axis_index("batch")
    wg = lax.axis_index("warpgroup")
    mine = pl.ds((lax.axis_index("columns") * plan.warpgroups + wg) * WIDTH, WIDTH)
    K, dtype = chunks.reads.shape[-1], chunks.reads.dtype
    scaled = dtype == jnp.float16
    square = (WIDTH, CHUNK)
    channel = chunks.keys is not None
    group = v_ref.shape[2] // chunks.reads.shape[2]
    stages, ahead = plan.stages, plan.stages - 1

    def load_chunk(c, slot):
        here, bar = pl.ds(c * CHUNK, CHUNK), loaded.at[slot]
        of_chunk = (b, h, c) if channel else (b, here, h // group)
        plgpu.copy_gmem_to_smem(v_ref.at[b, here, h, mine], v_tile.at[slot, wg], bar)

        @pl.when(wg == 0)
        def _shared():
            plgpu.copy_gmem_to_smem(chunks.reads.at[of_chunk], k_tile.at[slot], bar)
            plgpu.copy_gmem_to_smem(chunks.factors.at[b, h, c], factor_tile.at[slot], bar)
            plgpu.copy_gmem_to_smem(chunks.inverse.at[b, h, c], t_tile.at[slot], bar)
            plgpu.copy_gmem_to_smem(chunks.queries.at[of_chunk], q_tile.at[slot], bar)
            plgpu.copy_gmem_to_smem(chunks.p.at[b, h, c], p_tile.at[slot], bar)
            if channel:
                plgpu.copy_gmem_to_smem(chunks.keys.at[b, h, c], key_tile.at[slot], bar)
                plgpu.copy_gmem_to_smem(chunks.decay.at[b, h, c], decay_tile.at[slot], bar)

    @pl.loop(0, min(ahead, num_chunks))  # a loop, as a static slice may not end past T
    def _first(c):
        load_chunk(c, c)

    if state_ref is None:
        S = plgpu.layout_cast(jnp.zeros((WIDTH, K), jnp.float32), L)
    else:
        S = plgpu.load(state_ref.at[b, h, mine], layout=L, optimized=False)

    def step(c, carry):
        S, unit = carry  # S^T [V, K] in multiples of unit [V]
        slot = lax.rem(c, stages)
        factor = factor_tile.at[slot]

        def by_token(which):
            return columns(plgpu.load(factor.at[which], layout=COLUMN), square)

        def load_v():
            return plgpu.load(v_tile.at[slot, wg].transpose((1, 0)), layout=L).astype(jnp.float32)

        if scaled:
            plgpu.barrier_wait(loaded.at[slot])
            v = load_v()
            most = jnp.maximum(jnp.abs(S).max(axis=1) * unit, jnp.abs(v).max(axis=1))
            most = jnp.maximum(most, SMALLEST)
            root = lax.rsqrt(most)
            per_unit = root * root
            S, v, unit = S * rows(unit * per_unit, S.shape), v * rows(per_unit, square), most
            S_terms = (S.astype(dtype),)
        else:
            S_terms = split(S, dtype)
            plgpu.barrier_wait(loaded.at[slot])

        def read(ks, qs):
            for term in S_terms:
                plgpu.wgmma(ks, term, k_tile.at[slot].transpose((1, 0)))
            plgpu.wgmma(qs, S_terms[0], q_tile.at[slot].transpose((1, 0)))
            kS = plgpu.layout_cast(plgpu.wgmma_accumulator_load(ks, wait_n=1), L)
            values = v if scaled else load_v()
            kS = kS * by_token(VALUE if channel else READ)
            return values * by_token(VALUE) - kS, qs[...]

        accumulator = plgpu.ACC(square, jnp.float32)
        R, o = pl.run_scoped(read, accumulator, accumulator)  # [V, C]

        @pl.when(c + ahead < num_chunks)
        def _prefetch():
            next_slot = lax.rem(c + ahead, stages)

            @pl.when((wg == 0) & (c > 0))
            def _wait():
                plgpu.barrier_wait(free.at[next_slot])

            load_chunk(c + ahead, next_slot)

        high, low = split(R, dtype)
        tt = t_tile.at[slot].transpose((1, 0))
        values = add_product(R, (high, tt), (low, tt))  # V'^T [V, C]

        high, low = split(values, dtype)
        pt = p_tile.at[slot].transpose((1, 0))
        o = plgpu.layout_cast(o, L)
        if not channel:
            o = o * by_token(OUT)
        o = add_product(o, (high, pt), (low, pt))  # [V, C]
        if channel:
            S = S * columns(plgpu.load(decay_tile.at[slot], layout=COLUMN), S.shape)
        elif gated:
            high, low = split(values * by_token(KEEP), dtype)
            S = S * rows(plgpu.load(factor.at[DECAY], layout=ROW), S.shape)
        keys = key_tile.at[slot] if channel else k_tile.at[slot]
        S = add_product(S, (high, keys), (low, keys))
        plgpu.barrier_arrive(free.at[slot])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if scaled:
            o = o * rows(unit, square)
        o_tile.at[wg].transpose((1, 0))[...] = o.astype(o_tile.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_tile.at[wg], o_ref.at[b, pl.ds(c * CHUNK, CHUNK), h, mine])
        return S, unit

    S, unit = lax.fori_loop(0, num_chunks, step, (S, constant(1.0, ROW)))
    final_ref.at[b, h, mine][...] = S * rows(unit, S.shape) if scaled else S
    plgpu.wait_smem_to_gmem(0)
