"""What both forms of the backward kernel's units share: a grid step's references and sums over a chunk."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.tpu.chunk import Refs, Scalars
from pallas_kernels.tpu.config import Blocks, Config
from pallas_kernels.tpu.dots import bf16_dot, halves, split
from pallas_kernels.tpu.inverse import iota
from pallas_kernels.tpu.launch import Saved


class Gradients(NamedTuple):
    """Output blocks; laid out as the inputs. Absent ones are None."""

    q: Any
    k: Any
    v: Any
    g: Any
    beta: Any
    log_rate: Any  # [1, 1, heads, K] float32, to be summed over channels: of A_log
    dt_bias: Any  # [1, 1, heads, K] float32
    state: Any  # of the initial states [1, 1, heads, K, V]


def times(x: jax.Array, factor: jax.Array | None) -> jax.Array:
    """Their product; no factor: 1."""
    return x if factor is None else x * factor


def lane_sum(xs: Sequence[jax.Array]) -> jax.Array:
    """Sum over the lanes of all xs, [m, .]: [m, 1]."""
    if len({x.shape for x in xs}) == 1:
        xs = [functools.reduce(jnp.add, xs)]
    return functools.reduce(jnp.add, [jnp.sum(x, axis=1, keepdims=True) for x in xs])


class Step:
    """One grid step."""

    def __init__(
        self,
        refs: Refs,
        saved: Saved,
        do_ref,
        out: Gradients,
        dstate,
        s: Scalars,
        blocks: Blocks,
        config: Config,
    ):
        self.refs, self.saved, self.do_ref, self.out, self.dstate = refs, saved, do_ref, out, dstate
        self.s, self.blocks, self.config = s, blocks, config
        self.C, self.passes = config.chunk, blocks.passes
        self.work = jnp.bfloat16 if blocks.passes == 1 else jnp.float32
        self.key_gradients: dict[tuple[int, int], Any] = {}  # (chunk, key head) -> what its value heads left
        self.columns: dict[int, tuple[Any, Any]] = {}  # chunk -> (dbeta, dg) [C, heads]

    def rows(self, x, c):
        """A chunk's part of [tokens, .]."""
        return x[c * self.C : (c + 1) * self.C]

    def suffix_sums(self, x: jax.Array) -> jax.Array:
        """Sum over the tokens from each on: [C, D]."""
        C = self.C
        parts = list(halves(x))
        if self.passes == 3:  # what the sums leave may be 2^-10 of their terms
            parts[1:] = split(x - parts[0].astype(jnp.float32))
        shape = (C, len(parts) * C)
        triu = jnp.where(iota(shape, 0) <= iota(shape, 1) % C, 1.0, 0.0).astype(jnp.bfloat16)
        return bf16_dot(triu, jnp.concatenate(parts, axis=0))

    def set_column(self, c: int, h: int, which: int, column: jax.Array):
        """Puts a head's column into the chunk's [C, heads] of dbeta (0) or dg (1)."""
        shape = (self.C, self.blocks.heads)
        current = list(self.columns.get(c, (jnp.zeros(shape, jnp.float32),) * 2))
        current[which] = jnp.where(iota(shape, 1) == h, column, current[which])
        self.columns[c] = tuple(current)

    def completed_keys(self, key: tuple[int, int]) -> list[tuple[int, int]]:
        """The (chunk, key head)s stored with this one, once all their value heads are counted; else none.

        Two neighbours share a store where heads are even; entries of ``key_gradients`` begin with that count.
        """
        c, head = key
        n = 2 if self.blocks.key_heads % 2 == 0 else 1
        keys = [(c, head // n * n + i) for i in range(n)]
        counts = [self.key_gradients[k][0] if k in self.key_gradients else 0 for k in keys]
        return keys if min(counts) >= self.blocks.group else []

    def store_columns(self):
        """Writes dbeta and a per-head dg, tokens along lanes."""
        for c, (dbeta, dg) in self.columns.items():
            tokens = pl.ds(c * self.C, self.C)
            self.out.beta[0, 0, 0, :, tokens] = dbeta.T
            if self.config.gate == "head":
                self.out.g[0, 0, 0, :, tokens] = dg.T
