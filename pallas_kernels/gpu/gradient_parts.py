"""What the gradients of a chunk's tokens start from: values against states, and values against values.

Persistent blocks go over the chunks; a warpgroup owns 64 channels of q's and k's gradients. Tiles come 64
columns of the values at a time, through a ring of stages that is filled across chunks.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import tiles
from pallas_kernels.gpu.tiles import CHUNK, L, tile

MULTIPROCESSORS = 132
HALF = 64  # channels of a warpgroup


class PartInputs(NamedTuple):
    """Arrays that parts are cut from, all bf16."""

    do: jax.Array  # [B, T, HV, V]
    dr: jax.Array  # [terms, B, T, HV, V] of `recurrence_back.walk_back`
    written: jax.Array  # [2, B, T, HV, V] of `recurrence.Kept`
    states: jax.Array  # [B, HV, NC, V, K] of `recurrence.Kept`
    dstates: jax.Array  # [B, HV, NC, V, K] of `walk_back`


class PartTiles(NamedTuple):
    """Shared memory of the ring."""

    left: Any  # dO and dR of each stage
    low: Any  # dR's second term of each stage, then zeros; None where dR has one
    written: Any  # U's two terms of each stage
    state: Any
    dstate: Any
    loaded: Any
    free: Any


class Sums(NamedTuple):
    """A chunk's sums over value columns, float32 [64, 64]: r, i are tokens, d the warpgroup's channels."""

    asked: jax.Array  # [r, d] dO S^T
    read: jax.Array  # [r, d] dR S^T
    stored: jax.Array  # [i, d] U dS^T
    overlap: jax.Array | None  # [d, d'] S^T dS, where there is a decay
    related: list[jax.Array]  # [r, i] dO U^T and dR U^T: one of them in each of two warpgroups


def part_tiles(K: int, *, stages: int, terms: int) -> PartTiles:
    """The ring's scratch for `plgpu.kernel`."""
    warpgroups = K // HALF
    return PartTiles(
        left=tile((stages * 2, CHUNK, HALF), jnp.bfloat16),
        low=tile((stages + 1, CHUNK, HALF), jnp.bfloat16) if terms == 2 else None,
        written=tile((stages * 2, CHUNK, HALF), jnp.bfloat16),
        state=tile((stages, HALF, K), jnp.bfloat16),
        dstate=tile((stages, HALF, K), jnp.bfloat16),
        loaded=plgpu.Barrier(num_arrivals=5 + terms, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    )


@dataclasses.dataclass(frozen=True)
class Parts:
    """A block's walk over its chunks' parts.

    Attributes:
      refs: `PartInputs` in HBM.
      tiles: `PartTiles`.
      gated: whether there is a decay.
    """

    refs: Any
    tiles: PartTiles
    gated: bool

    @property
    def stages(self) -> int:
        """Parts in flight."""
        return self.tiles.state.shape[0]

    @property
    def parts(self) -> int:
        """Parts of a chunk."""
        return self.refs.do.shape[-1] // HALF

    @property
    def warpgroups(self) -> int:
        """Of a block."""
        return self.refs.states.shape[-1] // HALF

    @property
    def count(self):
        """Chunks of this block."""
        total = num_chunks(self.refs.states)
        blocks = min(MULTIPROCESSORS, total)
        return lax.div(total - lax.axis_index("block") + (blocks - 1), blocks)

    def place(self, n):
        """Batch row, head and chunk of the block's n-th chunk."""
        _, HV, NC = self.refs.states.shape[:3]
        at = lax.axis_index("block") + n * min(MULTIPROCESSORS, num_chunks(self.refs.states))
        # Heads first: what blocks load at a time lies together in memory.
        return lax.div(at, HV * NC), lax.rem(at, HV), lax.rem(lax.div(at, HV), NC)

    @property
    def relations(self) -> list[Any]:
        """Which of the related sums (0: dO U^T, 1: dR U^T) this warpgroup makes."""
        return [lax.axis_index("warpgroup")] if self.warpgroups == 2 else [0, 1]

    def _load(self, t):  # part t % parts of chunk t // parts
        refs, to = self.refs, self.tiles
        b, h, c = self.place(lax.div(t, self.parts))
        slot = lax.rem(t, self.stages)
        here, part = pl.ds(c * CHUNK, CHUNK), pl.ds(lax.rem(t, self.parts) * HALF, HALF)
        bar = to.loaded.at[slot]
        plgpu.copy_gmem_to_smem(refs.states.at[b, h, c, part], to.state.at[slot], bar)
        plgpu.copy_gmem_to_smem(refs.dstates.at[b, h, c, part], to.dstate.at[slot], bar)
        plgpu.copy_gmem_to_smem(refs.do.at[b, here, h, part], to.left.at[2 * slot], bar)
        plgpu.copy_gmem_to_smem(refs.dr.at[0, b, here, h, part], to.left.at[2 * slot + 1], bar)
        if to.low is not None:
            plgpu.copy_gmem_to_smem(refs.dr.at[1, b, here, h, part], to.low.at[slot], bar)
        for term in range(2):
            source = refs.written.at[term, b, here, h, part]
            plgpu.copy_gmem_to_smem(source, to.written.at[2 * slot + term], bar)

    def start(self):
        """Fills the ring; called once, by every warpgroup."""
        if self.tiles.low is not None:
            self.tiles.low[self.stages] = nothing().astype(jnp.bfloat16)
            plgpu.commit_smem()

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _first():
            @pl.loop(0, lax.min(self.stages, self.count * self.parts))
            def _(t):
                self._load(t)

    def sums(self, n) -> Sums:
        """The sums of the block's n-th chunk; called for every n in order, by every warpgroup."""
        wg, to = lax.axis_index("warpgroup"), self.tiles
        mine = pl.ds(wg * HALF, HALF)

        def part(j):
            t = n * self.parts + j
            slot = lax.rem(t, self.stages)
            plgpu.barrier_wait(to.loaded.at[slot])
            do, dr = to.left.at[2 * slot], to.left.at[2 * slot + 1]
            high, low = to.written.at[2 * slot], to.written.at[2 * slot + 1]
            state, dstate = to.state.at[slot, :, mine], to.dstate.at[slot, :, mine]
            drs = [dr] if to.low is None else [dr, to.low.at[slot]]

            def related(i):
                left = to.left.at[2 * slot + i]
                pairs = [(left, high.transpose((1, 0))), (left, low.transpose((1, 0)))]
                if to.low is not None and (self.warpgroups == 2 or i == 1):
                    at = slot if self.warpgroups == 1 else jnp.where(wg == 0, self.stages, slot)
                    pairs.append((to.low.at[at], high.transpose((1, 0))))
                return pairs

            def refill():
                @pl.when(t + self.stages < self.count * self.parts)
                def _used():
                    plgpu.barrier_arrive(to.free.at[slot])

                    @pl.when(wg == 0)
                    def _next_part():
                        plgpu.barrier_wait(to.free.at[slot])
                        self._load(t + self.stages)

            pairs = [
                [(do, state)],
                [(x, state) for x in drs],
                [(high, dstate), (low, dstate)],
                *[related(i) for i in self.relations],
            ]
            if self.gated:
                pairs.append([(state.transpose((1, 0)), dstate)])
            return pairs, refill

        num = 3 + len(self.relations) + self.gated
        asked, read, stored, *more = tiles.looped_products(HALF, self.parts, num, part)
        return Sums(asked, read, stored, more.pop() if self.gated else None, more)


def num_chunks(states) -> int:
    """Chunks of all heads, of states [B, HV, NC, ...]."""
    B, HV, NC = states.shape[:3]
    return B * HV * NC


def nothing() -> jax.Array:
    """[64, 64] float32 zeros in registers."""
    return plgpu.layout_cast(jnp.zeros((CHUNK, HALF), jnp.float32), L)
