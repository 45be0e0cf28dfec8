"""The forward kernel: outputs and final state in one walk over the tokens.

Grid (rows, blocks of heads, blocks of tokens + 1), the last axis in order. Step t prepares block t (relations, inverse)
into scratch memory while the recurrence runs on block t - 1, so that the recurrence's dependent products are filled
with independent work.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import chunk, tiles
from pallas_kernels.tpu.chunk import LAST, SEEN, Refs, Scalars, Unit
from pallas_kernels.tpu.config import Blocks, Config
from pallas_kernels.tpu.dots import NN, NT, TN, dot, split
from pallas_kernels.tpu.inverse import over_heads
from pallas_kernels.tpu.relations import beside, diagonal, stack
from pallas_kernels.tpu.weave import Steps, in_turn, staggered, together, weave


TOGETHER = 4  # units prepared in lockstep
RATIO = 5  # steps of preparation for each step of the recurrence


class Scratch(NamedTuple):
    """Scratch memory: the running state and what is prepared for each unit (first axis)."""

    state: Any  # [heads, V, K] float32: S^T, so that decays of channels lie in lanes
    reads: Any  # [units, n, 2C, K]: K exp(G) above Q exp(G)
    writes: Any  # [units, n, C, K]: K exp(G_C - G)
    p: Any  # [units, C, nC]: decayed Q K^T, i <= r
    m: Any  # [units, C, nC]: T beta
    keep: Any  # [units, n, 1, K]: exp(G_C)


def unit_heads(blocks: Blocks) -> list[list[int]]:
    """Value heads of a block in pairs, or alone where they do not come in pairs."""
    n = 2 if blocks.heads % 2 == 0 else 1
    return [list(range(h, h + n)) for h in range(0, blocks.heads, n)]


def units_of(blocks: Blocks, config: Config) -> list[tuple[int, list[int]]]:
    """(chunk, heads) of each unit of a block, in the order of the recurrence."""
    return [(c, heads) for c in range(blocks.tokens // config.chunk) for heads in unit_heads(blocks)]


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
    refs: Refs, s: Scalars, u: int, c: int, heads: list[int], unit: Unit, scratch: Scratch, blocks, config, free
) -> Steps:
    """First stage of a unit: everything but the inverse, into scratch. ``free(u)`` returns once u may be overwritten."""
    yield from chunk.load_heads(refs, s, heads, c, unit, blocks, config)
    yield from chunk.solve(refs, s, heads, c, unit, blocks, config)
    factors = state_factors(unit, s, c, blocks, config)
    free(u)
    for j, (reads, writes, keep) in enumerate(factors):
        scratch.reads[u, j] = reads.astype(scratch.reads.dtype)
        scratch.writes[u, j] = writes.astype(scratch.writes.dtype)
        scratch.keep[u, j] = keep
        yield
    scratch.p[u] = unit.p.astype(scratch.p.dtype)
    yield


def invert(s: Scalars, u: int, c: int, heads: list[int], unit: Unit, scratch: Scratch, saved, config) -> Steps:
    """Second stage: T beta into scratch."""
    yield from chunk.invert(s, heads, c, unit, config)
    if saved is not None:
        saved.inverses[0, heads[0] // len(heads), c] = unit.T
    scratch.m[u] = (unit.T * chunk.lane_rows(s.beta, heads, c, config.chunk)).astype(scratch.m.dtype)


def recur(
    refs: Refs, o_ref, saved, u: int, c: int, heads: list[int], scratch: Scratch, blocks, config, real, done
) -> Steps:
    """One unit's step of the recurrence: V' = T beta (V - K~ S), O = Q~ S + P V', S <- D S + Kbar^T V'."""
    C, n = config.chunk, len(heads)
    reads = [scratch.reads[u, j] for j in range(n)]
    writes = [scratch.writes[u, j] for j in range(n)]
    keep = [scratch.keep[u, j] for j in range(n)]
    p, m = scratch.p[u], scratch.m[u]
    done(u)
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
    values = dot(m, diagonal(rest), NN, 3)  # V': [C, n V]
    yield
    parts = list(split(values)) if blocks.passes == 1 else [values]
    parts = [[x[:, j * blocks.V : (j + 1) * blocks.V] for j in range(n)] for x in parts]
    o = dot(beside([p] * len(parts)), jnp.concatenate([diagonal(x) for x in parts], axis=0), NN, blocks.passes)
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


def _kernel(
    segment_ref, first_ref, last_ref, *args, fields: tuple[str, ...], blocks: Blocks, config: Config, initial: bool, save: bool
):
    refs = Refs(**{**dict.fromkeys(Refs._fields), **dict(zip(fields, args[: len(fields)], strict=True))})
    rest = list(args[len(fields) :])
    initial_ref = rest.pop(0) if initial else None
    o_ref, final_ref = rest[:2]
    saved = Saved(*rest[2:4]) if save else None
    scratch = Scratch(*rest[4 if save else 2 :])
    row, step, steps = pl.program_id(0), pl.program_id(2), pl.num_programs(2)
    behind = jnp.maximum(step - 1, 0)  # the block of the recurrence

    @pl.when(step == 0)
    def _nothing_prepared():
        for ref in (scratch.reads, scratch.writes, scratch.p, scratch.m):
            ref[...] = jnp.zeros_like(ref)
        scratch.keep[...] = jnp.ones_like(scratch.keep)
        scratch.state[...] = jnp.zeros_like(scratch.state)

    @pl.when((step > 0) & (first_ref[row, behind] != 0))
    def _enter():
        for h in range(blocks.heads):
            scratch.state[h] = initial_ref[0, 0, h].T if initial else jnp.zeros((blocks.V, blocks.K), jnp.float32)

    units = units_of(blocks, config)
    s = chunk.scalars(refs, blocks, jnp.minimum(step, steps - 2), config)
    ready: set[int] = set()
    real = None
    if blocks.ragged and refs.marks is None:
        real = jax.lax.broadcasted_iota(jnp.int32, (blocks.tokens, 1), 0) < blocks.T - behind * blocks.tokens
    pairs = len(unit_heads(blocks))
    recurrence = in_turn(
        [
            together([recur(refs, o_ref, saved, u, *units[u], scratch, blocks, config, real, ready.add) for u in range(a, a + pairs)])
            for a in range(0, len(units), pairs)
        ]
    )

    def free(u):
        while u not in ready:
            next(recurrence)

    parts = [Unit() for _ in units]
    prepared = [
        prepare(refs, s, u, c, heads, parts[u], scratch, blocks, config, free) for u, (c, heads) in enumerate(units)
    ]
    inverted = [invert(s, u, c, heads, parts[u], scratch, saved, config) for u, (c, heads) in enumerate(units)]
    preparation = staggered(
        [
            (together(prepared[a : a + TOGETHER]), together(inverted[a : a + TOGETHER]))
            for a in range(0, len(units), TOGETHER)
        ]
    )
    weave(preparation, recurrence, ratio=RATIO)

    @pl.when((step > 0) & (last_ref[row, behind] != 0))
    def _leave():
        for h in range(blocks.heads):
            final_ref[0, 0, h] = scratch.state[h].T


class Saved(NamedTuple):
    """What the backward kernel needs beside the inputs."""

    states: Any  # [B, HV, chunks, V, K]: S^T entering each chunk, as the products read it
    inverses: Any  # [B, HV / n, chunks, C, n C] float32: T


class Segments(NamedTuple):
    """Which state enters and leaves at each block of tokens; int32 [B, blocks]."""

    index: jax.Array  # the segment of the block
    first: jax.Array  # 1: the block is its segment's first
    last: jax.Array  # 1: the block is its segment's last


def whole_rows(B: int, n: int) -> Segments:
    """Every row is one segment of n blocks."""
    at = jnp.broadcast_to(jnp.arange(n), (B, n))
    return Segments(jnp.zeros((B, n), jnp.int32), (at == 0).astype(jnp.int32), (at == n - 1).astype(jnp.int32))


def by_block(x: jax.Array, blocks: Blocks) -> jax.Array:
    """[B, T, H] -> [B, H / heads, heads, T]: a block's heads as rows."""
    B, T, H = x.shape
    return x.reshape(B, T, H // blocks.heads, blocks.heads).transpose(0, 2, 3, 1)


def forward(
    arrays: Refs, initial_state: jax.Array | None, segments: Segments, N: int, blocks: Blocks, config: Config,
    save: bool = False,
) -> tuple[jax.Array, jax.Array, Saved | None]:
    """Outputs and final states.

    Args:
      arrays: q, k [B, T, H, K]; v [B, T, HV, V]; g [B, T, HV, K], or log decays [B, T, HV] float32, or None;
        beta [B, T, HV]; rate, dt_bias [HV, K] float32 or None; marks [B, 4, T] float32 or None.
      initial_state: [B, N, HV, K, V] float32 or None.
      segments: [B, blocks of tokens].
      N: segments that have a state of their own in each row.
      blocks: sizes.
      config: the call.
      save: whether to return what `backward` needs.

    Returns:
      o [B, T, HV, V] in v's dtype; final states [B, N, HV, K, V] float32, defined where `segments` visits them;
      `Saved` or None.
    """
    B, T, HV, V = arrays.v.shape
    K, C, heads, tokens = blocks.K, config.chunk, blocks.heads, blocks.tokens
    steps = pl.cdiv(T, tokens)
    n = len(unit_heads(blocks)[0])
    U = len(units_of(blocks, config))
    work = jnp.bfloat16 if blocks.passes == 1 else jnp.float32

    now = lambda t: jnp.minimum(t, steps - 1)  # noqa: E731
    behind = lambda t: jnp.maximum(t - 1, 0)  # noqa: E731
    token_block = lambda width, heads, at: pl.BlockSpec(  # noqa: E731
        (1, tokens, heads, width), lambda b, h, t, *_: (b, at(t), h, 0)
    )
    row_block = pl.BlockSpec((1, 1, heads, tokens), lambda b, h, t, *_: (b, h, 0, now(t)))
    head_block = pl.BlockSpec((1, heads, K), lambda b, h, t, *_: (h, 0, 0))
    state_block = pl.BlockSpec((1, 1, heads, K, V), lambda b, h, t, seg, *_: (b, seg[b, behind(t)], h, 0, 0))
    specs = Refs(
        q=token_block(K, blocks.key_heads, now),
        k=token_block(K, blocks.key_heads, now),
        v=token_block(V, heads, behind),
        g=token_block(K, heads, now) if config.gate == "channel" else row_block,
        beta=row_block,
        rate=head_block,
        dt_bias=head_block,
        marks=pl.BlockSpec((1, 4, tokens), lambda b, h, t, *_: (b, 0, now(t))),
    )
    values = arrays._replace(
        beta=by_block(arrays.beta, blocks),
        g=by_block(arrays.g, blocks) if config.gate == "head" else arrays.g,
        rate=None if arrays.rate is None else arrays.rate.reshape(HV // heads, heads, K),
        dt_bias=None if arrays.dt_bias is None else arrays.dt_bias.reshape(HV // heads, heads, K),
    )
    fields = tuple(name for name in Refs._fields if getattr(values, name) is not None)
    inputs = [getattr(values, name) for name in fields]
    in_specs = [getattr(specs, name) for name in fields]
    if initial_state is not None:
        inputs.append(initial_state)
        in_specs.append(state_block)
    nc = tokens // C
    saved_specs, saved_shapes = [], []
    if save:
        saved_specs = [
            pl.BlockSpec((1, heads, nc, V, K), lambda b, h, t, *_: (b, h, behind(t), 0, 0)),
            pl.BlockSpec((1, heads // n, nc, C, n * C), lambda b, h, t, *_: (b, h, now(t), 0, 0)),
        ]
        saved_shapes = [
            jax.ShapeDtypeStruct((B, HV, steps * nc, V, K), work),
            jax.ShapeDtypeStruct((B, HV // n, steps * nc, C, n * C), jnp.float32),
        ]
    results = pl.pallas_call(
        functools.partial(
            _kernel, fields=fields, blocks=blocks, config=config, initial=initial_state is not None, save=save
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, HV // heads, steps + 1),
            in_specs=in_specs,
            out_specs=[token_block(V, heads, behind), state_block, *saved_specs],
            scratch_shapes=[
                pltpu.VMEM((heads, V, K), jnp.float32),
                pltpu.VMEM((U, n, 2 * C, K), work),
                pltpu.VMEM((U, n, C, K), work),
                pltpu.VMEM((U, C, n * C), work),
                pltpu.VMEM((U, C, n * C), jnp.float32),
                pltpu.VMEM((U, n, 1, K), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, T, HV, V), arrays.v.dtype),
            jax.ShapeDtypeStruct((B, N, HV, K, V), jnp.float32),
            *saved_shapes,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=48 * 2**20
        ),
        interpret=pltpu.InterpretParams(out_of_bounds_reads="uninitialized") if blocks.interpret else False,
        name="delta_rule_forward",
    )(*segments, *inputs)
    return results[0], results[1], Saved(*results[2:]) if save else None
