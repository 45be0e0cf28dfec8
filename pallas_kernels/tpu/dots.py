"""Matrix products as the TPU's matrix units run them: bfloat16 operands, float32 sums.

Rounding is always written out (never left to a backend's default precision), so that interpret mode on a CPU
computes what the chip computes.
"""

import jax
import jax.numpy as jnp
from jax import lax

# Contracted dimensions of the two operands.
NN = ((1,), (0,))  # x y
NT = ((1,), (1,))  # x y^T
TN = ((0,), (0,))  # x^T y


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """bfloat16 (high, low) with high + low = x to 2^-17 of x; low is 0 where x fits in bfloat16."""
    if x.dtype == jnp.bfloat16:
        return x, jnp.zeros_like(x)
    # By its bits: a compiler may take the difference to a rounded value for zero.
    bits = (lax.bitcast_convert_type(x, jnp.uint32) + jnp.uint32(0x8000)) & jnp.uint32(0xFFFF0000)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`split` to 2^-16 of x in fewer steps, high cut off and not rounded: where only their sum is used."""
    if x.dtype == jnp.bfloat16:
        return split(x)
    bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def bf16_dot(x: jax.Array, y: jax.Array, contract=NN) -> jax.Array:
    """One pass: operands rounded to bfloat16, float32 result."""
    return lax.dot_general(
        x.astype(jnp.bfloat16),
        y.astype(jnp.bfloat16),
        (contract, ((), ())),
        preferred_element_type=jnp.float32,
    )


def dot(x: jax.Array, y: jax.Array, contract=NN, passes: int = 1) -> jax.Array:
    """x y in one pass, or in three with errors near 2^-16 of the factors."""
    if passes == 1:
        return bf16_dot(x, y, contract)
    # Along the summed axis, so that the matrix units add what they can themselves.
    (xh, xl), (yh, yl) = split(x), split(y)
    (i,), (j,) = contract
    left, right = jnp.concatenate([xh, xh], axis=i), jnp.concatenate([yh, yl], axis=j)
    return bf16_dot(left, right, contract) + bf16_dot(xl, yh, contract)


def dot_split_left(x: jax.Array, y: jax.Array, passes: int = 1, deep: bool = True) -> jax.Array:
    """x y with x to 2^-16: for terms that cancel in the sum. y's rounding remains where ``passes`` is 1.

    ``deep``: both parts along the summed axis, so that the matrix units add them; else one above the other,
    with fewer loads of y.
    """
    if passes == 3:
        return dot(x, y, NN, 3)
    y = y.astype(jnp.bfloat16)
    if deep:
        return bf16_dot(jnp.concatenate(halves(x), axis=1), jnp.concatenate([y, y], axis=0))
    product = bf16_dot(jnp.concatenate(halves(x), axis=0), y)
    return product[: x.shape[0]] + product[x.shape[0] :]


def dot_split_right(x: jax.Array, y: jax.Array) -> jax.Array:
    """x y^T with y to 2^-16 and x rounded to bfloat16."""
    x = x.astype(jnp.bfloat16)
    return bf16_dot(jnp.concatenate([x, x], axis=1), jnp.concatenate(halves(y), axis=1), NT)
