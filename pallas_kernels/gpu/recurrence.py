"""The sequential half of every gate kind: the state walks through the chunks, each warpgroup 64 of its columns.

A warpgroup holds S^T [64, K] in float32 registers, so that every product takes its left side from registers
and nothing but the chunk's tiles passes through shared memory. What rounding could let grow from chunk to
chunk (S, R and V' as operands) enters the products as a sum of two half-precision numbers.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.relations import DECAY, KEEP, OUT, READ, VALUE
from pallas_kernels.gpu.tiles import CHUNK, COLUMN, ROW, L, add_product, columns, product, rows, split, tile

WIDTH = 64  # state columns of a warpgroup


def walk(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    inverse: jax.Array,
    p: jax.Array,
    factors: jax.Array,
    state: jax.Array | None,
    *,
    gated: bool,
    warpgroups: int,
    stages: int,
) -> tuple[jax.Array, jax.Array]:
    """Outputs and final state of the op without a gate or with a per-head gate.

    With the factors (value, read, out, keep, decay) and the matrices of `relations.head_relations`:

        R  = value v - read (k S)
        V' = R + inverse R                       T R, scaled by k's inverse norm
        o  = out (q S) + p V'
        S <- decay S + k^T (keep V')

    Args:
      q, k: [B, T, H, K]; v: [B, T, HV, V], all bf16 or all f16; T a multiple of 8, V of 64 ``warpgroups``.
      inverse, p: [B, HV, NC, 64, 64], same dtype.
      factors: [B, HV, NC, 5, 64] float32.
      state: [B, HV, V, K] float32, the transposed initial state, or None for zeros.
      gated: whether there is a decay.
      warpgroups: of a block; a block owns 64 state columns for each.
      stages: chunks in flight.

    Returns:
      o [B, T, HV, V] in v's dtype, the transposed final state [B, HV, V, K] float32.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    NC = factors.shape[2]
    width = WIDTH * warpgroups
    if state is None:
        initial: tuple[jax.Array, ...] = ()
    else:
        initial = (state,)
    kernel = plgpu.kernel(
        partial(
            _body,
            num_chunks=NC,
            group=HV // H,
            gated=gated,
            warpgroups=warpgroups,
            stages=stages,
            has_state=state is not None,
        ),
        out_type=(
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct((B, HV, V, K), jnp.float32),
        ),
        scratch_types=dict(
            q_tile=tile((stages, CHUNK, K), q.dtype),
            k_tile=tile((stages, CHUNK, K), q.dtype),
            v_tile=tile((stages, warpgroups, CHUNK, WIDTH), q.dtype),
            t_tile=tile((stages, CHUNK, CHUNK), q.dtype),
            p_tile=tile((stages, CHUNK, CHUNK), q.dtype),
            factor_tile=plgpu.SMEM((stages, factors.shape[3], CHUNK), jnp.float32),
            o_tile=tile((warpgroups, CHUNK, WIDTH), q.dtype),
            loaded=plgpu.Barrier(num_arrivals=5 + warpgroups, num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        ),
        grid=(V // width, HV, B),
        grid_names=("columns", "head", "batch"),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return kernel(q, k, v, inverse, p, factors, *initial)


def _body(
    q_ref,
    k_ref,
    v_ref,
    inverse_ref,
    p_ref,
    factors_ref,
    *refs,
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
    group,
    gated,
    warpgroups,
    stages,
    has_state,
):
    o_ref, final_ref = refs[-2:]
    h, b = lax.axis_index("head"), lax.axis_index("batch")
    wg = lax.axis_index("warpgroup")
    first_column = (lax.axis_index("columns") * warpgroups + wg) * WIDTH
    mine = pl.ds(first_column, WIDTH)
    K = q_ref.shape[-1]
    dtype = q_ref.dtype

    def load_chunk(c, slot):
        here, bar = pl.ds(c * CHUNK, CHUNK), loaded.at[slot]
        plgpu.copy_gmem_to_smem(v_ref.at[b, here, h, mine], v_tile.at[slot, wg], bar)

        @pl.when(wg == 0)
        def _shared():
            plgpu.copy_gmem_to_smem(k_ref.at[b, here, h // group], k_tile.at[slot], bar)
            plgpu.copy_gmem_to_smem(factors_ref.at[b, h, c], factor_tile.at[slot], bar)
            plgpu.copy_gmem_to_smem(inverse_ref.at[b, h, c], t_tile.at[slot], bar)
            plgpu.copy_gmem_to_smem(q_ref.at[b, here, h // group], q_tile.at[slot], bar)
            plgpu.copy_gmem_to_smem(p_ref.at[b, h, c], p_tile.at[slot], bar)

    ahead = stages - 1

    @pl.loop(0, min(ahead, num_chunks))  # a loop, as a static slice may not end past T
    def _first(c):
        load_chunk(c, c)

    if has_state:
        S = plgpu.load(refs[0].at[b, h, mine], layout=L, optimized=False)
    else:
        S = plgpu.layout_cast(jnp.zeros((WIDTH, K), jnp.float32), L)

    def step(c, S):
        slot = lax.rem(c, stages)
        k, factor = k_tile.at[slot], factor_tile.at[slot]
        high, low = split(S, dtype)  # [V, K]
        plgpu.barrier_wait(loaded.at[slot])

        def read(ks, qs):
            kt = k.transpose((1, 0))
            plgpu.wgmma(ks, high, kt)
            plgpu.wgmma(ks, low, kt)
            plgpu.wgmma(qs, high, q_tile.at[slot].transpose((1, 0)))
            early = plgpu.wgmma_accumulator_load(ks, wait_n=1)
            R = r(early)
            return R, qs[...]

        def r(kS):
            square = (WIDTH, CHUNK)
            v = plgpu.load(v_tile.at[slot, wg].transpose((1, 0)), layout=L).astype(jnp.float32)
            value = plgpu.load(factor.at[VALUE], layout=COLUMN)
            reads = plgpu.load(factor.at[READ], layout=COLUMN)
            return v * columns(value, square) - plgpu.layout_cast(kS, L) * columns(reads, square)

        acc = plgpu.ACC((WIDTH, CHUNK), jnp.float32)
        R, o = pl.run_scoped(read, acc, acc)  # [V, C]

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
        out = plgpu.load(factor.at[OUT], layout=COLUMN)
        o = plgpu.layout_cast(o, L) * columns(out, o.shape)
        o = add_product(o, (high, pt), (low, pt))  # [V, C]
        if gated:
            keep = plgpu.load(factor.at[KEEP], layout=COLUMN)
            high, low = split(values * columns(keep, values.shape), dtype)
            S = S * rows(plgpu.load(factor.at[DECAY], layout=ROW), S.shape)
        S = add_product(S, (high, k), (low, k))
        plgpu.barrier_arrive(free.at[slot])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        o_tile.at[wg].transpose((1, 0))[...] = o.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_tile.at[wg], o_ref.at[b, pl.ds(c * CHUNK, CHUNK), h, mine])
        return S

    S = lax.fori_loop(0, num_chunks, step, S)
    final_ref.at[b, h, mine][...] = S
    plgpu.wait_smem_to_gmem(0)
