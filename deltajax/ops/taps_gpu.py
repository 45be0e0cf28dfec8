"""The taps of the short convolution by the Hopper kernels."""

import jax.numpy as jnp
from jaxtyping import Array

from deltajax.ops.pallas_gpu import HALF, other_gpu
from pallas_kernels.gpu.limits import HALO, TAPS_CHANNELS, TAPS_ROWS


def unsupported(x: Array, weight: Array) -> str | None:
    """Why the kernels cannot run this call, or None if they can."""
    if x.dtype not in HALF:
        return f"x must be bfloat16 or float16, got {x.dtype}"
    if x.shape[2] % TAPS_CHANNELS:
        return f"the number of channels is a multiple of {TAPS_CHANNELS}, got {x.shape[2]}"
    if x.shape[1] < TAPS_ROWS:
        return f"takes {TAPS_ROWS} tokens or more, got {x.shape[1]}"
    if weight.shape[1] > HALO + 1 or weight.dtype.itemsize > 4:
        return f"takes at most {HALO + 1} taps of float32 or less, got {weight.shape[1]} of {weight.dtype}"
    return other_gpu()


def forward(
    activation: str | None, x: Array, weight: Array, bias: Array | None, counts: Array | None
) -> Array:
    """See `pallas_kernels.gpu.taps.taps`; the last column of ``weight`` [D, W] is the current token's."""
    from pallas_kernels.gpu.taps import taps

    weight, bias, counts = _call(x, weight, bias, counts)
    return taps(x, weight, bias, counts, silu=activation == "silu")


def backward(
    activation: str | None, x: Array, weight: Array, bias: Array | None, counts: Array | None, dy: Array
) -> tuple[Array, Array, Array | None]:
    """Gradients of x, weight and bias."""
    from pallas_kernels.gpu.taps import taps_back

    by_tap, offset, counts = _call(x, weight, bias, counts)
    dx, dweight, dbias = taps_back(x, by_tap, offset, counts, dy.astype(x.dtype), silu=activation == "silu")
    return (
        dx,
        dweight[::-1].T.astype(weight.dtype),
        None if bias is None else dbias.astype(bias.dtype),
    )


def _call(
    x: Array, weight: Array, bias: Array | None, counts: Array | None
) -> tuple[Array, Array | None, Array]:
    """Weights by tap [W, D], bias and counts as the kernels take them."""
    (B, T, _), W = x.shape, weight.shape[1]
    if counts is None:  # only the first tokens miss taps
        counts = (1 << jnp.minimum(jnp.arange(1, T + 1), W)) - 1
        counts = jnp.broadcast_to(counts.astype(jnp.int32), (B, T))
    f32 = jnp.float32
    return weight.astype(f32).T[::-1], None if bias is None else bias.astype(f32), counts
