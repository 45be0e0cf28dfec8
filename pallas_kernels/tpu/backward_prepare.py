"""The first stage of the backward kernel in scratch memory: what needs no dS."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.tpu import chunk, gates, tiles
from pallas_kernels.tpu.backward_memory import ROWS, Kept, anchors
from pallas_kernels.tpu.backward_step import Step, times
from pallas_kernels.tpu.chunk import LAST, SEEN
from pallas_kernels.tpu.dots import NN, NT, bf16_dot, dot, halves
from pallas_kernels.tpu.inverse import iota
from pallas_kernels.tpu.relations import beside, diagonal, meet_at, middle_block, spread_rows
from pallas_kernels.tpu.weave import Steps


def widened(x: jax.Array, width: int) -> jax.Array:
    """[m, .] whose lanes are equal, ``width`` lanes of it."""
    if x.shape[1] >= width:
        return x[:, :width]
    return jnp.concatenate([x] * (width // x.shape[1]), axis=1)


class Prepare(Step):
    """What needs no dS, and the reading of inputs by rows."""

    def __init__(self, *args):
        super().__init__(*args)
        # Zero, which the compiler does not know: it would keep in registers, and spill, what is stored and
        # loaded again under one address.
        self.z = jnp.minimum(pl.program_id(2), 0)

    def parts(self, x: jax.Array) -> list[jax.Array]:
        """What a product takes for x kept to 2^-16."""
        return list(halves(x)) if self.passes == 1 else [x]

    def hide(self, start: int, size: int):
        """Hides padding among tokens from ``start``."""
        if self.s.real is None:
            return lambda x: x
        real = self.s.real[start : start + size]
        return lambda x: jnp.where(real, x, 0.0)

    def marks(self, start: int, size: int) -> tuple[Any, Any]:
        """(seen, last) of tokens from ``start``, [size, 1]."""
        if self.s.marks is None:
            return None, None
        marks = self.s.mark_columns[start : start + size]
        return marks[:, SEEN : SEEN + 1], marks[:, LAST : LAST + 1]

    def load(self, ref, c: int, r: int, heads, size: int = ROWS) -> list[jax.Array]:
        """``size`` tokens from r of a chunk, padding hidden: a [size, .] for each head."""
        start = c * self.C + r
        hide = self.hide(start, size)
        return [hide(x) for x in tiles.load(ref, start, size, heads, self.blocks.interpret)]

    def prepare(self, m: Kept, c: int, heads: list[int]) -> Steps:
        """What does not need dS."""
        C, s, config, passes, z = self.C, self.s, self.config, self.passes, self.z
        n = len(heads)
        yield from self.sum_decays(m, c, heads)
        yield from self.operands(m, c, heads)
        relate = self.relate(m, c, n)
        R = []
        reads = []
        T = self.saved.inverses[0, heads[0] // n, c]  # [C, nC]
        for j, h in enumerate(heads):
            reads.append(dot(m.reads[z, j, C:], self.saved.states[0, h, c], NT, passes))
        yield
        for _ in anchors(config):  # the shorter schedule: the relations' products before V'
            next(relate)
            yield
        for j, h in enumerate(heads):
            R.append(self.load(self.refs.v, c, 0, [h], C)[0] - reads[j])
            m.R[0, j] = R[j]
            yield
        values = dot(T * chunk.lane_rows(s.beta, heads, c, C), diagonal(R), NN, 3)  # V': [C, n V]
        yield
        yield from relate
        for i, part in enumerate(self.parts(values)):
            m.V[0, i] = part
        yield

    def sum_decays(self, m: Kept, c: int, heads: list[int]) -> Steps:
        """G of a per-channel gate."""
        C, K, refs, config = self.C, self.blocks.K, self.refs, self.config
        for r in range(0, C, ROWS):
            hide = self.hide(c * C + r, ROWS)
            for j, (h, x) in enumerate(zip(heads, self.load(refs.g, c, r, heads), strict=True)):
                rate = None if refs.rate is None else refs.rate[0, h : h + 1]
                dt = None if refs.dt_bias is None else refs.dt_bias[0, h : h + 1]
                high, low = halves(hide(gates.log2_decay(x, rate, dt, config)))
                lanes = slice(j * K, (j + 1) * K)
                m.decays[0, r : r + ROWS, lanes] = high
                m.decays[0, C + r : C + r + ROWS, lanes] = low
            yield
        tril = jnp.where(iota((C, 2 * C), 0) >= iota((C, 2 * C), 1) % C, 1.0, 0.0).astype(jnp.bfloat16)
        G = bf16_dot(tril, m.decays[self.z])
        for j in range(len(heads)):
            m.G[0, j] = G[:, j * K : (j + 1) * K]
        yield

    def factors(self, m: Kept, j: int, c: int, r: int) -> tuple[jax.Array, jax.Array]:
        """exp(G), exp(G_C - G) of ROWS tokens from r of a chunk, zero where the state is not seen."""
        G, total = m.G[self.z, j, r : r + ROWS], m.G[self.z, j, self.C - 1 : self.C]
        seen, last = self.marks(c * self.C + r, ROWS)
        return times(jnp.exp2(G), seen), times(jnp.exp2(total - G), last)

    def about(self, m: Kept, j: int, size: int, r: int) -> tuple[jax.Array, jax.Array]:
        """exp(G - anchor) and exp(anchor - G), across a border exp(-|G - border|), of ROWS tokens from r."""
        at = lambda t: m.G[self.z, j, t : t + 1]  # noqa: E731
        G = m.G[self.z, j, r : r + ROWS]
        if size == 0:
            middle = middle_block(self.config, self.passes)
            difference = G - at(r // middle * middle + middle // 2)
            return jnp.exp2(difference), jnp.exp2(-difference)
        anchor = at(r // (2 * size) * 2 * size + size - 1)
        factor = jnp.exp2(G - anchor if r // size % 2 else anchor - G)
        return factor, factor

    def operands(self, m: Kept, c: int, heads: list[int]) -> Steps:
        """All operands made of q, k and the decays."""
        C, blocks, config, z, work = self.C, self.blocks, self.config, self.z, self.work
        key_heads = sorted({h // blocks.group for h in heads})
        for r in range(0, C, ROWS):
            qs, ks = (self.load(x, c, r, key_heads) for x in (self.refs.q, self.refs.k))
            here, below = slice(r, r + ROWS), slice(C + r, C + r + ROWS)
            loaded = {}
            for h, q, k in zip(key_heads, qs, ks, strict=True):
                q_factor = chunk.normalizer(q, config.scale, config)
                k_factor = chunk.normalizer(k, 1.0, config)
                loaded[h] = q * q_factor, k * k_factor, q_factor, k_factor
            for j, h in enumerate(heads):
                q, k, q_factor, k_factor = loaded[h // blocks.group]
                m.q[0, j, here], m.k[0, j, here] = q, k
                if config.normalize:
                    for ref, x in ((m.q_factor, q_factor), (m.k_factor, k_factor)):
                        ref[0, j, here] = jnp.broadcast_to(x, (ROWS, ref.shape[3]))
                since, until = self.factors(m, j, c, r)
                m.reads[0, j, here] = (q * since).astype(work)
                m.reads[0, j, below] = (k * since).astype(work)
                m.writes[0, j, here] = (k * until).astype(work)
                for i, size in enumerate(anchors(config)):
                    self.operand(m, i, size, j, r, q, k)
            yield
        seen, _ = self.marks((c + 1) * C - 1, 1)
        for j in range(len(heads)):
            m.keep[0, j] = times(jnp.exp2(m.G[z, j, C - 1 : C]), seen)
        for j, x in enumerate(self.load(self.do_ref, c, 0, heads, C)):
            m.dO[0, j] = x.astype(work)
        yield

    def operand(self, m: Kept, i: int, size: int, j: int, r: int, q, k) -> None:
        """Rows and columns about anchor i of ROWS tokens from r."""
        C, work, rows, columns = self.C, self.work, m.rows[i], m.columns[i]
        since, until = self.about(m, j, size, r)
        m.factors[i][0, 0, j, r : r + ROWS] = since
        if size == 0:
            m.factors[i][0, 1, j, r : r + ROWS] = until
        at = r // (2 * size) * size + r % size if size else r
        if size == 0 or r // size % 2:
            half = C // 2 if size else C
            rows[0, j, at : at + ROWS] = (k * since).astype(work)
            rows[0, j, half + at : half + at + ROWS] = (q * since).astype(work)
        if size == 0 or r // size % 2 == 0:
            columns[0, j, at : at + ROWS] = (k * until).astype(work)

    def anchor_columns(self, m: Kept, i: int, size: int, n: int) -> list[jax.Array]:
        """Columns of each head about anchor i, [C, K]."""
        columns = [m.columns[i][self.z, j] for j in range(n)]
        return [spread_rows(x, size, 0) for x in columns] if size else columns

    def relate(self, m: Kept, c: int, n: int) -> Steps:
        """kk and P^T dO."""
        C, z, config, passes = self.C, self.z, self.config, self.passes
        strict, inclusive = chunk.pairs_in_order(self.s, c, n, C)
        kk: Any = None
        p: Any = None
        for i, size in enumerate(anchors(config)):
            right = diagonal(self.anchor_columns(m, i, size, n))
            product = dot(beside([m.rows[i][z, j] for j in range(n)]), right, NT, passes)
            half = product.shape[0] // 2
            kk_s, p_s = product[:half], product[half:]
            if size == 0:
                kk, p = jnp.where(strict, kk_s, 0.0), jnp.where(inclusive, p_s, 0.0)
            else:
                kk_s, p_s = spread_rows(kk_s, size, 1), spread_rows(p_s, size, 1)
                here = meet_at(kk.shape, C, size)
                if self.s.marks is not None:
                    here = here & strict
                kk, p = jnp.where(here, kk_s, kk), jnp.where(here, p_s, p)
            yield
        m.kk[0] = kk
        turned = p.astype(self.work).T  # [nC, C]
        for j in range(n):
            m.dV[0, j] = dot(turned[j * C : (j + 1) * C], m.dO[z, j], NN, passes)
        yield
