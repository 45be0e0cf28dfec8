"""Heads of more than 128 channels: two warpgroups hold a side of 128 channels each of the same state columns.

Sums over channels are sums over both sides: each warpgroup stores its own to shared memory and adds the
other's. A sum of two numbers does not depend on their order, so that both get the same bits.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.tiles import CHUNK, ROW, load

SIDE = 128  # channels, as many as a warpgroup's registers hold of a state


def sides_of(K: int) -> int:
    """Warpgroups that share a state column's channels: 1 or 2."""
    return max(1, K // SIDE)


def stages_of(stages: int, K: int) -> tuple[int, ...]:
    """The leading axes of a ring of tiles that both sides have a part of."""
    return (stages,) if sides_of(K) == 1 else (stages, 2)


def scratch(K: int) -> dict[str, Any]:
    """What `Sides` needs besides a tile to share; nothing for one side."""
    if sides_of(K) == 1:
        return {}
    return dict(
        met=plgpu.Barrier(num_arrivals=2),
        taken=plgpu.Barrier(num_arrivals=2),
        most_tile=plgpu.SMEM((2, CHUNK), jnp.float32),
    )


@dataclasses.dataclass(frozen=True)
class Sides:
    """The sides of a state column as their warpgroups see them.

    Attributes:
      K: channels of both.
      met, taken, most_tile: of `scratch`.
    """

    K: int
    met: Any = None
    taken: Any = None
    most_tile: Any = None

    @property
    def number(self) -> int:
        """1 or 2."""
        return sides_of(self.K)

    @property
    def width(self) -> int:
        """Channels of a side."""
        return self.K // self.number

    @property
    def mine(self):
        """This warpgroup's side."""
        return lax.axis_index("warpgroup") if self.number == 2 else 0

    def part(self, ring, slot, side=None) -> Any:
        """This warpgroup's (or a side's) tile of a ring, or of what has but one stage (slot None)."""
        if self.number == 1:
            return ring.at[slot]
        side = self.mine if side is None else side
        return ring.at[side] if slot is None else ring.at[slot, side]

    def channels(self, side) -> Any:
        """Which of K."""
        return pl.ds(side * self.width, self.width)

    def meet(self):
        """Both see what the other stored to shared memory."""
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.met)
        plgpu.barrier_wait(self.met)

    def add(self, share_tile, x: jax.Array, *, before=lambda: None) -> jax.Array:
        """The sum of both sides' x [64, 64] float32.

        Args:
          share_tile: [2, 64, 64] float32; not to be written again before `wait_taken`.
          x: of this side.
          before: stores what the other side may load until it calls `take`.
        """
        before()
        share_tile[self.mine] = x
        self.meet()
        return x + load(share_tile.at[1 - self.mine])

    def take(self):
        """Says that this side has loaded what was shared."""
        plgpu.barrier_arrive(self.taken)

    def wait_taken(self):
        """Waits until both have."""
        plgpu.barrier_wait(self.taken)

    def most(self, x: jax.Array) -> jax.Array:
        """The larger of both sides' x, [64] by rows. An `add` has to come before the next call."""
        if self.number == 1:
            return x
        self.most_tile[self.mine] = x
        self.meet()
        return jnp.maximum(x, plgpu.load(self.most_tile.at[1 - self.mine], layout=ROW))
