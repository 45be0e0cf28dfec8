"""The last stages of the backward kernel in scratch memory: the recurrence, and all gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.tpu import chunk, gates, tiles
from pallas_kernels.tpu.backward_memory import ROWS, Kept, anchors
from pallas_kernels.tpu.backward_prepare import Prepare, widened
from pallas_kernels.tpu.backward_step import lane_sum
from pallas_kernels.tpu.dots import NN, NT, TN, bf16_dot, dot, split
from pallas_kernels.tpu.inverse import iota
from pallas_kernels.tpu.relations import beside, block_rows, diagonal, meet_at, middle_block, stack
from pallas_kernels.tpu.weave import Steps


class Pieces(Prepare):
    """One grid step of a kernel whose units keep their operands in scratch memory and read them by rows."""

    def recur(self, m: Kept, c: int, heads: list[int]) -> Steps:
        """dS from behind the chunk to before it."""
        C, passes, z = self.C, self.passes, self.z
        dV = []
        for j, h in enumerate(heads):
            dS = self.dstate[h][0]
            m.dS[0, j] = dS.astype(self.work)
            state = self.saved.states[0, h, c].astype(jnp.float32)
            m.kept[0, j] = jnp.sum(state * dS, axis=0, keepdims=True) * m.keep[z, j]
            dV.append(m.dV[z, j] + dot(m.writes[z, j], dS, NT, passes))
        yield
        turned = self.saved.inverses[0, heads[0] // len(heads), c].T  # [nC, C]
        dY = [dot(turned[j * C : (j + 1) * C], x, NN, 3) for j, x in enumerate(dV)]
        yield
        dR = []
        for j, h in enumerate(heads):
            dr = dY[j] * self.rows(self.s.beta_columns, c)[:, h : h + 1]
            dR.append(dr)
            m.dY[0, j] = dY[j].astype(self.work)
            parts = list(split(-dr)) if passes == 1 else [-dr]
            m.dR[0, j] = parts[0]
            left = jnp.concatenate([m.dO[z, j], *parts], axis=0)
            right = jnp.concatenate([m.reads[z, j], *[m.reads[z, j, C:]] * (len(parts) - 1)], axis=0)
            self.dstate[h][0] = self.dstate[h][z] * m.keep[z, j] + dot(left, right, TN, passes)
            m.dbeta[0, j] = dY[j] * m.R[z, j]
        tiles.store(self.out.v, c * C, heads, dR, self.blocks.interpret)
        yield

    def finish(self, m: Kept, c: int, heads: list[int]) -> Steps:
        """From the chunk's own gradients to those of the inputs."""
        C, blocks, config, passes = self.C, self.blocks, self.config, self.passes
        z = self.z
        n, K, V = len(heads), blocks.K, blocks.V
        yield from self.pair_gradients(m, c, heads)
        dtotal: list[Any] = []
        reads, writes = [], []
        for j, h in enumerate(heads):
            state = self.saved.states[0, h, c]
            reads.append(dot(stack(m.dO[z, j], m.dR[z, j]), state, NN, passes))
            V_j = m.V[z, :, :, j * V : (j + 1) * V]
            if passes == 3:
                writes.append(dot(V_j[0], m.dS[z, j], NN, passes))
            else:  # V' may cancel in the sums over tokens that make dg
                dS = m.dS[z, j]
                writes.append(bf16_dot(beside([V_j[0], V_j[1]]), stack(dS, dS)))
            yield
        for j in range(n):
            read, write = reads[j], writes[j]
            total = jnp.zeros((8, K), jnp.float32)
            for r in range(0, C, ROWS):
                here = slice(r, r + ROWS)
                q, k = m.q[z, j, here], m.k[z, j, here]
                since, until = self.factors(m, j, c, r)
                dq, dk_read = read[here] * since, read[C + r : C + r + ROWS] * since
                dk_write = write[here] * until
                written = dk_write * k
                m.dG[0][0, j, here] = dq * q + dk_read * k - written
                total += functools.reduce(jnp.add, [written[i : i + 8] for i in range(0, ROWS, 8)])
                m.dq[0][0, j, here], m.dk[0][0, j, here] = dq, dk_read + dk_write
                yield
            dtotal.append(m.kept[z, j] + jnp.sum(total, axis=0, keepdims=True))
        sizes = anchors(config)
        for i, size in enumerate(sizes):
            yield from self.anchor_gradients(m, i, size, n)
        last = len(sizes) % 2
        yield from self.channel_gate(m, heads, c, dtotal, last)
        for j, h in enumerate(heads):
            self.add_keys(c, h, m, j, last)
        yield

    def pair_gradients(self, m: Kept, c: int, heads: list[int]) -> Steps:
        """dA and dP into the gradients of the relations, m.d; dbeta."""
        C, s, config, passes, z = self.C, self.s, self.config, self.passes, self.z
        n, V = len(heads), self.blocks.V
        strict, inclusive = chunk.pairs_in_order(s, c, n, C)
        width = n * C
        right = jnp.concatenate(
            [diagonal([m.V[z, i, :, j * V : (j + 1) * V] for j in range(n)]) for i in range(m.V.shape[1])],
            axis=0,
        )
        left = [stack(m.dY[z, j], m.dO[z, j]) for j in range(n)]
        product = dot(beside(left), right, NT, passes)
        if product.shape[1] > width:
            product = product[:, :width] + product[:, width:]
        yield
        dA = jnp.where(strict, -product[:C], 0.0)
        dP = jnp.where(inclusive, product[C:], 0.0)
        dkk = dA * chunk.lane_columns(s.beta_columns, heads, c, C)
        through = dA * m.kk[z]
        lane = iota((C, width), 1)
        for j, h in enumerate(heads):
            self.set_column(c, h, 0, lane_sum([m.dbeta[z, j], jnp.where(lane // C == j, through, 0.0)]))
        yield
        row, column = iota(dkk.shape, 0), iota(dkk.shape, 1) % C
        middle = middle_block(config, 1)
        for i, size in enumerate(anchors(config)):
            here = meet_at(dkk.shape, C, size) if size else row // middle == column // middle
            a, b = jnp.where(here, dkk, 0.0), jnp.where(here, dP, 0.0)
            if size:
                a, b = block_rows(a, size, 1), block_rows(b, size, 1)
            R = 2 * a.shape[0]
            for half, x in enumerate((a, b)):
                for p, part in enumerate(self.parts(x)):
                    at = p * R + half * (R // 2)
                    m.d[i][0, at : at + R // 2] = part
            yield

    def anchor_gradients(self, m: Kept, i: int, size: int, n: int) -> Steps:
        """Pulls the relations about anchor i back to q, k and G: from one array of sums to the other."""
        old, new, z = i % 2, (i + 1) % 2, self.z
        product = self.anchor_products(m, i, size, n)
        yield
        for j in range(n):
            for t in range(0, self.C, ROWS):
                here = slice(t, t + ROWS)
                dq, dk, dG = self.pulled(m, i, size, j, t, product)
                m.dq[new][0, j, here] = m.dq[old][z, j, here] if dq is None else m.dq[old][z, j, here] + dq
                m.dk[new][0, j, here] = m.dk[old][z, j, here] + dk
                m.dG[new][0, j, here] = m.dG[old][z, j, here] + dG
                yield

    def anchor_products(self, m: Kept, i: int, size: int, n: int) -> tuple[jax.Array, list[jax.Array]]:
        """Gradients of the rows about anchor i, [R, n K], and of each head's columns.

        With one key in all tokens d's entries cancel in the sums: d is kept to 2^-16.
        """
        C, z, passes = self.C, self.z, self.passes
        d = m.d[i][z]
        columns = diagonal(self.anchor_columns(m, i, size, n))
        if passes == 1:
            R = d.shape[0] // 2
            drows = dot(beside([d[:R], d[R:]]), stack(columns, columns))
        else:
            drows = dot(d, columns, NN, passes)
        turned = d.T  # [nC, R], or high and low parts along the summed axis
        dcolumns = []
        for j in range(n):
            own = turned[j * C : (j + 1) * C]
            rows = m.rows[i][z, j]
            if size:
                own = block_rows(own, size, 0)
            dcolumns.append(dot(own, rows if passes == 3 else stack(rows, rows), NN, passes))
        return drows, dcolumns

    def pulled(self, m: Kept, i: int, size: int, j: int, t: int, product) -> tuple[Any, Any, Any]:
        """What ROWS tokens from t gain in dq (None: nothing), dk and dG through anchor i.

        dG_r gains x_r dx_r and dG_i loses y_i dy_i, both with the operands as they were rounded, so that what
        cancels in a sum over tokens cancels exactly; the anchor's own share is zero.
        """
        z, K, (drows, dcolumns) = self.z, self.blocks.K, product
        R, here = m.rows[i].shape[2], slice(t, t + ROWS)
        row = t // (2 * size) * size + t % size if size else t
        since = m.factors[i][z, 0, j, here]
        until = since if size else m.factors[i][z, 1, j, here]
        dq: Any = None
        dk: Any = 0.0
        dG: Any = 0.0
        if size == 0 or t // size % 2:
            grads = []
            for x in (row, R // 2 + row):
                own = drows[x : x + ROWS, j * K : (j + 1) * K]
                grads.append(own)
                dG = dG + own * m.rows[i][z, j, x : x + ROWS].astype(jnp.float32)
            dk, dq = (x * since for x in grads)
        if size == 0 or t // size % 2 == 0:
            dcolumn = dcolumns[j][row : row + ROWS]
            dk = dk + dcolumn * until
            dG = dG - dcolumn * m.columns[i][z, j, row : row + ROWS].astype(jnp.float32)
        return dq, dk, dG

    def channel_gate(self, m: Kept, heads, c, dtotal, last) -> Steps:
        """Gradients of a per-channel gate: dg_t sums dG over the tokens from t on."""
        C, refs, z = self.C, self.refs, self.z
        sums = [self.suffix_sums(m.dG[last][z, j]) for j in range(len(heads))]
        yield
        dt_bias: list[Any] = [0.0] * len(heads)
        dlog: list[Any] = [0.0] * len(heads)
        for r in range(0, C, ROWS):
            raw = self.load(refs.g, c, r, heads)
            hide = self.hide(c * C + r, ROWS)
            out = []
            for j, h in enumerate(heads):
                dg = hide(sums[j][r : r + ROWS] + dtotal[j])
                rate = None if refs.rate is None else refs.rate[0, h : h + 1]
                dt = None if refs.dt_bias is None else refs.dt_bias[0, h : h + 1]
                dx, dlog_rate = gates.log2_decay_gradients(raw[j], dg, rate, dt, self.config)
                dt_bias[j] += sum(dx[i : i + 8] for i in range(0, ROWS, 8))
                dlog[j] += sum(dlog_rate[i : i + 8] for i in range(0, ROWS, 8))
                out.append(dx)
            tiles.store(self.out.g, c * C + r, heads, out, self.blocks.interpret)
            yield
        if self.out.dt_bias is not None:
            for j, h in enumerate(heads):
                self.out.dt_bias[0, 0, h : h + 1] += jnp.sum(dt_bias[j], axis=0, keepdims=True)
                self.out.log_rate[0, 0, h : h + 1] += jnp.sum(dlog[j], axis=0, keepdims=True)
        yield

    def add_keys(self, c: int, h: int, m: Kept, j: int, last: int):
        """Sums over the value heads that share a key head; stores key heads, in pairs, once complete."""
        group, config, z = self.blocks.group, self.config, self.z
        key = (c, h // group)
        count, owners = self.key_gradients.get(key, (0, []))
        self.key_gradients[key] = (count + 1, [*owners, (m, j)])
        keys = self.completed_keys(key)
        if not keys:
            return
        at = [k[1] for k in keys]
        for r in range(0, self.C, ROWS):
            here = slice(r, r + ROWS)
            dqs, dks = [], []
            for _, owners in (self.key_gradients[k] for k in keys):
                dq, dk = (
                    functools.reduce(jnp.add, [getattr(m, name)[last][z, j, here] for m, j in owners])
                    for name in ("dq", "dk")
                )
                m, j = owners[0]
                q_factor, k_factor = (
                    tuple(widened(x[z, j, here], self.blocks.K) for x in (m.q_factor, m.k_factor))
                    if config.normalize
                    else (config.scale, 1.0)
                )
                dqs.append(chunk.normalized_gradient(dq, m.q[z, j, here], q_factor, config.scale, config))
                dks.append(chunk.normalized_gradient(dk, m.k[z, j, here], k_factor, 1.0, config))
            tiles.store(self.out.q, c * self.C + r, at, dqs, self.blocks.interpret)
            tiles.store(self.out.k, c * self.C + r, at, dks, self.blocks.interpret)
