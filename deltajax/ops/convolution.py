"""Short depthwise causal convolution over time, with segment resets and a cache for decoding."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deltajax.ops import checks, segments
from deltajax.ops.halo import left_halo
from deltajax.ops.taps import apply_taps


def short_convolution(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D W"],
    *,
    bias: Float[Array, " D"] | None = None,
    activation: Literal["silu"] | None = "silu",
    segment_ids: Int[Array, "B T"] | None = None,
    cache: Float[Array, "B W1 D"] | None = None,
    axis_name: str | None = None,
    implementation: Literal["pallas", "xla"] | None = None,
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
      axis_name: inside `jax.shard_map`, the mesh axis over which T is sharded: x and segment_ids are then
        this device's tokens, rows start from zeros (``cache`` is None), and the returned cache is that of the
        whole rows, the same on all devices.
      implementation: "pallas" is a kernel for Hopper GPUs (bfloat16 or float16 x, of at least 64 tokens and a
        multiple of 64 channels), "xla" works everywhere; None: the kernel where it supports the call and the
        program is lowered for such a GPU. XLA cannot split the kernel over devices: `jax.shard_map` does.

    Returns:
      y: [B, T, D] in x's dtype; the sum is in float32 (float64 if x or weight is).
      cache: [B, W - 1, D] in x's dtype: the last W - 1 inputs of the row's last segment, zeros where that
        segment is shorter; padding does not enter it.

    Raises:
      ValueError, TypeError: an argument's shape or dtype does not fit; the message names it.
      NotImplementedError: "pallas", and there is no kernel for this call or the platform.
    """
    _check(x, weight, bias, activation, segment_ids, cache, axis_name)
    if implementation not in ("pallas", "xla", None):
        raise ValueError(f"implementation must be 'pallas', 'xla' or None, got {implementation!r}")
    B, T, D = x.shape
    W = weight.shape[1]
    given = x
    if segment_ids is not None:
        x = jnp.where((segment_ids != 0)[..., None], x, 0)

    # padded: [B, W-1+T, D]; reach: [B, W-1+T], a tap reaches tokens of its own token's number
    W1 = W - 1
    runs = reach = None
    if axis_name is not None:
        padded = jnp.concatenate([left_halo(x, W1, axis_name), x], axis=1)
        if segment_ids is not None:
            before = left_halo(segment_ids, W1, axis_name)
            reach = segments.runs(jnp.concatenate([before, segment_ids], axis=1))
            runs = reach[:, W1:]
    else:
        runs = None if segment_ids is None else segments.runs(segment_ids)
        past = jnp.zeros((B, W1, D), x.dtype) if cache is None else cache.astype(x.dtype)
        if runs is None:
            padded = jnp.concatenate([past, x], axis=1)
        else:  # the past stands just before the first real token
            padded, reach = _join_rows(past, x, runs)

    if cache is None and axis_name is None:
        y = apply_taps(given, weight, bias, runs, activation, implementation)
    elif W1 < T and (cache is None or runs is None):
        # Only the first outputs see the past: no long copy of x with the past before it.
        y = apply_taps(given, weight, bias, runs, activation, implementation)
        near = None if reach is None else reach[:, : 2 * W1]
        first = apply_taps(padded[:, : 2 * W1], weight, bias, near, activation, "xla")[:, W1:]
        y = jax.lax.dynamic_update_slice_in_dim(y, first, 0, axis=1)
    else:  # the past stands where the row's first token is
        y = apply_taps(padded, weight, bias, reach, activation, implementation)[:, W1:]
    last = padded[:, T:] if reach is None else _last_inputs(padded, reach, W)
    return y, last if axis_name is None else _of_last_device(last, segment_ids, axis_name)


def _join_rows(past: Array, x: Array, runs: Array) -> tuple[Array, Array]:
    """Puts each row's past before its first real token, over the padding there, as part of run 1."""
    W1 = past.shape[1]
    lead = jnp.argmax(runs != 0, axis=1)  # 0 for a row of padding only
    padded = jnp.concatenate([jnp.zeros_like(past), x], axis=1)
    reach = jnp.concatenate([jnp.zeros_like(runs, shape=past.shape[:2]), runs], axis=1)
    # Selected place by place: writing at each row's own place would be a scatter, 0.7 ms a call on a H100.
    place = jnp.arange(padded.shape[1]) - lead[:, None]  # [B, W-1+T]
    for j in range(W1):
        here = place == j
        padded = jnp.where(here[..., None], past[:, j : j + 1], padded)
        reach = jnp.where(here, 1, reach)
    return padded, reach


def _last_inputs(padded: Array, reach: Array, W: int) -> Array:
    """The W - 1 entries up to the last real one, those of its own run."""
    position = jnp.where(reach != 0, jnp.arange(reach.shape[1]), -1)
    last = jnp.max(position, axis=1)  # >= W - 2: the past itself counts as real
    at = last[:, None] - jnp.arange(W - 2, -1, -1)  # [B, W-1]
    same = jnp.take_along_axis(reach, at, axis=1) == jnp.take_along_axis(reach, last[:, None], axis=1)
    return jnp.where(same[..., None], jnp.take_along_axis(padded, at[..., None], axis=1), 0)


def _of_last_device(x: Array, segment_ids: Array | None, axis_name: str) -> Array:
    """Each row's x from the last device that has a real token of it; zeros if none has."""
    device, last = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name) - 1
    owner: Any = last
    if segment_ids is not None:
        has = jnp.any(segment_ids != 0, axis=1)
        owner = jax.lax.pmax(jnp.where(has, device, -1), axis_name)[:, None, None]  # [B, 1, 1]
    return jax.lax.psum(jnp.where(owner == device, x, 0), axis_name)


def _check(
    x: Any, weight: Any, bias: Any, activation: Any, segment_ids: Any, cache: Any, axis_name: str | None
) -> None:
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
    if cache is not None and axis_name is not None:
        raise ValueError(f"cache must be None with axis_name={axis_name!r}: rows start from zeros there")
    if cache is not None:
        checks.check_float("cache", cache)
        checks.check_shape("cache", cache, "B W-1 D", (B, W - 1, D))
