"""What happens inside a chunk: decays, relation matrices, the triangular inverse, pseudo-values.

Shapes: n chunks, b rows, h value heads, C tokens a chunk; every array here is [n, b, h, C, .] and every
chunk is independent of the others.

Decays are never written as a difference of cumulative sums: with log decays of -50 and -1e-4 in one chunk
that difference would lose the small one, and -inf would give NaN. Instead, token r sees token i < r across
an *anchor* between them, ``G_r - G_i = (G_r - G_anchor) + (G_anchor - G_i)``, where both terms are sums of
log decays <= 0. Anchors are the borders of blocks of 1, 2, 4, ... tokens: at each level the odd block of a
pair looks back on the even one, so that every pair of tokens meets at exactly one level.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Array, Float

from deltajax.ops.problem import GateKind, Tokens

INVERSE_BLOCK = 16


class Chunks(NamedTuple):
    """A chunk's action on the state S entering it, in float32.

    ``V' = u - w S``, ``O = qg S + p V'``, ``S_next = decay * S + kg^T V'``.
    """

    w: Float[Array, "n b h C K"]  # W = T (beta K exp(G))
    u: Float[Array, "n b h C V"]  # U = T (beta V)
    qg: Float[Array, "n b h C K"]  # Q exp(G)
    p: Float[Array, "n b h C C"]  # decayed Q K^T, i <= r
    kg: Float[Array, "n b h C K"]  # K exp(G_C - G)
    decay: Float[Array, "n b h #K 1"] | None  # exp(G_C); None: no gate


class Level(NamedTuple):
    """One level of anchors: m = C / (2 size) pairs of blocks of ``size`` tokens."""

    size: int
    after: Float[Array, "... m size D"]  # G_r - G_anchor for the odd block's tokens
    before: Float[Array, "... m size D"]  # G_anchor - G_i for the even block's tokens


def _pairs(x: Float[Array, "... M s D"]) -> tuple[Array, Array]:
    """The even and the odd of each pair of blocks, each [..., M / 2, s, D]."""
    x = x.reshape(*x.shape[:-3], x.shape[-3] // 2, 2, *x.shape[-2:])
    return x[..., 0, :, :], x[..., 1, :, :]


def _blocks(x: Float[Array, "... C D"], size: int) -> Float[Array, "... M size D"]:
    return x.reshape(*x.shape[:-2], x.shape[-2] // size, size, x.shape[-1])


def decay_levels(g: Float[Array, "... C D"]) -> tuple[list[Level], Array, Array]:
    """Log decays from and to the anchors of every level.

    Returns:
      The levels, sizes 1, 2, 4, ..., C / 2; ``G`` [..., C, D], from the chunk's start through each token;
      ``G_C - G`` [..., C, D], from behind each token to the chunk's end.
    """
    prefix, suffix = _blocks(g, 1), jnp.zeros_like(_blocks(g, 1))  # [..., C, 1, D]
    levels = []
    for _ in range(g.shape[-2].bit_length() - 1):
        (prefix_even, prefix_odd), (suffix_even, suffix_odd) = _pairs(prefix), _pairs(suffix)
        levels.append(Level(prefix_odd.shape[-2], prefix_odd, suffix_even))
        total_even, total_odd = prefix_even[..., -1:, :], prefix_odd[..., -1:, :]
        prefix = jnp.concatenate([prefix_even, total_even + prefix_odd], axis=-2)
        suffix = jnp.concatenate([suffix_even + total_odd, suffix_odd], axis=-2)
    return levels, prefix[..., 0, :, :], suffix[..., 0, :, :]


def _merge(even_odd: Float[Array, "... M s s"], block: Float[Array, "... m s s"]) -> Array:
    """Lower-triangular blocks of twice the size: [[even, 0], [block, odd]]."""
    even, odd = _pairs(even_odd)
    top = jnp.concatenate([even, jnp.zeros_like(even)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([block, odd], axis=-1)], axis=-2)


def decay_matrix(levels: list[Level]) -> Float[Array, "... C C"]:
    """``exp(G_r - G_i)`` for i <= r, else 0, of a per-head gate (levels with D = 1)."""
    one = levels[0].after
    gamma = jnp.ones((*one.shape[:-3], 2 * one.shape[-3], 1, 1), one.dtype)
    for level in levels:
        gamma = _merge(gamma, jnp.exp(level.after) * jnp.exp(level.before).mT)
    return gamma[..., 0, :, :]


def decayed_relations(
    q: Float[Array, "... C K"], k: Float[Array, "... C K"], levels: list[Level], precision: Precision
) -> tuple[Float[Array, "... C C"], Float[Array, "... C C"]]:
    """``sum_d x_r[d] k_i[d] exp(G_r[d] - G_i[d])`` of a per-channel gate.

    Returns:
      for x = k and i < r; for x = q and i <= r; 0 elsewhere.
    """
    qk = jnp.sum(q * k, axis=-1)[..., None, None]  # [..., C, 1, 1]
    kk = jnp.zeros_like(qk)
    for size, after, before in levels:
        k_even, k_odd = _pairs(_blocks(k, size))
        _, q_odd = _pairs(_blocks(q, size))
        columns = k_even * jnp.exp(before)  # [..., m, size, K]
        rows = jnp.concatenate([k_odd, q_odd], axis=-2) * jnp.exp(jnp.concatenate([after, after], axis=-2))
        if size < 4:  # too small for matrix units: multiply and add
            block = jnp.sum(rows[..., :, None, :] * columns[..., None, :, :], axis=-1)
        else:
            block = jnp.matmul(rows, columns.mT, precision=precision)
        kk, qk = _merge(kk, block[..., :size, :]), _merge(qk, block[..., size:, :])
    return kk[..., 0, :, :], qk[..., 0, :, :]


@jax.custom_vjp
def unit_lower_inverse(a: Float[Array, "... C C"]) -> Float[Array, "... C C"]:
    """``T = (I + A)^-1`` for a strictly lower triangular A; C a power of two.

    Blocks of twice the size from blocks: ``[[E, 0], [L, O]]^-1 = [[E^-1, 0], [-O^-1 L E^-1, O^-1]]``. No
    power of A is formed: with repeated keys and beta = 2 powers overflow although T stays small.
    """
    C = a.shape[-1]
    size = min(C, INVERSE_BLOCK)
    block = _diagonal_blocks(a, size, below=0)  # [..., C / size, size, size]
    inverse = _small_inverse(block)
    while size < C:
        even, odd = _pairs(inverse)
        below = _diagonal_blocks(a, size, below=1)
        inverse = _merge(inverse, -_full_matmul(odd, _full_matmul(below, even)))
        size *= 2
    return inverse[..., 0, :, :]


def _full_matmul(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=Precision.HIGHEST)


def _diagonal_blocks(a: Float[Array, "... C C"], size: int, below: int) -> Float[Array, "... m size size"]:
    """The diagonal's blocks, or (``below`` = 1) the lower left block of each pair of them."""
    starts = range(0, a.shape[-1], size * (1 + below))
    return jnp.stack(
        [a[..., i + size * below : i + size * (1 + below), i : i + size] for i in starts], axis=-3
    )


