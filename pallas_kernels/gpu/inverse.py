"""The inverse of a unit lower triangular matrix inside a kernel, by doubling blocks on the tensor cores."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import rowwise, tiles
from pallas_kernels.gpu.tiles import iota


def unit_lower_inverse(a: jax.Array, a_tile, x_tile) -> jax.Array:
    """``(I + A)^-1`` of a strictly lower triangular A.

    Inverse blocks of s tokens grow to 2 s: with L the lower left blocks of the pairs, ``X <- X - X L X``.
    No power of A is formed: with repeated keys and beta = 2 powers overflow although X stays small. float16
    operands: at the same cost eight times bf16's precision, and X is small where the recurrence is stable.

    Args:
      a: [64, 64] float32 in registers.
      a_tile, x_tile: [64, 64] float16 shared-memory tiles for scratch.

    Returns:
      [64, 64] float32 in registers; some warps may still read the tiles.
    """
    a_tile[...] = a.astype(jnp.float16)
    meet = iota(0) ^ iota(1)  # 2^s <= meet < 2^(s+1): the tokens meet when blocks of 2^s double
    x = jnp.where(meet == 1, -a, jnp.where(meet == 0, 1.0, 0.0))
    for s in range(1, 6):
        high = x.astype(jnp.float16)
        plgpu.commit_smem()  # all warps are done with x_tile
        x_tile[...] = high
        plgpu.commit_smem()
        xa = tiles.product(64, (high, a_tile))
        minus_xl = rowwise.keep_level((-xa).astype(jnp.float16), s)
        (x,) = tiles.add_products((x, [(minus_xl, x_tile)]))
    return x
