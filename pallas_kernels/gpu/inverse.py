"""The inverse of a unit lower triangular matrix inside a kernel, by doubling blocks on the tensor cores."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import rowwise, tiles


def unit_lower_inverse(a: jax.Array, a_tile, x_tile) -> jax.Array:
    """``(I + A)^-1`` of a strictly lower triangular A.

    Blocks of 16 tokens are solved row by row. Then inverse blocks of s tokens grow to 2 s: with L the lower
    left blocks of the pairs, ``X <- X - X L X``. All of it of A in float16: of two roundings of equal
    entries the errors would add up.
    No power of A is formed: with repeated keys and beta = 2 powers overflow although X stays small. float16
    operands: at the same cost eight times bf16's precision, and X is small where the recurrence is stable.

    Args:
      a: [64, 64] float32 in registers.
      a_tile, x_tile: [64, 64] float16 shared-memory tiles for scratch.

    Returns:
      [64, 64] float32 in registers; some warps may still read the tiles.
    """
    a_tile[...] = a.astype(jnp.float16)
    x = rowwise.diagonal_inverse(a.astype(jnp.float16).astype(jnp.float32))
    for s in (4, 5):  # doubles blocks of 2^s
        high = x.astype(jnp.float16)
        tiles.meet()  # all warps are done with x_tile
        x_tile[...] = high
        plgpu.commit_smem()
        xa = tiles.product(64, (high, a_tile))
        minus_xl = rowwise.keep_level((-xa).astype(jnp.float16), s)
        (x,) = tiles.add_products((x, [(minus_xl, x_tile)]))
    return x
