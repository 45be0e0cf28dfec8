"""Building blocks whose parameters carry logical axis names, and the published initial values.

The names live in flax's own `out_sharding` metadata, so `nnx.get_partition_spec` and
`flax.core.spmd.logical_axis_rules` read them. Nothing is placed on devices at construction: a mesh is the
caller's business (`eager_sharding` is off).

| axis | meaning |
|---|---|
| embed | width of the residual stream |
| heads, kv_heads | heads times head size of a projection, or the heads alone of a per-head parameter |
| head_dim | one head's channels, and KDA's low-rank bottleneck (of that size) |
| latent | the low ranks of multi-head latent attention |
| mlp | width of the MLP, of each expert's too |
| experts | experts of a mixture |
| router | one number per expert, or for the shared ones, on every device |
| vocab | vocabulary |
| conv | taps of a short convolution |
| layers | layers stacked for a scan |
"""

import math

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from deltajax.layers.projection import Projection

Axes = tuple[str, ...]
INITIALIZER_RANGE = 0.02


def named(init: nnx.Initializer, axes: Axes) -> nnx.Initializer:
    """An initializer whose variable carries the logical axis names `axes`.

    Through `nnx.bridge.to_linen` the parameter becomes Linen's own `LogicallyPartitioned`.
    """
    return nnx.with_metadata(
        init,
        out_sharding=axes,
        eager_sharding=False,
        sharding_rules=(),  # LogicallyPartitioned wants the key
        linen_meta_type=linen.LogicallyPartitioned,
    )


def check_sizes(**sizes: int) -> None:
    """Raises ValueError naming an argument that is no positive number."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: expected a positive integer")


def parameter(init: nnx.Initializer, shape: tuple[int, ...], axes: Axes, dtype: DTypeLike, rngs: nnx.Rngs):
    """A named `nnx.Param` of that shape, initialised from `rngs.params()`."""
    return nnx.Param(named(init, axes)(rngs.params(), shape, dtype))


def linear(
    in_features: int,
    out_features: int,
    axes: Axes,
    *,
    std: float = INITIALIZER_RANGE,
    use_bias: bool = False,
    precision: jax.lax.Precision | None = None,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> Projection:
    """A projection with kernel [in, out] named `axes`, drawn from normal(0, std); the bias is zero."""
    return Projection(
        in_features,
        out_features,
        use_bias=use_bias,
        precision=precision,
        dtype=dtype,
        param_dtype=param_dtype,
        axes=axes,
        kernel_init=named(nnx.initializers.normal(std), axes),
        bias_init=named(nnx.initializers.zeros_init(), axes[1:]),
        rngs=rngs,
    )


def log_uniform_rate(low: float, high: float) -> nnx.Initializer:
    """`A_log = log a` with a drawn from Uniform(low, high), kept off zero so that the log is finite."""

    def init(key: Array, shape, dtype=jnp.float32, out_sharding=None) -> Float[Array, "..."]:
        rate = jax.random.uniform(key, shape, jnp.float32, low, high)
        return jnp.log(jnp.maximum(rate, 1e-6)).astype(dtype)

    return init


def inverse_softplus_step(low: float = 1e-3, high: float = 0.1, floor: float = 1e-4) -> nnx.Initializer:
    """`dt_bias` with softplus(dt_bias) = max(exp(Uniform(log low, log high)), floor), as Mamba-2."""

    def init(key: Array, shape, dtype=jnp.float32, out_sharding=None) -> Float[Array, "..."]:
        log_step = jax.random.uniform(key, shape, jnp.float32, math.log(low), math.log(high))
        step = jnp.maximum(jnp.exp(log_step), floor)
        return (step + jnp.log(-jnp.expm1(-step))).astype(dtype)

    return init
