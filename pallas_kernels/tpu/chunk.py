"""Everything about a chunk that does not depend on the state: what is prepared ahead of the recurrences.

A *unit* is one chunk of n neighbouring value heads (a pair where heads come in pairs), handled side by side
in lanes.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.tpu import gates, tiles
from pallas_kernels.tpu.config import Blocks, Config
from pallas_kernels.tpu.dots import halves
from pallas_kernels.tpu.inverse import iota, unit_lower_inverse
from pallas_kernels.tpu.relations import CAP, CAPPED, Decays, beside, capped, channel_relations, relate, stack
from pallas_kernels.tpu.weave import Steps


class Refs(NamedTuple):
    """Input blocks. Absent ones are None."""

    q: Any  # [1, tokens, key heads, K], in parts of 128 lanes
    k: Any
    v: Any  # [1, tokens, heads, V], in parts
    g: Any  # per channel [1, tokens, heads, K], in parts; per head, log decays [1, 1, 1, heads, tokens]
    beta: Any  # [1, 1, 1, heads, tokens]
    rate: Any  # [1, heads, K]: exp(A_log)
    dt_bias: Any  # [1, heads, K]
    marks: Any  # [1, 1, 4, tokens]: real, run, seen, last of packed rows


class Scalars(NamedTuple):
    """A block's per-token scalars, float32, as rows and, where they scale a matrix's rows, as columns."""

    beta: jax.Array  # [heads, tokens]
    beta_columns: jax.Array  # [tokens, heads]
    g: Any  # [heads, tokens] per-head log2 decays
    marks: Any  # [4, tokens], or None
    mark_columns: Any  # [tokens, 4], or None
    real: Any  # [tokens, 1] bool; None: all tokens are


REAL, RUN, SEEN, LAST = range(4)
ZERO = -1e3  # log2 of nothing


def scalars(refs: Refs, blocks: Blocks, block_index, config: Config) -> Scalars:
    """Reads a block's scalars; padding gets beta = 0 and g = 0."""
    beta = refs.beta[0, 0, 0].astype(jnp.float32)
    g = None
    if config.gate == "head":
        g = jnp.maximum(refs.g[0, 0, 0], gates.MIN_LOG_DECAY) * gates.LOG2E
    marks = columns = real = None
    if refs.marks is not None:
        marks = refs.marks[0, 0]
        columns = marks.T
        row = marks[REAL : REAL + 1] > 0
        real = columns[:, REAL : REAL + 1] > 0
    elif blocks.ragged:
        left = blocks.T - block_index * blocks.tokens
        row = iota((1, blocks.tokens), 1) < left
        real = iota((blocks.tokens, 1), 0) < left
    if real is not None:
        beta = jnp.where(row, beta, 0.0)
        g = None if g is None else jnp.where(row, g, 0.0)
    return Scalars(beta, beta.T, g, marks, columns, real)


@dataclasses.dataclass
class Head:
    """One head of a unit: its tokens, float32 [C, .], and their cumulative log2 decays."""

    q: jax.Array  # normalised, times scale
    k: jax.Array
    q_factor: Any  # what q and k were multiplied by: [C, 1], or a number
    k_factor: Any
    k_given: Any = None  # k as it was before normalisation
    g: Any = None  # [C, K] log2 decays of a per-channel gate
    G: Any = None  # [C, K] or [C, 1]
    decays: Any = None  # Decays of a per-channel gate


@dataclasses.dataclass
class Unit:
    """A unit while it is prepared. [C, n C] matrices hold the heads side by side."""

    heads: list[Head] = dataclasses.field(default_factory=list)
    kk: Any = None  # decayed K K^T, i < r
    p: Any = None  # decayed Q K^T, i <= r
    gamma: Any = None  # decays of a per-head gate
    T: Any = None  # (I + beta kk)^-1


def normalizer(x: jax.Array, scale: float, config: Config) -> Any:
    """What x is multiplied by: scale and, if asked, the inverse of its length. [C, 1], or a number."""
    if config.normalize:
        return jax.lax.rsqrt(jnp.sum(x * x, axis=1, keepdims=True) + 1e-6) * scale
    return scale


def normalized_gradient(dy: jax.Array, y: jax.Array, factor: Any, scale: float, config: Config) -> jax.Array:
    """Pulls dy back through y = x * normalizer(x)."""
    if config.normalize:
        dy = dy - y * (jnp.sum(dy * y, axis=1, keepdims=True) * scale**-2)
    return dy * factor


