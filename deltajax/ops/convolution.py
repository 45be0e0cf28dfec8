"""Short depthwise causal convolution over time, with segment resets and a cache for decoding."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deltajax.ops import checks, segments


def short_convolution(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D W"],
    *,
    bias: Float[Array, " D"] | None = None,
    activation: Literal["silu"] | None = "silu",
    segment_ids: Int[Array, "B T"] | None = None,
    cache: Float[Array, "B W1 D"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W1 D"]]:
    """``y_t = activation(bias + sum_j weight[:, W - 1 - j] * x_{t-j})``, j from 0 to W - 1.

    Args:
      x: [B, T, D] inputs.
      weight: [D, W]; the last column weighs the current token.
      bias: [D] or None.
      activation: "silu" or None.
      segment_ids: integer [B, T]. No tap reaches from one segment into another; padding (id 0) outputs 0.
        It stands between segments or at a row's ends: a tap does not skip over padding inside a segment
        (it reads 0 there), and the returned cache would end at the last token before it.
      cache: [B, W - 1, D], the inputs just before ``x`` (those of the row's first segment), oldest first.
        Zeros if None.

    Returns:
      y: [B, T, D] in x's dtype; the sum is in float32 (float64 if x or weight is).
      cache: [B, W - 1, D] in x's dtype: the last W - 1 inputs of the row's last segment, zeros where that
        segment is shorter; padding does not enter it.

    Raises:
      ValueError, TypeError: an argument's shape or dtype does not fit; the message names it.
    """
    _check(x, weight, bias, activation, segment_ids, cache)
    B, T, D = x.shape
    W = weight.shape[1]
    dtype = jnp.result_type(jnp.float32, x.dtype, weight.dtype)
    past = jnp.zeros((B, W - 1, D), x.dtype) if cache is None else cache.astype(x.dtype)

    if segment_ids is None:
        padded = jnp.concatenate([past, x], axis=1)  # [B, W-1+T, D]
        reach = None
    else:
        runs = segments.runs(segment_ids)
        x = jnp.where((runs != 0)[..., None], x, 0)
        padded, reach = _join_rows(past, x, runs)  # the past stands just before the first real token

    @jax.checkpoint  # keep the inputs for the backward pass, not W shifted copies of them in float32
    def taps(padded, weight, bias):
        total = jnp.zeros((B, T, D), dtype)
        for j in range(W):
            tap = padded[:, W - 1 - j : W - 1 - j + T].astype(dtype)
            if reach is not None:
                same = reach[:, W - 1 - j : W - 1 - j + T] == reach[:, W - 1 :]
                tap = jnp.where(same[..., None], tap, 0)
            total = total + tap * weight[:, W - 1 - j].astype(dtype)
        if bias is not None:
            total = total + bias.astype(dtype)
        y = jax.nn.silu(total) if activation == "silu" else total
        return y.astype(x.dtype)

    y = taps(padded, weight, bias)
    if reach is None:
        return y, padded[:, T:]
    return jnp.where((runs != 0)[..., None], y, 0), _last_inputs(padded, reach, W)


def _join_rows(past: Array, x: Array, runs: Array) -> tuple[Array, Array]:
    """Puts each row's past before its first real token, over the padding there, as part of run 1."""
    W1 = past.shape[1]
    lead = jnp.argmax(runs != 0, axis=1)  # 0 for a row of padding only

    def join(past, x, runs, lead):
        padded = jnp.concatenate([jnp.zeros_like(past), x])
        reach = jnp.concatenate([jnp.zeros(W1, runs.dtype), runs])
        padded = jax.lax.dynamic_update_slice_in_dim(padded, past, lead, 0)
        return padded, jax.lax.dynamic_update_slice_in_dim(reach, jnp.ones(W1, runs.dtype), lead, 0)

    return jax.vmap(join)(past, x, runs, lead)


def _last_inputs(padded: Array, reach: Array, W: int) -> Array:
    """The W - 1 entries up to the last real one, those of its own run."""
    position = jnp.where(reach != 0, jnp.arange(reach.shape[1]), -1)
    last = jnp.max(position, axis=1)  # >= W - 2: the past itself counts as real
    at = last[:, None] - jnp.arange(W - 2, -1, -1)  # [B, W-1]
    same = jnp.take_along_axis(reach, at, axis=1) == jnp.take_along_axis(reach, last[:, None], axis=1)
    return jnp.where(same[..., None], jnp.take_along_axis(padded, at[..., None], axis=1), 0)


def _check(x: Any, weight: Any, bias: Any, activation: Any, segment_ids: Any, cache: Any) -> None:
    checks.check_float("x", x)
    checks.check_float("weight", weight)
    checks.check_rank("x", x, "B T D")
    checks.check_rank("weight", weight, "D W")
    B, T, D = x.shape
    W = weight.shape[1]
    checks.check_shape("weight", weight, "D W", (D, W))
    if W < 2:
        raise ValueError(f"weight must have at least W = 2 taps, got W = {W}")
    if T < 1:
        raise ValueError(f"x must hold at least one token, got shape {x.shape}")
    if bias is not None:
        checks.check_float("bias", bias)
        checks.check_shape("bias", bias, "D", (D,))
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    if segment_ids is not None:
        checks.check_segment_ids(segment_ids, B, T)
    if cache is not None:
        checks.check_float("cache", cache)
        checks.check_shape("cache", cache, "B W-1 D", (B, W - 1, D))
