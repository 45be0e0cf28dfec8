"""Per-channel log decays inside a kernel, in units of log 2 (what the chip's exponential takes)."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.tpu.config import Config
from pallas_kernels.tpu.dots import bf16_dot, halves
from pallas_kernels.tpu.inverse import iota

LOG2E = 1.4426950408889634
LN2 = 1 / LOG2E
# A token that keeps less than exp(-100) keeps nothing in float32; sums over a chunk stay exact to 1e-3.
MIN_LOG_DECAY = -100.0


def log2_softplus(x: jax.Array) -> jax.Array:
    """log2(1 + exp(x)), to 1e-5 of it also where it is tiny."""
    x = x * LOG2E
    y = jnp.exp2(-jnp.abs(x))
    series = y * (LOG2E - y * (LOG2E / 2 - y * (LOG2E / 3)))
    return jnp.maximum(x, 0.0) + jnp.where(y < 2.0**-6, series, jnp.log2(1 + y))


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
    return jnp.maximum(-rate * log2_softplus(x), MIN_LOG_DECAY * LOG2E)


def log2_decay_gradients(
    g: jax.Array, dg: jax.Array, rate: Any, dt_bias: Any, config: Config, log2: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Pulls the gradient of the log decay (in nats) back through `log2_decay`.

    Args:
      g, rate, dt_bias, config: as there.
      dg: [C, K], gradient of the log decay.
      log2: [C, K], of an unbounded activation: what `log2_decay` returned.

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
    dg = jnp.where(log2 > MIN_LOG_DECAY * LOG2E, dg, 0.0)
    return dg * (-rate * jax.nn.sigmoid(x)), dg * (log2 * LN2)


def cumulative(g: jax.Array) -> jax.Array:
    """Sum of g from the chunk's first token through each: [C, K], good to 2^-16 of each token's g.

    Args:
      g: [C, K] float32.
    """
    C = g.shape[0]
    tril = jnp.where(iota((C, 2 * C), 0) >= iota((C, 2 * C), 1) % C, 1.0, 0.0).astype(jnp.bfloat16)
    return bf16_dot(tril, jnp.concatenate(halves(g), axis=0))


def around_middles(g: jax.Array, size: int) -> jax.Array:
    """Sums of g from the middle of each block of ``size`` tokens on, negative before it: [C, K].

    The middle halves the token in row ``size // 2``: what is summed before it is as much as after it.

    Args:
      g: [C, K] float32.
    """
    C = g.shape[0]
    token, past = iota((C, 2 * C), 0), iota((C, 2 * C), 1) % C
    middle = token // size * size + size // 2
    since = jnp.where(past <= token, 1.0, 0.0)  # of the sum from the chunk's first token on
    until = jnp.where(past < middle, 1.0, jnp.where(past == middle, 0.5, 0.0))
    return bf16_dot((since - until).astype(jnp.bfloat16), jnp.concatenate(halves(g), axis=0))
