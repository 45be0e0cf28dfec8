"""The backward kernel's stages with a unit's values in registers: but of a bounded per-channel gate."""

from functools import partial
from typing import Any

import jax.numpy as jnp

from pallas_kernels.tpu import chunk, gates, tiles
from pallas_kernels.tpu.backward_step import Step, lane_sum, times
from pallas_kernels.tpu.chunk import LAST, SEEN, Unit
from pallas_kernels.tpu.dots import NN, NT, TN, dot, dot_split_left, dot_split_right, halves, split
from pallas_kernels.tpu.inverse import iota
from pallas_kernels.tpu.relations import (
    RelationGradients,
    channel_relation_gradients,
    diagonal,
    relate,
    relate_split,
    relations_pulled,
    stack,
)
from pallas_kernels.tpu.weave import Steps


class Work:
    """What one unit carries from stage to stage; lists hold an entry for each head, [C, .] float32."""

    def __init__(self):
        self.unit = Unit()
        self.since: list[Any] = []  # exp(G), zero where the state is not seen; None: 1
        self.until: list[Any] = []  # exp(G_C - G), zero where nothing is left
        self.keep: list[Any] = []  # exp(G_C)
        self.V: list[Any] = []
        self.read: list[Any] = []  # K~ S
        self.written: list[Any] = []  # Kbar dS
        self.R: list[Any] = []
        self.dO: list[Any] = []
        self.dV: list[Any] = []  # P^T dO
        self.dY: list[Any] = []
        self.dR: list[Any] = []
        self.dS: list[Any] = []
        self.T: Any = None