def _small_inverse(a: Float[Array, "... s s"]) -> Float[Array, "... s s"]:
    """The same doubling inside one small matrix, ``X <- X - X L X`` with L a level's lower left blocks."""
    size = a.shape[-1]
    r, i = np.arange(size)[:, None], np.arange(size)[None]
    level = np.bitwise_xor(r, i)  # 2^l <= level < 2^(l+1): tokens r and i meet at block size 2^l
    inverse = jnp.eye(size, dtype=a.dtype) - jnp.where(level == 1, a, 0)
    for l in range(1, size.bit_length() - 1):
        below = jnp.where((level >> l == 1) & (r > i), a, 0)
        inverse = inverse - _full_matmul(_full_matmul(inverse, below), inverse)
    return inverse


def _inverse_fwd(a):
    inverse = unit_lower_inverse(a)
    return inverse, inverse


def _inverse_bwd(inverse, cotangent):
    # d(I + A)^-1 = -T dA T, so dA = -T^T dT T^T, of which the strictly lower part is A's.
    product = _full_matmul(_full_matmul(inverse.mT, cotangent), inverse.mT)
    return (-jnp.tril(product, -1),)


unit_lower_inverse.defvjp(_inverse_fwd, _inverse_bwd)


def chunk_actions(tokens: Tokens, gate_kind: GateKind, precision: Precision) -> Chunks:
    """Everything about the chunks that does not depend on the state.

    Args:
      tokens: chunked: q, k [n, b, H, C, K]; v [n, b, h, C, V]; beta [n, b, h, C, 1]; g None,
        [n, b, h, C, 1] (head) or [n, b, h, C, K] (channel).
      gate_kind: the gate's kind.
      precision: of the matrix products, the inverse aside (always full).
    """
    q, k, v, g, beta = tokens
    group = v.shape[2] // k.shape[2]

    def grouped(x):  # [n, b, H, ...] -> [n, b, h, ...]
        return jnp.repeat(x, group, axis=2) if group > 1 else x

    if gate_kind == "channel":
        q, k = grouped(q), grouped(k)
        levels, G, to_end = decay_levels(g)
        kk, qk = decayed_relations(q, k, levels, precision)
    else:
        kk = grouped(jnp.tril(jnp.matmul(k, k.mT, precision=precision), -1))
        qk = grouped(jnp.tril(jnp.matmul(q, k.mT, precision=precision)))
        q, k = grouped(q), grouped(k)
        if gate_kind == "head":
            levels, G, to_end = decay_levels(g)
            gamma = decay_matrix(levels)
            kk, qk = kk * gamma, qk * gamma

    T = unit_lower_inverse(beta * kk)  # (I + A)^-1
    u = jnp.matmul(T, beta * v, precision=precision)
    if gate_kind == "none":
        return Chunks(jnp.matmul(T, beta * k, precision=precision), u, q, qk, k, None)
    from_start = jnp.exp(G)
    w = jnp.matmul(T, beta * k * from_start, precision=precision)
    decay = from_start[..., -1, :, None]  # [n, b, h, K or 1, 1]
    return Chunks(w, u, q * from_start, qk, k * jnp.exp(to_end), decay)
