"""Products of a chunk of 64 tokens with itself, decays between the tokens in every channel of its own.

Such a decay has to enter the products' operands. Tokens r and i < r meet where blocks of s = 1, 2, 4, ...
tokens pair up with r in the odd block and i in the even one before it. Across the border a between the two,
``exp(G_r - G_i) = exp(G_r - G_a) exp(G_a - G_i)`` with both factors at most 1, whatever the gate: one product
of the chunk with itself for each s, of which that level's blocks are kept (`ChannelProducts.by_levels`). A
bounded gate allows factors above 1: then one product does for all s below 32 (`ChannelProducts.merged`).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import rowwise, tiles
from pallas_kernels.gpu.channel_decay import across_border
from pallas_kernels.gpu.tiles import CHUNK, COLUMN, HALF, L, columns, cut, load, rows

# With a gate bounded by that, decays across half a block of 32 tokens, and their inverses, stay inside bf16's
# range of 2^+-127: they are at most 2^(16 * 5 * log2 e) = 2^115.
MERGEABLE = -5.0
NEAR = 32

Pair = tuple[jax.Array, jax.Array]  # k with k, and q with k: [64, 64] float32, later tokens in the rows
_SQUARE = (CHUNK, CHUNK)


@dataclass(frozen=True)
class ChannelProducts:
    """The two products, of a side's channels.

    Attributes:
      q_tile, k_tile: for every 64 channels [64, 64] float16, not normalised.
      x_tile: as many, overwritten.
      near_tile: two of [64, 64] bf16, overwritten by `merged`; may lie where x_tile does.
      norm_tile: [64], k's factors.
      G_tile: [64, K (+ 8)] float32, log decays to base 2 summed from the chunk's start.
      norms: k's and q's factors, [64] each.
      line: [64] int32, the token of each row.
      meet: [64, 64], ``row ^ column``: at least s where tokens meet as blocks of s, or larger ones, pair up.
    """

    q_tile: Any
    k_tile: Any
    x_tile: Any
    near_tile: Any
    norm_tile: Any
    G_tile: Any
    norms: Pair
    line: jax.Array
    meet: jax.Array

    def by_levels(self) -> Pair:
        """For any gate; nothing on the diagonal."""
        nothing = plgpu.layout_cast(jnp.zeros(_SQUARE, jnp.float32), L)
        kk, qk = self._normalised(lax.fori_loop(0, 6, self._add_level, (nothing, nothing)))
        return kk, qk

    def merged(self) -> Pair:
        """For gates bounded by `MERGEABLE` and chunks without a reset.

        The diagonal is right for q with k. Above it there may be infinities.
        """
        near = self._near(0, None)
        for half in range(1, len(self.k_tile)):
            near = self._near(half, near)
        far = self._normalised(self._far(), NEAR)
        kk, qk = (rowwise.corner(a, b) for a, b in zip(near, far, strict=True))
        return kk, qk

    def _G(self, half):
        return self.G_tile.at[:, pl.ds(half * HALF, HALF)]

    def _normalised(self, sums, first=CHUNK):
        n_column = plgpu.load(self.norm_tile.at[pl.ds(0, first)], layout=COLUMN)
        n_column = columns(n_column, (CHUNK, first))
        return [x * (rows(norm, x.shape) * n_column) for x, norm in zip(sums, self.norms, strict=True)]

    def _add_level(self, s, related):
        return tuple(
            jnp.where(self.meet < lax.shift_left(1, s), old, new)
            for new, old in zip(self._across(s), related, strict=True)
        )

    def _across(self, s):
        """Products across the borders between paired blocks of 2^s tokens."""
        halves = range(len(self.k_tile))
        factors = [across_border(self._G(half), self.line, s).astype(jnp.float16) for half in halves]
        kf = [plgpu.load(self.k_tile[half], layout=L) * factors[half] for half in halves]
        tiles.meet()  # all warps are done with the level before
        return self._with_k(kf, factors, CHUNK)

    def _far(self):
        """Of the chunk's second half with its first, [64, 32]; the other rows mean nothing."""
        tiles.meet()  # all warps are done with what lay there; and nothing of here begins before, and spills
        halves = range(len(self.k_tile))
        factors = []
        for half in halves:
            border = plgpu.load(self.G_tile.at[NEAR - 1, pl.ds(half * HALF, HALF)], layout=COLUMN)
            # 1 where the token is later than the border, else -1.
            later = rows(jnp.where(self.line < NEAR, -1.0, 1.0), _SQUARE)
            d = rowwise.gather(self._G(half), self.line, HALF) * later - columns(border, _SQUARE) * later
            factors.append(jnp.exp2(d).astype(jnp.float16))
        kf = [plgpu.load(self.k_tile[half], layout=L) * factors[half] for half in halves]
        return self._with_k(kf, factors, NEAR)

    def _with_k(self, kf, factors, first):
        """Products of kf, and of q times the factors, with the first tokens of kf."""
        for x_tile, x in zip(self.x_tile, kf, strict=True):
            x_tile[...] = x
        plgpu.commit_smem()
        kt = [x if first == CHUNK else x.at[pl.ds(0, first)] for x in self.x_tile]
        kt = [x.transpose((1, 0)) for x in kt]
        qf = [lambda i=i: plgpu.load(self.q_tile[i], layout=L) * factors[i] for i in range(len(factors))]
        k_pairs, q_pairs = (list(zip(x, kt, strict=True)) for x in (self.x_tile, qf))
        return tiles.products(first, k_pairs, q_pairs)

    def _near(self, half, sums):
        """Adds 64 channels' share of the products within blocks of 32 tokens, by way of a block's middle."""
        middle = rowwise.gather(self._G(half), (self.line & -NEAR) + 15, HALF, together=True)
        d = rowwise.gather(self._G(half), self.line, HALF) - middle
        up = jnp.exp2(d)
        n, m = self.norms
        k = load(self.k_tile[half]) * rows(n, _SQUARE)
        stored = cut(k * jnp.exp2(-d))
        if sums is not None:
            tiles.meet()  # all warps are done with what lay there
        for term, to in zip(stored, self.near_tile, strict=True):
            to[...] = term
        plgpu.commit_smem()
        high, low = (x.transpose((1, 0)) for x in self.near_tile)

        def pairs(x):
            x_high, x_low = cut(x * up)
            return [(x_high, high), (x_high, low), (x_low, high)]

        products = [pairs(k), pairs(load(self.q_tile[half]) * rows(m, _SQUARE))]
        if sums is None:
            return tiles.products(CHUNK, *products)
        return tiles.add_products(*zip(sums, products, strict=True))
