"""Attention of one token a sequence to its cached latents, which all heads share: the cache is read once.

A block of threads walks over a share of a sequence's slots, 64 at a time, as far as tokens are held. TMA
brings slots into a ring of two buffers, where they are keys, whole, and values, but for the shared key. Two
warpgroups make the same logits and each weighs half of the latents' channels, with running maxima and sums of
the softmax (arXiv 1805.02867); a third one fetches. XLA joins the shares.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import tiles
from pallas_kernels.gpu.channel_decay import LOG2E
from pallas_kernels.gpu.limits import MULTIPROCESSORS, SHARED_KEY
from pallas_kernels.gpu.tiles import CHUNK, ROW, L

HEADS = 64  # rows of a product: fewer heads are filled up with zeros
BUFFERS = 2
HALVES = 2  # of the latent's channels, one a warpgroup
OVERHEAD = 2  # of a block, in turns
LOWEST = (
    -1e30
)  # the logit of an empty slot, and the maximum before the first: finite, so that differences are


def attend(q: jax.Array, latent: jax.Array, length: jax.Array, *, rank: int, scale: float) -> jax.Array:
    """softmax(scale q latent^T) latent[..., :rank] over the first ``length`` slots of each sequence.

    Args:
      q: [B, H, rank + 64] bf16 or f16.
      latent: [B, slots, rank + 64], of the same dtype; at least 64 slots.
      length: int32 [B]: slots that hold tokens; more than there are count as all.
      rank: channels of the latent proper, 128, 256, 384 or 512; the others are the shared key's.
      scale: multiplies the logits.

    Returns:
      [B, H, rank] in q's dtype; 0 where no slot holds a token.
    """
    B, H, width = q.shape
    slots = latent.shape[1]
    groups = pl.cdiv(H, HEADS)
    q = jnp.pad(q, [(0, 0), (0, groups * HEADS - H), (0, 0)]).reshape(B, groups, HEADS, width)
    shares = share_count(B * groups, pl.cdiv(slots, CHUNK))
    half = rank // HALVES
    per_row = jax.ShapeDtypeStruct((B, groups, shares, HEADS), jnp.float32)
    o, peak, total = plgpu.kernel(
        partial(_body, scale=scale * LOG2E, shares=shares, half=half),
        out_type=[jax.ShapeDtypeStruct((*per_row.shape, rank), jnp.float32), per_row, per_row],
        scratch_types=[
            tiles.tile((HALVES, HEADS, half), q.dtype),
            tiles.tile((HEADS, SHARED_KEY), q.dtype),
            tiles.tile((BUFFERS, HALVES, CHUNK, half), q.dtype),
            tiles.tile((BUFFERS, CHUNK, SHARED_KEY), q.dtype),
            plgpu.Barrier(num_arrivals=HALVES + 1),
            plgpu.Barrier(num_arrivals=HALVES + 1, num_barriers=BUFFERS),
            plgpu.Barrier(num_arrivals=HALVES, num_barriers=BUFFERS),
        ],
        grid=(shares, groups, B),
        grid_names=("share", "group", "row"),
        num_threads=HALVES + 1,
        thread_name="warpgroup",
        kernel_name="latent_decode",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, latent, length)
    weight = jnp.exp2(peak - jnp.max(peak, axis=2, keepdims=True))
    total = jnp.sum(total * weight, axis=2)
    o = jnp.sum(o * weight[..., None], axis=2) / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    return o.reshape(B, -1, rank)[:, :H].astype(q.dtype)


def share_count(rows: int, turns: int) -> int:
    """The shares of a sequence that take least: rounds of blocks on the chip times the turns of a share."""

    def duration(n: int) -> int:
        return pl.cdiv(rows * n, MULTIPROCESSORS) * (pl.cdiv(turns, n) + OVERHEAD)

    return min(range(1, min(MULTIPROCESSORS, turns) + 1), key=duration)


def _body(q_ref, latent_ref, length_ref, o_ref, peak_ref, total_ref, *scratch, scale, shares, half):
    q, q_shared, latents, shared, q_loaded, loaded, consumed = scratch
    share, group, row = (lax.axis_index(name) for name in ("share", "group", "row"))
    warpgroup = lax.axis_index("warpgroup")
    slots = latent_ref.shape[1]
    length = lax.min(length_ref[row], slots)
    turns = lax.div(length + CHUNK - 1, CHUNK)
    each = lax.div(turns + shares - 1, shares)
    first = share * each
    count = lax.clamp(0, turns - first, each)
    places = [pl.ds(n * half, half) for n in range(HALVES)], pl.ds(HALVES * half, SHARED_KEY)

    def start_of(i):
        """The first slot of a turn: the last one may overlap the one before."""
        return lax.min((first + i) * CHUNK, slots - CHUNK)

    @pl.when(warpgroup < HALVES)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        plgpu.barrier_wait(q_loaded)

        def turn(i, carry):
            o, peak, total = carry
            slot = lax.rem(i, BUFFERS)
            plgpu.barrier_wait(loaded.at[slot])
            pairs = [(q.at[n], latents.at[slot, n].transpose((1, 0))) for n in range(HALVES)]
            pairs += [(q_shared, shared.at[slot].transpose((1, 0)))]
            place = tiles.iota(1) + start_of(i)
            held = (place >= (first + i) * CHUNK) & (place < length)
            logits = jnp.where(held, tiles.product(CHUNK, *pairs) * scale, LOWEST)
            new = jnp.maximum(peak, logits.max(axis=1))
            p = jnp.exp2(logits - tiles.rows(new, logits.shape))
            kept = jnp.exp2(peak - new)
            total = total * kept + p.sum(axis=1)
            o = o * tiles.rows(kept, o.shape)
            (o,) = tiles.add_products((o, [(p.astype(q.dtype), latents.at[slot, warpgroup])]))
            plgpu.barrier_arrive(consumed.at[slot])
            return o, new, total

        nothing = plgpu.layout_cast(jnp.zeros((HEADS, half), jnp.float32), L)
        carry = nothing, tiles.constant(LOWEST, ROW), tiles.constant(0.0, ROW)
        o, peak, total = lax.fori_loop(0, count, turn, carry)
        for n in range(HALVES):

            @pl.when(warpgroup == n)
            def _store(n=n):
                tiles.store(o_ref.at[row, group, share, :, places[0][n]], o)

        @pl.when(warpgroup == 0)
        def _store_sums():
            tiles.store(peak_ref.at[row, group, share], peak)
            tiles.store(total_ref.at[row, group, share], total)

    @pl.when(warpgroup == HALVES)
    def _fetch():
        plgpu.set_max_registers(40, action="decrease")
        for n in range(HALVES):
            plgpu.copy_gmem_to_smem(q_ref.at[row, group, :, places[0][n]], q.at[n], q_loaded)
        plgpu.copy_gmem_to_smem(q_ref.at[row, group, :, places[1]], q_shared, q_loaded)

        @pl.loop(0, count)
        def _turn(i):
            slot = lax.rem(i, BUFFERS)

            @pl.when(i >= BUFFERS)
            def _free():
                plgpu.barrier_wait(consumed.at[slot])

            here = pl.ds(start_of(i), CHUNK)
            for n in range(HALVES):
                source = latent_ref.at[row, here, places[0][n]]
                plgpu.copy_gmem_to_smem(source, latents.at[slot, n], loaded.at[slot])
            plgpu.copy_gmem_to_smem(latent_ref.at[row, here, places[1]], shared.at[slot], loaded.at[slot])

        @pl.loop(lax.max(count - BUFFERS, 0), count)
        def _rest(i):
            plgpu.barrier_wait(consumed.at[lax.rem(i, BUFFERS)])
