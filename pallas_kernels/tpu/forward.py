"""The forward kernel: outputs and final state in one walk over the tokens.

Grid (rows, blocks of heads, blocks of tokens + 1), the last axis in order. Units go through three stages,
a group of them behind the other: step t prepares block t (relations) group by group, beside each group it
inverts the group before, at first the last one of block t - 1, and runs the recurrence on block t - 1. So
each stage's waits for dependent products are filled with independent work. All that passes from stage to
stage lies in scratch memory.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import chunk, tiles
from pallas_kernels.tpu.chunk import LAST, REAL, SEEN, Refs, Scalars, Unit
from pallas_kernels.tpu.config import Blocks, Config
from pallas_kernels.tpu.dots import NN, NT, TN, dot, halves
from pallas_kernels.tpu.inverse import unit_lower_inverse
from pallas_kernels.tpu.launch import Layout, Saved, Segments, is_first, is_last, unit_heads, units_of
from pallas_kernels.tpu.relations import beside, diagonal, stack
from pallas_kernels.tpu.weave import Steps, after, in_turn, together, weave

# Steps of preparations, and of inversions, for each step of a recurrence: the shortest schedules.
RATIO = {"none": 3, "head": 8, "channel": 4}


class Outputs(NamedTuple):
    """o [B, T, HV, V], final states [B, N, HV, K, V] and, if asked, what the backward kernel needs."""

    o: Any
    final: Any
    saved: Saved | None


class Scratch(NamedTuple):
    """Scratch memory: the running state and what is prepared for each unit (first axis)."""

    state: Any  # [heads, V, K] float32: S^T, so that decays of channels lie in lanes
    reads: Any  # [units, n, 2C, K]: K exp(G) above Q exp(G)
    writes: Any  # [units, n, C, K]: K exp(G_C - G)
    p: Any  # [units, C, nC]: decayed Q K^T, i <= r
    a: Any  # [units, C, nC] float32: beta K K^T, decayed, i < r
    T: Any  # [units, C, nC] float32: (I + A)^-1
    keep: Any  # [units, n, 1, K]: exp(G_C)
    beta: Any  # [heads, tokens] float32, of the recurrence's block


def state_factors(
    unit: Unit, s: Scalars, c: int, blocks: Blocks, config: Config
) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """Of each head (reads [2C, K], or [C, K] without q; writes [C, K]; keep [1, K])."""
    C = config.chunk
    out = []
    for head in unit.heads:
        q, k, keep = head.q, head.k, jnp.ones((1, blocks.K), jnp.float32)
        reads, writes = stack(k, q), k
        if head.G is not None:
            total = head.G[C - 1 : C]
            since = jnp.exp2(head.G)
            reads, writes = stack(k * since, q * since), k * jnp.exp2(total - head.G)
            keep = jnp.broadcast_to(jnp.exp2(total), keep.shape)
        if s.marks is not None:
            marks = s.mark_columns[c * C : (c + 1) * C]
            seen = marks[:, SEEN : SEEN + 1]
            reads, writes = reads * stack(seen, seen), writes * marks[:, LAST : LAST + 1]
            keep = keep * seen[C - 1 : C]
        out.append((reads, writes, keep))
    return out


def prepare(
    refs: Refs,
    s: Scalars,
    u: int,
    c: int,
    heads: list[int],
    unit: Unit,
    scratch: Scratch,
    blocks,
    config,
    free,
) -> Steps:
    """First stage: all but the inverse, into scratch. ``free(u)`` returns once u may be overwritten."""
    yield from chunk.load_heads(refs, s, heads, c, unit, blocks, config)
    yield from chunk.solve(refs, s, heads, c, unit, blocks, config)
    factors = state_factors(unit, s, c, blocks, config)
    free(u)
    scratch.a[u] = unit.kk * chunk.lane_columns(s.beta_columns, heads, c, config.chunk)
    for j, (reads, writes, keep) in enumerate(factors):
        scratch.reads[u, j] = reads.astype(scratch.reads.dtype)
        scratch.writes[u, j] = writes.astype(scratch.writes.dtype)
        scratch.keep[u, j] = keep
        yield
    scratch.p[u] = unit.p.astype(scratch.p.dtype)
    yield


def invert(u: int, scratch: Scratch, inverted: set, config) -> Steps:
    """Second stage: T into scratch; then adds u to ``inverted``."""
    out: list[jax.Array] = []
    yield from unit_lower_inverse(scratch.a[u], config.chunk, out)
    scratch.T[u] = out[0]
    inverted.add(u)


def recur(
    refs: Refs,
    o_ref,
    saved,
    beta: jax.Array,
    u: int,
    c: int,
    heads: list[int],
    scratch: Scratch,
    blocks,
    config,
    real,
    done,
) -> Steps:
    """One unit's step of the recurrence: V' = T beta (V - K~ S), O = Q~ S + P V', S <- D S + Kbar^T V'.

    Calls ``done(u)`` after the last read of what `prepare` wrote.
    """
    C, n = config.chunk, len(heads)
    reads = [scratch.reads[u, j] for j in range(n)]
    v = tiles.load(refs.v, c * C, C, heads, blocks.interpret)
    if real is not None:
        v = [jnp.where(real[c * C : (c + 1) * C], x, 0.0) for x in v]
    states = [scratch.state[h] for h in heads]
    if saved is not None:
        for h, state in zip(heads, states, strict=True):
            saved.states[0, h, c] = state.astype(saved.states.dtype)
    read = [dot(r, state, NT, blocks.passes) for r, state in zip(reads, states, strict=True)]  # [2C, V]
    yield
    rest = [x - r[:C] for x, r in zip(v, read, strict=True)]  # V - K~ S
    T = scratch.T[u]
    if saved is not None:
        saved.inverses[0, heads[0] // n, c] = T
    values = dot(T * chunk.lane_rows(beta, heads, c, C), diagonal(rest), NN, 3)  # V': [C, n V]
    yield
    writes = [scratch.writes[u, j] for j in range(n)]
    keep = [scratch.keep[u, j] for j in range(n)]
    p = scratch.p[u]
    done(u)
    pieces = list(halves(values)) if blocks.passes == 1 else [values]
    parts = [[x[:, j * blocks.V : (j + 1) * blocks.V] for j in range(n)] for x in pieces]
    o = dot(
        beside([p] * len(parts)), jnp.concatenate([diagonal(x) for x in parts], axis=0), NN, blocks.passes
    )
    update = dot(
        jnp.concatenate([y for x in parts for y in x], axis=0),
        jnp.concatenate([diagonal(writes)] * len(parts), axis=0),
        TN,
        blocks.passes,
    )  # [V, n K]
    yield
    tiles.store(
        o_ref,
        c * C,
        heads,
        [r[C:] + o[:, j * blocks.V : (j + 1) * blocks.V] for j, r in enumerate(read)],
        blocks.interpret,
    )
    for j, h in enumerate(heads):
        scratch.state[h] = states[j] * keep[j] + update[:, j * blocks.K : (j + 1) * blocks.K]
    yield


def _groups(units: list, size: int) -> list[range]:
    """Positions of the units, ``size`` together."""
    return [range(len(units))[a : a + size] for a in range(0, len(units), size)]


def _kernel(
    segments: Segments | None, refs: Refs, marks_ref, initial_ref, *results, blocks: Blocks, config: Config
):
    out, scratch = Outputs(*results[:3]), Scratch(*results[3:])
    saved = out.saved
    row, step, steps = pl.program_id(0), pl.program_id(2), pl.num_programs(2)
    behind = jnp.maximum(step - 1, 0)  # the block of the recurrence

    @pl.when(step == 0)
    def _nothing_prepared():
        for ref in scratch:
            ref[...] = jnp.zeros_like(ref)

    @pl.when((step > 0) & is_first(segments, row, behind))
    def _enter():
        for h in range(blocks.heads):
            none = jnp.zeros((blocks.V, blocks.K), jnp.float32)
            scratch.state[h] = none if initial_ref is None else initial_ref[0, 0, h].T

    units = units_of(blocks, config)
    s = chunk.scalars(refs, blocks, jnp.minimum(step, steps - 2), config)
    real = None  # of the recurrence's block
    if marks_ref is not None:
        real = marks_ref[0, 0].T[:, REAL : REAL + 1] > 0
    elif blocks.ragged:
        real = jax.lax.broadcasted_iota(jnp.int32, (blocks.tokens, 1), 0) < blocks.T - behind * blocks.tokens
    beta = scratch.beta[...]
    scratch.beta[...] = s.beta
    inverted: set[int] = set()
    read: set[int] = set()  # whose scratch memory the recurrence needs no longer
    ratio = RATIO[config.gate]
    groups = _groups(units, blocks.together)
    last = together([invert(u, scratch, inverted, config) for u in groups[-1]])  # of the block behind

    def solved(positions: range) -> Callable[[], bool]:
        return lambda: inverted.issuperset(set(positions).intersection(groups[-1]))

    recurrences = [
        after(
            solved(heads_of_chunk),
            last,
            together(
                [
                    recur(refs, out.o, saved, beta, u, *units[u], scratch, blocks, config, real, read.add)
                    for u in heads_of_chunk
                ]
            ),
        )
        for heads_of_chunk in _groups(units, len(unit_heads(blocks)))
    ]
    share = [-(-i * len(recurrences) // len(groups)) for i in range(len(groups) + 1)]
    recurrence = in_turn(recurrences)

    def free(u):
        while u not in read:
            next(recurrence)

    for i, group in enumerate(groups):
        preparation = together(
            [prepare(refs, s, u, *units[u], Unit(), scratch, blocks, config, free) for u in group]
        )
        inversion = (
            last if i == 0 else together([invert(u, scratch, inverted, config) for u in groups[i - 1]])
        )
        walk = in_turn(recurrences[share[i] : share[i + 1]])
        if len(groups) == 1:
            weave([(preparation, ratio), (in_turn([last, walk]), ratio)])
        else:
            weave([(walk, 1), (inversion, ratio), (preparation, ratio)])

    @pl.when((step > 0) & is_last(segments, row, behind, steps - 1))
    def _leave():
        for h in range(blocks.heads):
            out.final[0, 0, h] = scratch.state[h].T


def forward(
    arrays: Refs,
    initial_state: jax.Array | None,
    segments: Segments | None,
    N: int,
    blocks: Blocks,
    config: Config,
    save: bool = False,
) -> Outputs:
    """Outputs and final states.

    Args:
      arrays: q, k [B, T, H, K]; v [B, T, HV, V]; g [B, T, HV, K], or log decays [B, T, HV] float32, or None;
        beta [B, T, HV]; rate, dt_bias [HV, K] float32 or None; marks [B, 4, T'] float32 or None.
      initial_state: [B, N, HV, K, V] float32 or None.
      segments: [B, blocks of tokens]; None: every row is one.
      N: segments that have a state of their own in each row.
      blocks: sizes.
      config: the call.
      save: whether to save what `backward` needs.

    Returns:
      o [B, T, HV, V] in v's dtype; final states [B, N, HV, K, V] float32, defined where ``segments`` visits
      them; `Saved` or None.
    """
    layout = Layout(arrays, blocks, config)
    steps, U, n, C, K, V = (
        layout.steps,
        len(units_of(blocks, config)),
        layout.n,
        config.chunk,
        blocks.K,
        blocks.V,
    )
    work = blocks.work
    now = lambda t: jnp.minimum(t, steps - 1)  # noqa: E731
    behind = lambda t: jnp.maximum(t - 1, 0)  # noqa: E731
    state_block = layout.state_block(behind)
    inputs = layout.inputs()
    specs = layout.input_specs(now)._replace(v=layout.token_blocks(V, blocks.heads, behind))
    return pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, config=config),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(layout.B, layout.HV // blocks.heads, steps + 1),
            in_specs=[
                specs,
                layout.input_specs(behind).marks,  # again, for the recurrence's block
                None if initial_state is None else state_block,
            ],
            out_specs=Outputs(
                layout.token_block(V, blocks.heads, behind),
                state_block,
                layout.saved_specs(behind, behind) if save else None,
            ),
            scratch_shapes=Scratch(
                pltpu.VMEM((blocks.heads, V, K), jnp.float32),
                pltpu.VMEM((U, n, 2 * C, K), work),
                pltpu.VMEM((U, n, C, K), work),
                pltpu.VMEM((U, C, n * C), work),
                pltpu.VMEM((U, C, n * C), jnp.float32),
                pltpu.VMEM((U, C, n * C), jnp.float32),
                pltpu.VMEM((U, n, 1, K), jnp.float32),
                pltpu.VMEM((blocks.heads, blocks.tokens), jnp.float32),
            ),
        ),
        out_shape=Outputs(
            layout.shape(arrays.v.shape, arrays.v.dtype),
            layout.shape((layout.B, N, layout.HV, K, V), jnp.float32),
            layout.saved_shapes() if save else None,
        ),
        compiler_params=layout.compiler_params(),
        interpret=blocks.interpret,
        name="delta_rule_forward",
    )(segments, inputs, inputs.marks, initial_state)
