"""Per-channel log decays inside a kernel, in units of log 2 (what the chip's exponential takes)."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.tpu.config import Config
from pallas_kernels.tpu.dots import bf16_dot, split

LOG2E = 1.4426950408889634
# A token that keeps less than exp(-100) keeps nothing in float32; sums over a chunk stay exact to 1e-3.
MIN_LOG_DECAY = -100.0


def log1p_small(x: jax.Array) -> jax.Array:
    """log(1 + x) for x in [0, 1], exact for tiny x too."""
    series = x * (1 - x * (1 / 2 - x * (1 / 3 - x / 4)))
    return jnp.where(x < 2.0**-6, series, jnp.log(1 + x))


def softplus(x: jax.Array) -> jax.Array:
    """log(1 + exp(x)), exact also where it is tiny."""
    return jnp.maximum(x, 0.0) + log1p_small(jnp.exp2(jnp.abs(x) * -LOG2E))


def log2_decay(g: jax.Array, rate: Any, dt_bias: Any, config: Config) -> jax.Array:
    """log2 of each token's decay.

    Args:
      g: [C, K] float32, log decay, or raw where there is an activation.
      rate: [1, K], exp(A_log), or None without activation.
      dt_bias: [1, K], or None.
      config: the call.
    """
    if config.activation is None:
        return jnp.maximum(g, MIN_LOG_DECAY) * LOG2E
    x = g + dt_bias
    if config.activation == "bounded":
        assert config.lower_bound is not None
        return (config.lower_bound * LOG2E) * jax.nn.sigmoid(rate * x)
    return jnp.maximum((rate * -LOG2E) * softplus(x), MIN_LOG_DECAY * LOG2E)


def log2_decay_gradients(
    g: jax.Array, dg: jax.Array, rate: Any, dt_bias: Any, config: Config
) -> tuple[jax.Array, jax.Array]:
    """Pulls the gradient of the log decay (in nats) back through `log2_decay`.

    Args:
      g, rate, dt_bias, config: as there.
      dg: [C, K], gradient of the log decay.

    Returns:
      the gradient of g, and that of log(rate) before it is summed over tokens and channels, both [C, K].
    """
    if config.activation is None:
        return jnp.where(g > MIN_LOG_DECAY, dg, 0.0), dg
    x = g + dt_bias
    if config.activation == "bounded":
        assert config.lower_bound is not None
        s = jax.nn.sigmoid(rate * x)
        dx = dg * (config.lower_bound * s * (1 - s) * rate)
        return dx, dx * x
    decay = -rate * softplus(x)
    dg = jnp.where(decay > MIN_LOG_DECAY, dg, 0.0)
    return dg * (-rate * jax.nn.sigmoid(x)), dg * decay


def cumulative(g: jax.Array, tril_twice: jax.Array) -> jax.Array:
    """Sum of g from the chunk's first token through each: [C, K], good to 2^-17 of each token's g.

    Args:
      g: [C, K] float32.
      tril_twice: [C, 2C] bfloat16, two triangles of ones side by side.
    """
    return bf16_dot(tril_twice, jnp.concatenate(split(g), axis=0))
