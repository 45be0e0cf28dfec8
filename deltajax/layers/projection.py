"""The layers' projections, whose gradients are summed over devices in float32."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from deltajax.layers.sharding import MatrixGradient, OpSharding, accumulator, op_sharding

# Name (of `jax.ad_checkpoint.checkpoint_name`) of a projection's output, before the bias.
PROJECTION_OUTPUT = "projection_output"


class Projection(nnx.Linear):
    """An `nnx.Linear` whose kernel's two dimensions have logical names.

    Under `shard_ops` each device makes the kernel's gradient of its own tokens in the accumulators' dtype and
    sums it over the devices in that, straight to where the kernel lies. Left alone, XLA would round each
    device's part to the compute dtype first, and gives some kernels the whole sum on every device.

    Args:
      axes: logical names of the kernel's dimensions.
      options: `nnx.Linear`'s, with `dtype`, and `precision` where it matters.
    """

    def __init__(self, *sizes: int, axes: tuple[str, ...], **options: Any):
        super().__init__(*sizes, **options)
        self.axes = axes

    def __call__(self, x: Float[Array, "*B n"], out_sharding: Any = None) -> Float[Array, "*B m"]:
        """`x @ kernel + bias` in the compute dtype."""
        x, kernel, where = x.astype(self.dtype), self.kernel[...], op_sharding()
        if where is None or x.ndim != 3:
            y = jnp.matmul(x, kernel.astype(x.dtype), precision=self.precision, out_sharding=out_sharding)
        else:
            # Named, since a policy that saves products does not see into a custom derivative under a scan.
            y = checkpoint_name(_product(x, kernel, self.axes, self.precision, where), PROJECTION_OUTPUT)
        if self.bias is None:
            return y
        # Widened, and with it the sum that is the bias's gradient.
        return (y.astype(accumulator(y.dtype)) + self.bias[...]).astype(y.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(
    x: Float[Array, "B T n"], kernel: Float[Array, "n m"], axes, precision, where
) -> Float[Array, "B T m"]:
    return jnp.matmul(x, kernel.astype(x.dtype), precision=precision)


def _product_fwd(x, kernel, axes, precision, where):
    return _product(x, kernel, axes, precision, where), (x, kernel)


def _product_bwd(axes, precision, where: OpSharding, residuals, dy):
    x, kernel = residuals
    dx = jnp.einsum("btm,nm->btn", dy, kernel.astype(dy.dtype), precision=precision)
    rows, sequence = where.token_axes(x.shape)
    spread = rows + sequence
    placement = tuple(where.dividing(where.axes_of(a), n) for a, n in zip(axes, kernel.shape, strict=True))
    cut = tuple(tuple(a for a in own if a not in spread) for own in placement)
    gradient = MatrixGradient.of(spread, placement, cut)

    def local(x, dy):
        own = jnp.einsum(
            "btn,btm->nm", x, dy, precision=precision, preferred_element_type=accumulator(x.dtype)
        )
        return gradient.reduce(own).astype(kernel.dtype)

    per_token = rows or None, sequence or None
    d_kernel = jax.shard_map(
        local,
        mesh=where.mesh,
        in_specs=tuple(P(*per_token, own or None) for own in cut),
        out_specs=gradient.spec,
    )(x, dy)
    return dx, d_kernel


_product.defvjp(_product_fwd, _product_bwd)