class Registers(Step):
    """One grid step of a kernel whose units keep their values in registers."""

    def factors(self, w: Work, c: int):
        """exp(G), exp(G_C - G) and exp(G_C), with the marks of packed rows."""
        for head in w.unit.heads:
            since = until = keep = None
            if head.G is not None:
                total = head.G[self.C - 1 : self.C]
                since, until, keep = jnp.exp2(head.G), jnp.exp2(total - head.G), jnp.exp2(total)
            if self.s.marks is not None:
                marks = self.rows(self.s.mark_columns, c)
                seen, last = marks[:, SEEN : SEEN + 1], marks[:, LAST : LAST + 1]
                since = seen if since is None else since * seen
                until = last if until is None else until * last
                keep = seen[self.C - 1 : self.C] if keep is None else keep * seen[self.C - 1 : self.C]
            w.since.append(since)
            w.until.append(until)
            w.keep.append(keep)

    def prepare(self, w: Work, c: int, heads: list[int]) -> Steps:
        """What does not need dS."""
        C, s, blocks, config, passes = self.C, self.s, self.blocks, self.config, self.passes
        yield from chunk.load_heads(self.refs, s, heads, c, w.unit, blocks, config)
        yield from chunk.solve(self.refs, s, heads, c, w.unit, blocks, config)
        self.factors(w, c)
        v = tiles.load(self.refs.v, c * C, C, heads, blocks.interpret)
        do = tiles.load(self.do_ref, c * C, C, heads, blocks.interpret)
        if s.real is not None:
            real = self.rows(s.real, c)
            v, do = ([jnp.where(real, x, 0.0) for x in xs] for xs in (v, do))
        yield
        w.T = self.saved.inverses[0, heads[0] // len(heads), c]  # [C, nC]
        for j, h in enumerate(heads):
            state = self.saved.states[0, h, c]  # [V, K]
            read = dot(times(w.unit.heads[j].k, w.since[j]), state, NT, passes)
            w.read.append(read)
            w.R.append(v[j] - read)
            yield
        values = dot(w.T * chunk.lane_rows(s.beta, heads, c, C), diagonal(w.R), NN, 3)  # V': [C, n V]
        turned = w.unit.p.astype(self.work).T  # [nC, C]
        w.dV = [dot(turned[j * C : (j + 1) * C], x, NN, passes) for j, x in enumerate(do)]
        yield
        w.V = [values[:, j * blocks.V : (j + 1) * blocks.V] for j in range(len(heads))]
        w.dO = [x.astype(self.work) for x in do]
        yield

    def recur(self, w: Work, c: int, heads: list[int]) -> Steps:
        """dS from behind the chunk to before it."""
        C, passes = self.C, self.passes
        w.dS = [self.dstate[h][0] for h in heads]
        for j, head in enumerate(w.unit.heads):
            if self.config.gate == "channel":
                written = dot(head.k * w.until[j], w.dS[j], NT, passes)
            else:  # rows are scaled afterwards: k as given needs no rounding
                # dS, too, is not rounded where a row is one chunk and its dbeta a few numbers, each of which
                # may cancel. Everywhere it would be 3 % of the backward schedule on v6e, 2 % elsewhere.
                exact = passes == 1 and self.blocks.T <= C
                product = dot_split_right if exact else partial(dot, contract=NT, passes=passes)
                written = product(head.k_given, w.dS[j]) * times(head.k_factor, w.until[j])
            w.written.append(written)
            w.dV[j] = w.dV[j] + written
        yield
        turned = w.T.T  # [nC, C]
        w.dY = [dot(turned[j * C : (j + 1) * C], x, NN, 3) for j, x in enumerate(w.dV)]
        yield
        for j, h in enumerate(heads):
            dr = w.dY[j] * self.rows(self.s.beta_columns, c)[:, h : h + 1]
            w.dR.append(dr)
            parts = halves(-dr) if passes == 1 else (-dr,)
            head = w.unit.heads[j]
            reads = [times(x, w.since[j]).astype(self.work) for x in (head.q, head.k)]
            left = jnp.concatenate([w.dO[j], *parts], axis=0)
            right = jnp.concatenate([reads[0], *[reads[1]] * len(parts)], axis=0)
            self.dstate[h][0] = times(w.dS[j], w.keep[j]) + dot(left, right, TN, passes)
            if self.config.gate == "head":  # the shorter schedule
                yield
        yield

    def finish(self, w: Work, c: int, heads: list[int]) -> Steps:
        """From the chunk's own gradients to those of the inputs."""
        C, s, blocks, config, passes = self.C, self.s, self.blocks, self.config, self.passes
        n = len(heads)
        lane = iota((C, n * C), 1)
        strict, inclusive = chunk.pairs_in_order(s, c, n, C)
        tiles.store(self.out.v, c * C, heads, w.dR, blocks.interpret)
        yield
        parts: list[Any] = [split(x) if passes == 1 else (x, None) for x in w.dY]
        product = relate_split([stack(x, y) for (x, _), y in zip(parts, w.dO, strict=True)], w.V, passes)
        dY_V = product[:C]
        if config.gate == "head" and passes == 1:  # dg sums dA over pairs in which dY, too, may cancel
            yield
            dY_V += relate([low for _, low in parts], w.V, 1)
            yield
        dA = jnp.where(strict, -dY_V, 0.0)
        dP = jnp.where(inclusive, product[C:], 0.0)
        yield
        dkk = dA * chunk.lane_columns(s.beta_columns, heads, c, C)
        through = dA * w.unit.kk
        for j, h in enumerate(heads):
            own = jnp.where(lane // C == j, through, 0.0)
            self.set_column(c, h, 0, lane_sum([w.dY[j] * w.R[j], own]))
        yield
        dq, dk = [], []
        dG: list[Any] = []  # of a per-head gate two parts, over key and over value channels; so dtotal
        dtotal: list[Any] = []
        for j, h in enumerate(heads):
            state = self.saved.states[0, h, c]
            head, since, until = w.unit.heads[j], w.since[j], w.until[j]
            read = dot(stack(w.dR[j].astype(self.work), w.dO[j]), state, NN, passes)
            dk_read, dq_read = -read[:C], read[C:]  # dK~, dQ~
            if config.gate == "channel":  # dKbar; V' may cancel in the sums over tokens that make dg
                dk_write = dot_split_left(w.V[j], w.dS[j], passes)
            else:
                dk_write = dot(w.V[j], w.dS[j], NN, passes)
            yield
            dq_h, from_read, from_write = (
                times(x, f) for x, f in ((dq_read, since), (dk_read, since), (dk_write, until))
            )
            dq.append(dq_h)
            dk.append(from_read + from_write)
            if head.G is not None:
                kept = jnp.sum(state.astype(jnp.float32) * w.dS[j], axis=0, keepdims=True) * w.keep[j]
            if config.gate == "channel":
                written = from_write * head.k
                dG.append(dq_h * head.q + from_read * head.k - written)
                dtotal.append(kept + jnp.sum(written, axis=0, keepdims=True))  # [1, K]
            elif config.gate == "head":  # k dk = u du summed over channels, and u, du are not rounded
                written = w.V[j] * w.written[j]
                dG.append((dq_h * head.q, -w.dR[j] * w.read[j] - written))
                dtotal.append((kept, jnp.sum(written, axis=0, keepdims=True)))
            yield
        if config.gate == "channel":
            got = RelationGradients([], [], [])
            of = w.unit.heads
            yield from channel_relation_gradients(
                [x.q for x in of], [x.k for x in of], [x.decays for x in of], dkk, dP, C, passes, got
            )
            for j in range(n):
                dq[j], dk[j], dG[j] = dq[j] + got.q[j], dk[j] + got.k[j], dG[j] + got.G[j]
            yield from self.channel_gate(heads, c, dG, dtotal, of)
        else:
            if config.gate == "head":
                both = dkk * w.unit.kk + dP * w.unit.p  # gradient of G_r - G_i
                yield from self.head_gate(heads, c, both, dG, dtotal)
                dkk, dP = dkk * w.unit.gamma, dP * w.unit.gamma
            rows = [stack(x.k, x.q).astype(self.work) for x in w.unit.heads]
            columns = [x.k.astype(self.work) for x in w.unit.heads]
            deep = config.gate == "none"  # the shorter schedules
            drows, dcolumns = relations_pulled(stack(dkk, dP), rows, columns, C, passes, deep)
            for j in range(n):
                x = drows[:, j * blocks.K : (j + 1) * blocks.K]
                dq[j] = dq[j] + x[C:]
                dk[j] = dk[j] + x[:C] + dcolumns[j]
            yield
        for j, h in enumerate(heads):
            self.add_keys(c, h, dq[j], dk[j], w.unit.heads[j])
        yield

    def channel_gate(self, heads, c, dG, dtotal, own: list[chunk.Head]) -> Steps:
        """Gradients of a per-channel gate: dg_t sums dG over the tokens from t on."""
        C, refs, s = self.C, self.refs, self.s
        raw = tiles.load(refs.g, c * C, C, heads, self.blocks.interpret)
        out = []
        for j, h in enumerate(heads):
            dg = self.suffix_sums(dG[j]) + dtotal[j]
            rate = None if refs.rate is None else refs.rate[0, h : h + 1]
            dt = None if refs.dt_bias is None else refs.dt_bias[0, h : h + 1]
            g = raw[j]
            if s.real is not None:
                real = self.rows(s.real, c)
                g, dg = jnp.where(real, g, 0.0), jnp.where(real, dg, 0.0)
            yield
            dx, dlog_rate = gates.log2_decay_gradients(g, dg, rate, dt, self.config, own[j].g)
            if self.out.dt_bias is not None:
                self.out.dt_bias[0, 0, h : h + 1] += jnp.sum(dx, axis=0, keepdims=True)
                self.out.log_rate[0, 0, h : h + 1] += jnp.sum(dlog_rate, axis=0, keepdims=True)
            out.append(dx)
            yield
        tiles.store(self.out.g, c * C, heads, out, self.blocks.interpret)
        yield

    def head_gate(self, heads, c, both, dG, dtotal) -> Steps:
        """Gradients of a per-head gate: of the relations' pairs r >= t > i and of the state's factors."""
        C, n = self.C, len(heads)
        shape = (C, n * C)
        lane = iota(shape, 1)
        # Nothing follows the last token, whose column is free: it takes what each token adds by itself.
        for j in range(n):
            both = jnp.where(lane == (j + 1) * C - 1, lane_sum(dG[j]), both)
        yield
        sums = self.suffix_sums(both)  # [t, i]: sum over r >= t
        sums = jnp.where((iota(shape, 0) > lane % C) | (lane % C == C - 1), sums, 0.0)
        yield
        for j, h in enumerate(heads):
            total = lane_sum([jnp.where(lane // C == j, sums, 0.0)]) + lane_sum(dtotal[j])
            self.set_column(c, h, 1, total)
        yield

    def add_keys(self, c: int, h: int, dq, dk, head: chunk.Head):
        """Sums over the value heads that share a key head; stores key heads, in pairs, once complete."""
        group, config = self.blocks.group, self.config
        key = (c, h // group)
        count, q_sum, k_sum, _ = self.key_gradients.get(key, (0, 0.0, 0.0, None))
        self.key_gradients[key] = (count + 1, q_sum + dq, k_sum + dk, head)
        keys = self.completed_keys(key)
        if not keys:
            return
        dqs, dks = [], []
        for _, q_sum, k_sum, head in (self.key_gradients[k] for k in keys):
            dqs.append(chunk.normalized_gradient(q_sum, head.q, head.q_factor, config.scale, config))
            dks.append(chunk.normalized_gradient(k_sum, head.k, head.k_factor, 1.0, config))
        at = [k[1] for k in keys]
        tiles.store(self.out.q, c * self.C, at, dqs, self.blocks.interpret)
        tiles.store(self.out.k, c * self.C, at, dks, self.blocks.interpret)
