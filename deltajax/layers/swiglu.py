"""The SwiGLU feed-forward layer."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from deltajax.layers.parameters import INITIALIZER_RANGE, linear


class SwiGLU(nnx.Module):
    """`y = down(silu(gate(x)) * up(x))` (arXiv 2002.05202), without biases.

    Args:
      hidden_size: width D of input and output.
      intermediate_size: width of the gated middle.
      initializer_range: standard deviation of the kernels.
      dtype: compute dtype.
      param_dtype: parameter dtype.
      rngs: parameter randomness.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        initializer_range: float = INITIALIZER_RANGE,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def project(n_in, n_out, axes):
            return linear(
                n_in, n_out, axes, std=initializer_range, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.gate_proj = project(hidden_size, intermediate_size, ("embed", "mlp"))
        self.up_proj = project(hidden_size, intermediate_size, ("embed", "mlp"))
        self.down_proj = project(intermediate_size, hidden_size, ("mlp", "embed"))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Applies the layer over the last axis; any leading axes; returns `dtype`."""
        # Keep the two projections for the backward pass and make their product again.
        down = jax.checkpoint(lambda gate, up: self.down_proj(jax.nn.silu(gate) * up))
        return down(self.gate_proj(x), self.up_proj(x))
