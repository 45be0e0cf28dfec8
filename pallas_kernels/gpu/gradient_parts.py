"""What the gradients of a chunk's tokens start from: values against states, and values against values.

Persistent blocks go over the chunks; a warpgroup owns 64 channels of q's and k's gradients, two of them
128: of more, a chunk's sides of 128 channels come one after the other, as if they were chunks ("turns").
Tiles come 64 columns of the values at a time, through a ring of stages that is filled across chunks.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import tiles
from pallas_kernels.gpu.limits import MULTIPROCESSORS
from pallas_kernels.gpu.sides import sides_of
from pallas_kernels.gpu.tiles import CHUNK, HALF, ROW, L, tile


class PartInputs(NamedTuple):
    """Arrays that parts are cut from, all bf16."""

    do: jax.Array  # [B, T, HV, V]
    dr: jax.Array  # [terms, B, T, HV, V] of `recurrence_back.walk_back`
    written: jax.Array  # [2, B, T, HV, V] of `walks.Kept`
    states: jax.Array  # [B, HV, NC, V, K] of `walks.Kept`
    dstates: jax.Array  # [B, HV, NC, V, K] of `walk_back`


class PartTiles(NamedTuple):
    """Shared memory of the ring."""

    left: Any  # dO and dR of each stage
    low: Any  # dR's second term of each stage, and a tile of zeros; None where dR has one term
    written: Any  # U's two terms of each stage
    state: Any
    dstate: Any
    loaded: Any
    states_loaded: Any
    free: Any
    met: Any


class Sums(NamedTuple):
    """A chunk's sums over value columns, float32 [64, 64]: r, i are tokens, d the warpgroup's channels."""

    asked: jax.Array  # [r, d] dO S^T
    read: jax.Array  # [r, d] dR S^T
    stored: jax.Array  # [i, d] U dS^T
    overlap: jax.Array | None  # [d, d'] S^T dS, where there is a decay
    related: list[jax.Array]  # [r, i] dO U^T and dR U^T: one of them in each of two warpgroups


def part_tiles(K: int, *, stages: int, state_stages: int, terms: int) -> PartTiles:
    """The ring's scratch for `plgpu.kernel`: parts in flight, and (as many or more) parts of the states."""
    K = K // sides_of(K)
    warpgroups = K // HALF
    return PartTiles(
        left=tile((stages * 2, CHUNK, HALF), jnp.bfloat16),
        low=None if terms == 1 else tile((stages + 1, CHUNK, HALF), jnp.bfloat16),
        written=tile((stages * 2, CHUNK, HALF), jnp.bfloat16),
        state=tile((state_stages, HALF, K), jnp.bfloat16),
        dstate=tile((state_stages, HALF, K), jnp.bfloat16),
        loaded=plgpu.Barrier(num_arrivals=3 + terms, num_barriers=stages),
        states_loaded=plgpu.Barrier(num_arrivals=2, num_barriers=state_stages),
        free=plgpu.Barrier(num_arrivals=warpgroups),
        met=plgpu.Barrier(num_arrivals=warpgroups),
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
        return self.tiles.left.shape[0] // 2

    @property
    def state_stages(self) -> int:
        """Parts of the states in flight."""
        return self.tiles.state.shape[0]

    @property
    def parts(self) -> int:
        """Parts of a chunk."""
        return self.refs.do.shape[-1] // HALF

    @property
    def warpgroups(self) -> int:
        """Of a block."""
        return self.refs.states.shape[-1] // self.sides // HALF

    @property
    def sides(self) -> int:
        """Turns of a chunk."""
        return sides_of(self.refs.states.shape[-1])

    @property
    def count(self):
        """Turns of this block."""
        total = num_turns(self.refs.states)
        blocks = min(MULTIPROCESSORS, total)
        return lax.div(total - lax.axis_index("block") + (blocks - 1), blocks)

    def place(self, n):
        """Batch row, head, chunk and side of the block's n-th turn."""
        B, HV = self.refs.states.shape[:2]
        turn = lax.axis_index("block") + n * min(MULTIPROCESSORS, num_turns(self.refs.states))
        at: Any = turn if self.sides == 1 else lax.div(turn, self.sides)
        side = 0 if self.sides == 1 else lax.rem(turn, self.sides)
        # Heads first: what blocks load at a time lies together in memory. The sequences' first chunks, with
        # which the walk back ended, are still in the L2 cache.
        return lax.rem(lax.div(at, HV), B), lax.rem(at, HV), lax.div(at, B * HV), side

    def channels(self, side, half):
        """Which of K are some warpgroup's."""
        return pl.ds((side * self.warpgroups + half) * HALF, HALF)

    @property
    def relations(self) -> list[Any]:
        """Which of the related sums (0: dO U^T, 1: dR U^T) this warpgroup makes."""
        return [lax.axis_index("warpgroup")] if self.warpgroups == 2 else [0, 1]

    def _load(self, t):  # the values of part t % parts of chunk t // parts
        refs, to, slot = self.refs, self.tiles, lax.rem(t, self.stages)
        b, h, c, _, part = self._place_of_part(t)
        here = pl.ds(c * CHUNK, CHUNK)
        bar = to.loaded.at[slot]
        plgpu.copy_gmem_to_smem(refs.do.at[b, here, h, part], to.left.at[2 * slot], bar)
        plgpu.copy_gmem_to_smem(refs.dr.at[0, b, here, h, part], to.left.at[2 * slot + 1], bar)
        if to.low is not None:
            plgpu.copy_gmem_to_smem(refs.dr.at[1, b, here, h, part], to.low.at[slot], bar)
        for term in range(2):
            source = refs.written.at[term, b, here, h, part]
            plgpu.copy_gmem_to_smem(source, to.written.at[2 * slot + term], bar)

    def _load_states(self, t):
        slot = lax.rem(t, self.state_stages)
        b, h, c, side, part = self._place_of_part(t)
        bar = self.tiles.states_loaded.at[slot]
        width = self.warpgroups * HALF
        here = (b, h, c, part, pl.ds(side * width, width))
        plgpu.copy_gmem_to_smem(self.refs.states.at[here], self.tiles.state.at[slot], bar)
        plgpu.copy_gmem_to_smem(self.refs.dstates.at[here], self.tiles.dstate.at[slot], bar)

    def _place_of_part(self, t):
        b, h, c, side = self.place(lax.div(t, self.parts))
        return b, h, c, side, pl.ds(lax.rem(t, self.parts) * HALF, HALF)

    def start(self):
        """Fills the ring; called once, by every warpgroup."""
        if self.tiles.low is not None:
            zeros = plgpu.layout_cast(jnp.zeros((CHUNK, HALF), jnp.bfloat16), L)
            self.tiles.low[self.stages] = zeros
            plgpu.commit_smem()

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _first():
            for stages, load in ((self.stages, self._load), (self.state_stages, self._load_states)):
                pl.loop(0, lax.min(stages, self.count * self.parts))(load)

    def meet(self):
        """Every warpgroup sees what all stored to shared memory, and none still reads what was there."""
        plgpu.commit_smem()
        if self.warpgroups > 1:
            plgpu.barrier_arrive(self.tiles.met)
            plgpu.barrier_wait(self.tiles.met)

    def summed(self, sums_tile, i) -> jax.Array:
        """The sum over warpgroups w of ``sums_tile[w, i]``, [64] by rows."""
        every = [plgpu.load(sums_tile.at[w, i], layout=ROW) for w in range(self.warpgroups)]
        return sum(every[1:], every[0])

    def sums(self, n, zero: Any = None) -> Sums:
        """The sums of the block's n-th turn; called for every n in order, by every warpgroup.

        ``zero``, if given, is 0 unknown to the compiler, which then keeps fewer addresses in registers.
        """
        wg, to = lax.axis_index("warpgroup"), self.tiles
        mine = pl.ds(wg * HALF, HALF)
        total = self.count * self.parts

        def part(j):
            t = n * self.parts + j
            if zero is not None:
                t = t + zero
            slot, state_slot = lax.rem(t, self.stages), lax.rem(t, self.state_stages)
            plgpu.barrier_wait(to.states_loaded.at[state_slot])
            plgpu.barrier_wait(to.loaded.at[slot])
            do, drs = to.left.at[2 * slot], [to.left.at[2 * slot + 1]]
            if to.low is not None:
                drs.append(to.low.at[slot])
            terms = [to.written.at[2 * slot], to.written.at[2 * slot + 1]]
            state, dstate = to.state.at[state_slot, :, mine], to.dstate.at[state_slot, :, mine]

            def related(i):
                pairs = [(to.left.at[2 * slot + i], u.transpose((1, 0))) for u in terms]
                if to.low is not None and (self.warpgroups == 2 or i == 1):
                    # Which of the two one of two warpgroups makes is known at run time only: dO has zeros.
                    low = slot if self.warpgroups == 1 else jnp.where(i == 0, self.stages, slot)
                    pairs.append((to.low.at[low], terms[0].transpose((1, 0))))
                return pairs

            def refill():
                @pl.when(t + self.stages < total)
                def _used():
                    plgpu.barrier_arrive(to.free)

                    @pl.when(wg == 0)
                    def _next_part():
                        plgpu.barrier_wait(to.free)
                        self._load(t + self.stages)

                        @pl.when(t + self.state_stages < total)
                        def _next_states():
                            self._load_states(t + self.state_stages)

            pairs = [
                [(do, state)],
                [(dr, state) for dr in drs],
                [(u, dstate) for u in terms],
                *[related(i) for i in self.relations],
            ]
            if self.gated:
                pairs.append([(state.transpose((1, 0)), dstate)])
            return pairs, refill

        num = 3 + len(self.relations) + self.gated
        asked, read, stored, *more = tiles.looped_products(HALF, self.parts, num, part)
        return Sums(asked, read, stored, more.pop() if self.gated else None, more)


def num_turns(states) -> int:
    """Turns of all heads' chunks, of states [B, HV, NC, V, K]."""
    B, HV, NC, _, K = states.shape
    return B * HV * NC * sides_of(K)
