"""What happens inside a chunk: decays, relation matrices, the triangular inverse, pseudo-values.

Shapes: n chunks, b rows, h value heads, C tokens a chunk; every array here is [n, b, h, C, .] and every
chunk is independent of the others.

Decays are never written as a difference of cumulative sums: with log decays of -50 and -1e-4 in one chunk
that difference would lose the small one, and -inf would give NaN. Instead, token r sees token i < r across
an *anchor* between them, ``G_r - G_i = (G_r - G_anchor) + (G_anchor - G_i)``, where both terms are sums of
log decays <= 0. Anchors are the borders of blocks of 1, 2, 4, ... tokens: at each level the odd block of a
pair looks back on the even one, so that every pair of tokens meets at exactly one level.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Array, Float

from deltajax.ops.problem import GateKind, Tokens

INVERSE_BLOCK = 16
# exp of anything below is 0 in float32 and float64 alike, and sums of a chunk's worth stay finite: -inf, a
# full reset, would turn 0 * inf into NaN in the triangular products.
MIN_LOG_DECAY = -1e4


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


def _pairs(x: Float[Array, "... M s D"]) -> tuple[Array, Array]:
    """The even and the odd of each pair of blocks, each [..., M / 2, s, D]."""
    x = x.reshape(*x.shape[:-3], x.shape[-3] // 2, 2, *x.shape[-2:])
    return x[..., 0, :, :], x[..., 1, :, :]


def _blocks(x: Float[Array, "... C D"], size: int) -> Float[Array, "... M size D"]:
    return x.reshape(*x.shape[:-2], x.shape[-2] // size, size, x.shape[-1])


def _from_start(g: Float[Array, "... s D"]) -> Float[Array, "... s D"]:
    """Sum of log decays from the block's start through each token."""
    return _full_matmul(jnp.tril(jnp.ones((g.shape[-2],) * 2, g.dtype)), g)


def _to_end(g: Float[Array, "... s D"]) -> Float[Array, "... s D"]:
    """Sum of log decays behind each token to the block's end."""
    return _full_matmul(jnp.triu(jnp.ones((g.shape[-2],) * 2, g.dtype), 1), g)


def _anchored(g: Float[Array, "... C D"], size: int) -> tuple[Array, Array]:
    """The factors of ``exp(G_r - G_i)`` for r in an odd block of ``size`` tokens, i in the even one before.

    Returns:
      ``exp(G_r - G_anchor)`` and ``exp(G_anchor - G_i)``, each [..., C / (2 size), size, D] and at most 1.
    """
    even, odd = _pairs(_blocks(g, size))
    return jnp.exp(_from_start(odd)), jnp.exp(_to_end(even))


def _levels(C: int) -> list[int]:
    """Block sizes 1, 2, 4, ..., C / 2."""
    return [1 << l for l in range(C.bit_length() - 1)]


def _merge(even_odd: Float[Array, "... M s s"], block: Float[Array, "... m s s"]) -> Array:
    """Lower-triangular blocks of twice the size: [[even, 0], [block, odd]]."""
    even, odd = _pairs(even_odd)
    top = jnp.concatenate([even, jnp.zeros_like(even)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([block, odd], axis=-1)], axis=-2)


def decay_matrix(g: Float[Array, "... C 1"]) -> Float[Array, "... C C"]:
    """``exp(G_r - G_i)`` for i <= r, else 0, of a per-head gate."""
    gamma = jnp.ones_like(g)[..., None]  # [..., C, 1, 1]
    for size in _levels(g.shape[-2]):
        after, before = _anchored(g, size)
        gamma = _merge(gamma, after * before.mT)
    return gamma[..., 0, :, :]


def decayed_relations(
    q: Float[Array, "... C K"], k: Float[Array, "... C K"], g: Float[Array, "... C K"], precision: Precision
) -> tuple[Float[Array, "... C C"], Float[Array, "... C C"]]:
    """``sum_d x_r[d] k_i[d] exp(G_r[d] - G_i[d])`` of a per-channel gate.

    Returns:
      for x = k and i < r; for x = q and i <= r; 0 elsewhere.
    """

    @partial(jax.checkpoint, static_argnums=3)  # keep q, k and g, not every level's decayed copies of them
    def relate(q, k, g, size):
        after, before = _anchored(g, size)
        k_even, k_odd = _pairs(_blocks(k, size))
        _, q_odd = _pairs(_blocks(q, size))
        columns = k_even * before  # [..., m, size, K]
        rows = jnp.concatenate([k_odd * after, q_odd * after], axis=-2)
        if size < 4:  # too small for matrix units: multiply and add
            return jnp.sum(rows[..., :, None, :] * columns[..., None, :, :], axis=-1)
        return jnp.matmul(rows, columns.mT, precision=precision)

    qk = jnp.sum(q * k, axis=-1)[..., None, None]  # [..., C, 1, 1]
    kk = jnp.zeros_like(qk)
    for size in _levels(q.shape[-2]):
        block = relate(q, k, g, size)
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
      precision: of products whose errors do not build up. The inverse, what it multiplies and the K K^T of
        ungated and per-head gates get full precision always: with repeated keys and beta near 2, T's terms
        of alternating sign cancel.
    """
    q, k, v, g, beta = tokens
    group = v.shape[2] // k.shape[2]

    def grouped(x):  # [n, b, H, ...] -> [n, b, h, ...]
        return jnp.repeat(x, group, axis=2) if group > 1 else x

    if g is not None:
        g = jnp.maximum(g, MIN_LOG_DECAY)
    if g is not None and gate_kind == "channel":
        q, k = grouped(q), grouped(k)
        kk, qk = decayed_relations(q, k, g, precision)
    else:  # products per key head; a per-head decay multiplies them afterwards
        kk = grouped(jnp.tril(_full_matmul(k, k.mT), -1))
        qk = grouped(jnp.tril(jnp.matmul(q, k.mT, precision=precision)))
        q, k = grouped(q), grouped(k)
        if g is not None:
            gamma = decay_matrix(g)
            kk, qk = kk * gamma, qk * gamma

    T = unit_lower_inverse(beta * kk)  # (I + A)^-1
    u = _full_matmul(T, beta * v)
    if g is None:
        return Chunks(_full_matmul(T, beta * k), u, q, qk, k, None)
    from_start, to_end = jnp.exp(_from_start(g)), jnp.exp(_to_end(g))
    w = _full_matmul(T, beta * k * from_start)
    return Chunks(w, u, q * from_start, qk, k * to_end, from_start[..., -1, :, None])
