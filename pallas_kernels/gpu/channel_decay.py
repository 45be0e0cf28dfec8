"""Log decays of a per-channel gate: from what memory holds to base 2, in registers."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import rowwise
from pallas_kernels.gpu.limits import MIN_LOG_DECAY, PRESENT, RESET
from pallas_kernels.gpu.tiles import CHUNK, COLUMN, HALF, ROW, columns, load

LOG2E = 1.4426950408889634


def log2_decay(x: jax.Array, rate: jax.Array, bias: jax.Array, lower_bound: float | None) -> jax.Array:
    """Log decay to base 2 [64, N] of the raw projection x [64, N]; rate and bias are [N]."""
    if lower_bound is None:
        return columns(rate * -LOG2E, x.shape) * softplus(x + columns(bias, x.shape))
    slope = rate * -LOG2E
    root = lax.rsqrt(1 + jnp.exp2(x * columns(slope, x.shape) + columns(slope * bias, x.shape)))
    return (lower_bound * LOG2E) * (root * root)  # of 1 / (1 + exp(-rate (x + bias)))


def softplus(x: jax.Array) -> jax.Array:
    """log(1 + exp(x))."""
    small = jnp.exp2(jnp.minimum(x, -x) * LOG2E)  # softplus(x) = max(x, 0) + log(1 + small)
    series = small * (1 - small * (0.5 - small * (1 / 3)))
    return jnp.maximum(x, 0.0) + jnp.where(small < 0.01, series, jnp.log(1 + small))


def sigmoid(x: jax.Array) -> jax.Array:
    """1 / (1 + exp(-x))."""
    root = lax.rsqrt(1 + jnp.exp2(x * -LOG2E))  # cheaper than a division
    return root * root


def pull_gate(
    dg: jax.Array, x_ref, gate_ref, channels, *, lower_bound: float | None
) -> tuple[jax.Array, jax.Array]:
    """Gradients of a gate's raw projection x and, by token and channel, of A_log.

    Args:
      dg: [64, 64] float32, the log decay's gradient.
      x_ref: [64, 64].
      gate_ref: [2, K], rate = exp(A_log) and bias.
      channels: which of K.
      lower_bound: of the gate.
    """
    rate, bias = (columns(plgpu.load(gate_ref.at[i, channels], layout=COLUMN), dg.shape) for i in range(2))
    x = load(x_ref) + bias
    if lower_bound is None:  # g = -rate softplus(x)
        dg = dg * -rate
        return dg * sigmoid(x), dg * softplus(x)
    s = sigmoid(rate * x)  # g = lower_bound s
    dx = dg * lower_bound * rate * (s - s * s)
    return dx, dx * x


def token_decays(
    g_ref, gate_ref, channels, kind: jax.Array | None, *, lower_bound: float | None
) -> jax.Array:
    """Log decays of a chunk's tokens to base 2, [64, 64] float32 of some channels.

    Args:
      g_ref: [64, 64], log decays or what the gate makes them of.
      gate_ref: [2, K], rate and bias, or None.
      channels: which of K.
      kind: ABSENT, PRESENT or RESET of each token, [64, 64] constant along rows; None: all are present.
      lower_bound: of the gate.
    """
    g = load(g_ref)
    if gate_ref is None:
        g = g * LOG2E
    else:
        rate, bias = (plgpu.load(gate_ref.at[i, channels], layout=COLUMN) for i in range(2))
        g = log2_decay(g, rate, bias, lower_bound)
    if gate_ref is None or lower_bound is None or lower_bound < MIN_LOG_DECAY:
        g = jnp.maximum(g, MIN_LOG_DECAY * LOG2E)
    if kind is None:
        return g
    return jnp.where(kind == PRESENT, g, jnp.where(kind == RESET, MIN_LOG_DECAY * LOG2E, 0.0))


def across_border(sums_ref, line: jax.Array, level: jax.Array) -> jax.Array:
    """``exp(-|G_r - G_border|)`` for every token r, [64, 64] float32.

    Args:
      sums_ref: G to base 2, [64, >= 64].
      line: 0..63.
      level: s of blocks of 2^s tokens; the border is the last token of the even one of two blocks.
    """
    size = lax.shift_left(1, level)
    border = (line & ~(2 * size - 1)) + (size - 1)
    odd = lax.shift_right_logical(line, level) & 1
    later = border + odd * (line - border)  # of the two; and the earlier one
    return jnp.exp2(
        rowwise.gather(sums_ref, later, HALF) - rowwise.gather(sums_ref, line + border - later, HALF)
    )


def tokens_in_line() -> jax.Array:
    """0..63, one for each row."""
    return plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=ROW)
