"""Root-mean-square normalisation, plain and gated."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from deltajax.layers.parameters import parameter

GateActivation = Literal["silu", "sigmoid"]


class RMSNorm(nnx.Module):
    """`y = x / sqrt(mean(x^2) + eps) * scale` over the last axis (arXiv 1910.07467), in float32.

    Args:
      size: length D of the last axis.
      eps: added to the mean square.
      zero_centered: multiply by `1 + scale`, which starts at zero, as Qwen3-Next does.
      axis: logical axis name of the scale.
      dtype: dtype of the output.
      param_dtype: dtype of the scale, which starts at one unless `zero_centered`.
      rngs: parameter randomness (the scale needs none; the argument is uniform across layers).
    """

    def __init__(
        self,
        size: int,
        *,
        eps: float = 1e-5,
        zero_centered: bool = False,
        axis: str = "embed",
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.eps = eps
        self.zero_centered = zero_centered
        self.dtype = dtype
        start = nnx.initializers.zeros_init() if zero_centered else nnx.initializers.ones_init()
        self.scale = parameter(start, (size,), (axis,), param_dtype, rngs)

    def normalize(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """The scaled normalised input, still in float32."""
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        return x * (1 + scale if self.zero_centered else scale)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises `x` over its last axis; any leading axes; returns `dtype`."""
        # Keep x for the backward pass, not the float32 intermediates.
        return jax.checkpoint(lambda x: self.normalize(x).astype(self.dtype))(x)


class GatedRMSNorm(RMSNorm):
    """`y = RMSNorm(x) * activation(gate)`, the output gate of Gated DeltaNet and KDA, in float32.

    Args:
      size: length D of the last axis.
      activation: "silu" (Gated DeltaNet, DeltaNet) or "sigmoid" (KDA).
      eps, axis, dtype, param_dtype, rngs: as `RMSNorm`.

    Raises:
      ValueError: on another activation.
    """

    def __init__(
        self,
        size: int,
        *,
        activation: GateActivation = "silu",
        eps: float = 1e-5,
        axis: str = "embed",
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if activation not in ("silu", "sigmoid"):
            raise ValueError(f"activation={activation!r}: expected 'silu' or 'sigmoid'")
        super().__init__(size, eps=eps, axis=axis, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.activation = activation

    def __call__(  # type: ignore[override]
        self, x: Float[Array, "*B D"], gate: Float[Array, "*B D"]
    ) -> Float[Array, "*B D"]:
        """Normalises `x` over its last axis and multiplies by the activated `gate`; returns `dtype`."""

        @jax.checkpoint
        def gated(x, gate):
            gate = gate.astype(jnp.float32)
            gate = jax.nn.silu(gate) if self.activation == "silu" else jax.nn.sigmoid(gate)
            return (self.normalize(x) * gate).astype(self.dtype)

        return gated(x, gate)
