"""What a step of the walk reads of a chunk: copies from global to shared memory, some steps ahead."""

from dataclasses import dataclass
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.sides import Sides
from pallas_kernels.gpu.tiles import CHUNK


@dataclass(frozen=True)
class Tiles:
    """Where a chunk lies; rings of slots, but for what only a step's second half reads, if there is a
    barrier ``late`` for it. None: not read."""

    k: Any
    v: Any
    solve: Any
    factors: Any
    loaded: Any
    q: Any = None
    p: Any = None
    keys: Any = None
    decay: Any = None
    late: Any = None


@dataclass(frozen=True)
class Loads:
    """The copies of a block's warpgroups.

    Attributes:
      chunks, v: what is read, `Chunks` of references and one.
      tiles: where it goes.
      sides: of the channels.
      wg: the warpgroup; the first one reads what all need.
      place: row, value head and key head.
      start: the block's first chunk.
      of_block: which of the block's tiles of v is the warpgroup's own.
      v_columns: its columns.
    """

    chunks: Any
    v: Any
    tiles: Tiles
    sides: Sides
    wg: Any
    place: tuple[Any, Any, Any]
    start: Any
    of_block: Any
    v_columns: Any

    def chunk(self, i, slot) -> None:
        """The block's i-th chunk, less what is late."""
        tiles, bar = self.tiles, self.tiles.loaded.at[slot]
        b, h, key_head = self.place
        c = self.start + i
        here = pl.ds(c * CHUNK, CHUNK)
        of_chunk = (b, h, c, slice(None)) if self.chunks.keys is not None else (b, here, key_head)

        def load_v():
            plgpu.copy_gmem_to_smem(
                self.v.at[b, here, h, self.v_columns], tiles.v.at[slot, self.of_block], bar
            )

        if self.sides.number == 1:
            load_v()

        @pl.when(self.wg == 0)
        def _shared():
            if self.sides.number == 2:
                load_v()
            self._by_sides(self.chunks.reads, of_chunk, tiles.k, slot, bar)
            factors = self.chunks.factors.at[b, h, c, pl.ds(0, tiles.factors.shape[1])]
            plgpu.copy_gmem_to_smem(factors, tiles.factors.at[slot], bar)
            if tiles.late is None:
                self._writes(c, slot, bar)
            if tiles.q is not None:
                self._by_sides(self.chunks.queries, of_chunk, tiles.q, slot, bar)
                if tiles.late is None:
                    plgpu.copy_gmem_to_smem(self.chunks.p.at[b, h, c], tiles.p.at[slot], bar)

    def late(self, i) -> None:
        """What only the second half of a step reads of the i-th chunk."""
        b, h, _ = self.place
        self._writes(self.start + i, None, self.tiles.late)
        if self.tiles.p is not None:
            plgpu.copy_gmem_to_smem(self.chunks.p.at[b, h, self.start + i], self.tiles.p, self.tiles.late)

    def _writes(self, c, slot, bar):
        b, h, _ = self.place
        plgpu.copy_gmem_to_smem(self.chunks.solve.at[b, h, c], square_of(self.tiles.solve, slot), bar)
        if self.chunks.keys is not None:
            self._by_sides(self.chunks.keys, (b, h, c, slice(None)), self.tiles.keys, slot, bar)
            self._by_sides(self.chunks.decay, (b, h, c), self.tiles.decay, slot, bar)

    def _by_sides(self, ref, at, to, slot, bar):
        for i in range(self.sides.number):
            plgpu.copy_gmem_to_smem(ref.at[*at, self.sides.channels(i)], self.sides.part(to, slot, i), bar)


def square_of(ring: Any, slot: Any) -> Any:
    """A slot's [64, 64]; the whole without slots."""
    return ring.at[slot] if slot is not None else ring