def load_heads(
    refs: Refs, s: Scalars, heads: list[int], c: int, unit: Unit, blocks: Blocks, config: Config
) -> Steps:
    """Reads the unit's q, k and gate."""
    C = config.chunk
    real = None if s.real is None else s.real[c * C : (c + 1) * C]

    def keep(x):
        return x if real is None else jnp.where(real, x, 0.0)

    key_heads = sorted({h // blocks.group for h in heads})
    loaded = {}
    qs = tiles.load(refs.q, c * C, C, key_heads, blocks.interpret)
    ks = tiles.load(refs.k, c * C, C, key_heads, blocks.interpret)
    for h, q, k in zip(key_heads, qs, ks, strict=True):
        q, k = keep(q), keep(k)
        q_factor, k_factor = normalizer(q, config.scale, config), normalizer(k, 1.0, config)
        loaded[h] = q * q_factor, k * k_factor, q_factor, k_factor, k
        yield
    unit.heads = [Head(*loaded[h // blocks.group]) for h in heads]
    if config.gate == "channel":
        raw = tiles.load(refs.g, c * C, C, heads, blocks.interpret)
        gs = []
        for h, x in zip(heads, raw, strict=True):
            rate = None if refs.rate is None else refs.rate[0, h : h + 1]
            dt = None if refs.dt_bias is None else refs.dt_bias[0, h : h + 1]
            gs.append(keep(gates.log2_decay(keep(x), rate, dt, config)))
            yield
        for head, g in zip(unit.heads, gs, strict=True):
            head.g = g
            head.G, near = gates.cumulative(g), None
            if capped(config, blocks.passes):
                near = gates.around_middles(jnp.maximum(g, CAP * gates.LOG2E), CAPPED)
            head.decays = Decays(head.G, near, config, blocks.passes)
        yield


def lane_columns(x: jax.Array, heads: list[int], c: int, C: int) -> jax.Array:
    """Columns ``heads`` of x [tokens, all heads], each across its head's lanes: [C, nC]."""
    columns = [x[c * C : (c + 1) * C, h : h + 1] for h in heads]
    shape = (C, len(heads) * C)
    out = jnp.broadcast_to(columns[0], shape)
    for j, column in enumerate(columns[1:], start=1):
        out = jnp.where(iota(shape, 1) >= j * C, column, out)
    return out


def lane_rows(x: jax.Array, heads: list[int], c: int, C: int) -> jax.Array:
    """Rows ``heads`` of x [all heads, tokens] one after the other: [1, nC]."""
    return beside([x[h : h + 1, c * C : (c + 1) * C] for h in heads])


def pairs_in_order(s: Scalars, c: int, n: int, C: int) -> tuple[jax.Array, jax.Array]:
    """Which pairs of tokens of one run relate: rows after columns, and that or the same; [C, n C] bool."""
    shape = (C, n * C)
    row, column = iota(shape, 0), iota(shape, 1) % C
    strict, inclusive = row > column, row >= column
    if s.marks is not None:
        runs = s.marks[RUN : RUN + 1, c * C : (c + 1) * C]
        same = lane_columns(s.mark_columns, [RUN] * n, c, C) == beside([runs] * n)
        strict, inclusive = strict & same, inclusive & same
    return strict, inclusive


def solve(
    refs: Refs, s: Scalars, heads: list[int], c: int, unit: Unit, blocks: Blocks, config: Config
) -> Steps:
    """Relations of the unit's tokens: sets unit.kk and unit.p, masked, and G of a per-head gate."""
    C = config.chunk
    strict, inclusive = pairs_in_order(s, c, len(heads), C)
    qs, ks = [h.q for h in unit.heads], [h.k for h in unit.heads]
    if config.gate == "channel":
        out: list[jax.Array] = []
        yield from channel_relations(qs, ks, [h.decays for h in unit.heads], C, blocks.passes, out)
        kk, p = out
    else:
        product = relate([stack(k, q) for k, q in zip(ks, qs, strict=True)], ks, blocks.passes)
        yield
        kk, p = product[:C], product[C:]
        if config.gate == "head":
            g = s.g[:, c * C : (c + 1) * C]
            triu = jnp.where(iota((2 * C, C), 0) % C <= iota((2 * C, C), 1), 1.0, 0.0).astype(jnp.bfloat16)
            rows = jax.lax.dot(
                jnp.concatenate(halves(g), axis=1), triu, preferred_element_type=jnp.float32
            )  # [all heads, C]: G
            columns = rows.T
            yield
            difference = lane_columns(columns, heads, 0, C) - lane_rows(rows, heads, 0, C)
            gamma = jnp.exp2(jnp.where(inclusive, difference, ZERO))
            kk, p = kk * gamma, p * gamma
            unit.gamma = gamma
            for j, head in enumerate(unit.heads):
                head.G = columns[:, heads[j] : heads[j] + 1]
            yield
    unit.kk = jnp.where(strict, kk, 0.0)
    unit.p = p if config.gate == "head" else jnp.where(inclusive, p, 0.0)
    yield


def invert(s: Scalars, heads: list[int], c: int, unit: Unit, config: Config) -> Steps:
    """Sets unit.T = (I + beta kk)^-1."""
    out: list[jax.Array] = []
    yield from unit_lower_inverse(
        unit.kk * lane_columns(s.beta_columns, heads, c, config.chunk), config.chunk, out
    )
    unit.T = out[0]
