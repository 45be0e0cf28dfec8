"""What a unit of the backward kernel carries from stage to stage in scratch memory.

A head's [64, 128] in float32 is an eighth of the registers. What a later stage needs is therefore stored, in
the type it is used in, and read a few rows at a time.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.config import STEP_CHUNKS, Blocks, Config, head_tiles
from pallas_kernels.tpu.relations import middle_block

ROWS = 16  # that element-wise work takes at a time


def in_registers(blocks: Blocks, config: Config) -> bool:
    """Whether units keep their values in registers: but of a bounded per-channel gate of narrow heads.

    Backward static schedules in scratch memory, against registers: an unbounded per-channel gate 8 % longer
    on v6e, a per-head gate 6 % on v5e and v5p, no gate 1.5 % on TPU7x (8 % with the waits). Wider heads, or
    more of them, do not fit: K = 256, V = 512 would take all of TPU7x's memory.
    """
    chunks = blocks.heads * blocks.tokens // config.chunk
    wide = head_tiles(blocks.K, blocks.V) > 1 or chunks > STEP_CHUNKS
    return config.gate != "channel" or middle_block(config, 1) < ROWS or wide


def anchors(config: Config) -> list[int]:
    """Sizes of the blocks across whose border tokens are related; 0: inside blocks about their middle."""
    return [0] + [size for size in (16, 32) if middle_block(config, 1) <= size < config.chunk]


class Kept(NamedTuple):
    """Scratch memory of a unit of n heads. The first axis has one entry."""

    q: Any  # [1, n, C, K] float32
    k: Any
    q_factor: Any  # [1, n, C, 1] float32, what q and k were multiplied by; None: numbers
    k_factor: Any
    decays: Any  # [1, 2C, nK] bfloat16: log2 decays, high above low parts
    G: Any  # [1, n, C, K] float32: their sums
    rows: Any  # for each anchor [1, n, R, K]: K above Q, decayed since the anchor
    columns: Any  # for each anchor [1, n, R / 2, K]: K, decayed until the anchor
    factors: Any  # for each anchor what its operands were multiplied by
    reads: Any  # [1, n, 2C, K]: Q exp(G) above K exp(G)
    writes: Any  # [1, n, C, K]: K exp(G_C - G)
    keep: Any  # [1, n, 1, K] float32: exp(G_C)
    kk: Any  # [1, C, nC] float32
    R: Any  # [1, n, C, V] float32: V - K~ S
    V: Any  # [1, parts, C, nV]: V'
    dO: Any  # [1, n, C, V]
    dV: Any  # [1, n, C, V] float32: P^T dO
    dY: Any  # [1, n, C, V]
    dR: Any  # [1, n, C, V]: -dR
    dS: Any  # [1, n, V, K]
    kept: Any  # [1, n, 1, K] float32: sum over V of S dS exp(G_C)
    dbeta: Any  # [1, n, C, V] float32: dY R
    d: Any  # for each anchor [1, parts * R, nC]
    dq: Any  # two of [1, n, C, K] float32: sums are read from one and stored to the other
    dk: Any
    dG: Any


def kept_shapes(n: int, blocks: Blocks, config: Config) -> Kept:
    """Shapes of `Kept`."""
    C, K, V, work, f32 = config.chunk, blocks.K, blocks.V, blocks.work, jnp.dtype(jnp.float32)

    def m(*shape, dtype=f32):
        return pltpu.VMEM((1, *shape), dtype)

    def two(*shape):
        return m(*shape), m(*shape)

    parts = 2 if blocks.passes == 1 else 1
    sizes = anchors(config)
    R = [C if size else 2 * C for size in sizes]  # across a border half of the tokens are rows, half columns
    factor = m(n, C, min(K, 128)) if config.normalize else None
    return Kept(
        q=m(n, C, K),
        k=m(n, C, K),
        q_factor=factor,
        k_factor=factor,
        decays=m(2 * C, n * K, dtype=jnp.bfloat16),
        G=m(n, C, K),
        rows=tuple(m(n, r, K, dtype=work) for r in R),
        columns=tuple(m(n, r // 2, K, dtype=work) for r in R),
        factors=tuple(m(1 if size else 2, n, C, K) for size in sizes),
        reads=m(n, 2 * C, K, dtype=work),
        writes=m(n, C, K, dtype=work),
        keep=m(n, 1, K),
        kk=m(C, n * C),
        R=m(n, C, V),
        V=m(parts, C, n * V, dtype=work),
        dO=m(n, C, V, dtype=work),
        dV=m(n, C, V),
        dY=m(n, C, V, dtype=work),
        dR=m(n, C, V, dtype=work),
        dS=m(n, V, K, dtype=work),
        kept=m(n, 1, K),
        dbeta=m(n, C, V),
        d=tuple(m(parts * r, n * C, dtype=work) for r in R),
        dq=two(n, C, K),
        dk=two(n, C, K),
        dG=two(n, C, K),
    )
