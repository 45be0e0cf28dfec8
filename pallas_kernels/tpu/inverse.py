"""T = (I + A)^-1 for strictly lower triangular A, heads side by side in lanes.

Diagonal blocks of 16 by forward substitution on the vector unit, exactly in float32; then twice the size at
a time, ``[[E, 0], [L, O]]^-1 = [[E^-1, 0], [-O^-1 L E^-1, O^-1]]``, on the matrix units in three bfloat16
passes (T moves by T dA T, so A and T must stay better than bfloat16). No power of A is formed: with repeated
keys and beta = 2 powers grow without bound although T's entries stay at +-2.

*Packed* storage [s, n C] keeps in column j the s entries that T's column j has inside its diagonal block of
size s: a merge then streams s rows, not C, and the substitution works on all blocks of all heads at once.
"""

from collections.abc import Generator

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu.dots import bf16_dot, split

BLOCK = 16


def iota(shape: tuple[int, ...], dim: int) -> jax.Array:
    """int32 positions along ``dim``."""
    return lax.broadcasted_iota(jnp.int32, shape, dim)


def _pack(x: jax.Array, size: int, C: int) -> jax.Array:
    """[C, nC] -> [size, nC]: of each column the entries inside its diagonal block of ``size``."""
    column = iota((size, x.shape[1]), 1) % C // size
    out = x[:size]
    for block in range(1, C // size):
        out = jnp.where(column == block, x[block * size : (block + 1) * size], out)
    return out


def _unpack(x: jax.Array, C: int) -> jax.Array:
    """[size, nC] -> [C, nC], zero outside the diagonal blocks."""
    column = iota(x.shape, 1) % C // x.shape[0]
    return jnp.concatenate([jnp.where(column == b, x, 0) for b in range(C // x.shape[0])], axis=0)


def over_heads(x: jax.Array, C: int) -> jax.Array:
    """[C, nC] -> [nC, nC], block diagonal over the n heads."""
    n = x.shape[1] // C
    if n == 1:
        return x
    head = iota(x.shape, 1) // C
    return jnp.concatenate([jnp.where(head == h, x, 0) for h in range(n)], axis=0)


def _three_passes(x: jax.Array, y_high: jax.Array, y_low: jax.Array) -> jax.Array:
    """x (y_high + y_low) for a few rows x: [s, m] float32."""
    x_high, x_low = split(x)
    top = bf16_dot(jnp.concatenate([x_high, x_low], axis=0), y_high)
    return top[: x.shape[0]] + (top[x.shape[0] :] + bf16_dot(x_high, y_low))


def unit_lower_inverse(a: jax.Array, C: int, out: list) -> Generator[None, None, None]:
    """(I + A)^-1 of n matrices side by side.

    Args:
      a: [C, n C] float32, each [C, C] strictly lower triangular; C a power of two >= 16.
      C: the chunk size.
      out: receives the result, [C, n C] float32.
    """
    width = a.shape[1]
    row, column = iota((BLOCK, width), 0), iota((BLOCK, width), 1)
    x = jnp.where(row == column % BLOCK, 1.0, 0.0)
    block = _pack(a, BLOCK, C)
    yield
    first = column // BLOCK * BLOCK
    for i in range(BLOCK - 1):
        # Rows below i lose A[:, i] times row i, which is final. Upper rows of A[:, i] are zeros.
        half = 0 if i < 7 else BLOCK // 2
        factor = jnp.take_along_axis(block[half:], first[half:] + i, axis=1)
        new = x[half:] - factor * x[i : i + 1]
        x = new if half == 0 else jnp.concatenate([x[:half], new], axis=0)
        if i % 2:
            yield
    full = _unpack(x, C)
    yield
    size, packed = BLOCK, x
    high, low = split(a)
    row, column = iota(a.shape, 0), iota(a.shape, 1) % C
    while size < C:
        below_even = (row // size == column // size + 1) & ((column // size) % 2 == 0)
        L_high, L_low = (over_heads(jnp.where(below_even, part, 0), C) for part in (high, low))
        yield
        below = _three_passes(
            packed, L_high, L_low
        )  # O^-1 L: [size, nC], in the columns of even blocks, else 0
        yield
        full_high, full_low = (over_heads(part, C) for part in split(full))
        below = -_three_passes(below, full_high, full_low)
        yield
        pair = iota(below.shape, 1) % C // (2 * size)
        zero = jnp.zeros_like(below)
        parts = []
        for p in range(C // (2 * size)):
            parts += [zero, jnp.where(pair == p, below, 0.0)]
        full = full + jnp.concatenate(parts, axis=0)  # row r of the odd block, columns of the even one
        size *= 2
        if size < C:
            even = (iota(below.shape, 1) % C // below.shape[0]) % 2 == 0
            packed = jnp.concatenate([jnp.where(even, packed, 0.0), jnp.where(even, below, packed)], axis=0)
        yield
    out.append(full)
