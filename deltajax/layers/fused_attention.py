"""Attention of a call's own tokens: cuDNN's fused kernel in programs for NVIDIA GPUs, else plain JAX."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from deltajax.layers import cudnn_attention
from deltajax.layers.attention_blocks import KeysValues
from deltajax.layers.layout import Layout
from deltajax.ops.dispatch import SAVED
from deltajax.ops.problem import vary_alike

# Fewer tokens are left to plain JAX; more are filled up to a multiple of the unit.
MIN_TOKENS, UNIT = 128, 64


@dataclasses.dataclass(frozen=True)
class _Fused:
    keys_values: KeysValues
    call: cudnn_attention.Call


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError for what `attend_own` does not know."""
    if implementation not in ("xla", "cudnn", None):
        raise ValueError(f"implementation={implementation!r}: expected 'xla', 'cudnn' or None")


def attend_own(
    q: Float[Array, "B T H K"],
    arrays: tuple[Array, ...],
    layout: Layout | None,
    *,
    keys_values: KeysValues,
    params: tuple[Array, ...] = (),
    window: int | None = None,
    scale: float,
    implementation: str | None,
    plain: Callable[..., Array],
) -> Float[Array, "B T H V"]:
    """Causal attention of tokens to those before, within one segment.

    Lowered for CUDA, cuDNN's kernels run, forward and backward, where they take the call and it pays, and
    cuDNN and the GPU are recent enough (heads of more than 128 channels want Hopper; keys of 192 with values
    of 128, Hopper or later); everywhere else `plain`. What cuDNN keeps for its backward half has the name
    that remat policies save.

    Args:
      q: [B, T, H, K].
      arrays: what keys and values are made of, each [B, T, ...].
      layout: where the tokens of packed rows stand; None: each row is one segment.
      keys_values: makes keys [B, T, KV, K] and values [B, T, KV, V] of `arrays` and `params`.
      params: what else `keys_values` computes from.
      window: tokens seen, the current one included; None for all.
      scale: multiplies the logits.
      implementation: "xla": `plain` everywhere; "cudnn": an error where cuDNN does not run; None: see above.
      plain: the same in plain JAX, of (q, arrays, params).

    Raises:
      NotImplementedError: "cudnn", and it takes no such call; or, at lowering, not there.
    """
    q, *rest = vary_alike(q, *arrays, *params, *(layout or ()))
    arrays, rest = tuple(rest[: len(arrays)]), rest[len(arrays) :]
    params, layout = tuple(rest[: len(params)]), Layout(*rest[len(params) :]) if layout else None
    window = None if window is None or window >= q.shape[1] else window
    asked = implementation == "cudnn"
    fused = _Fused(keys_values, cudnn_attention.Call(window, scale, asked))
    key, value = jax.eval_shape(keys_values, *arrays, *params)
    reason = cudnn_attention.unsupported(q, key, value)
    if asked:
        if reason is not None:
            raise NotImplementedError(f"implementation='cudnn': {reason}")
        return _attend(fused, q, arrays, params, layout)
    if implementation == "xla" or reason is not None or not _pays(q, layout, window):
        return plain(q, arrays, params)
    alike = lambda form: lambda *x: vary_alike(form(*x), q)[0]  # noqa: E731
    return lax.platform_dependent(
        q,
        arrays,
        params,
        layout,
        cuda=alike(partial(_attend, fused)),
        default=alike(lambda q, arrays, params, layout: plain(q, arrays, params)),
    )


def _pays(q: Float[Array, "B T H K"], layout: Layout | None, window: int | None) -> bool:
    """Whether a call that does not ask for cuDNN is one for it.

    It has tokens enough; with a window, packed rows are read with a bias that must not be too large.
    """
    B, T = q.shape[:2]
    span = _span(T, window)
    bias = 2 * B * T * (2 * span if span else T)  # bytes
    return T >= MIN_TOKENS and (layout is None or window is None or bias <= cudnn_attention.MAX_BIAS)


def _span(T: int, window: int | None) -> int | None:
    """Tokens of a block where packed rows are cut in blocks that see the one before and themselves.

    That is worth it where it makes half as many pairs as cuDNN's causal mask leaves.
    """
    span = None if window is None else -(-window // UNIT) * UNIT
    return span if span and 8 * span <= T else None


def _attend(fused: _Fused, q, arrays, params, layout: Layout | None) -> Array:
    B, T = q.shape[:2]
    span = None if layout is None else _span(T, fused.call.window)
    unit = span or UNIT

    def filled(x: Array) -> Array:  # with padding; without a layout causality hides it
        return jnp.pad(x, [(0, 0), (0, -T % unit)] + [(0, 0)] * (x.ndim - 2)) if T % unit else x

    q, arrays, layout = jax.tree.map(filled, (q, arrays, layout))
    layouts: tuple[Layout, ...] = () if layout is None else (layout,)
    if span:
        blocks = lambda x: x.reshape(-1, span, *x.shape[2:])  # noqa: E731

        def with_previous(x: Array) -> Array:
            before = jnp.pad(x, [(0, 0), (span, 0)] + [(0, 0)] * (x.ndim - 2))[:, : x.shape[1]]
            return jnp.concatenate([blocks(before), blocks(x)], axis=1)

        layouts = tuple(jax.tree.map(cut, layout) for cut in (blocks, with_previous))
        q, arrays = blocks(q), jax.tree.map(with_previous, arrays)
    o = _fused(fused, q, arrays, params, layouts)
    if layouts:
        o = jnp.where((layouts[0].run != 0)[..., None, None], o, 0)
    return o.reshape(B, -1, *o.shape[2:])[:, :T]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(fused: _Fused, q, arrays, params, layouts: tuple[Layout, ...]) -> Array:
    return cudnn_attention.forward(fused.call, q, *fused.keys_values(*arrays, *params), layouts)[0]


def _fused_fwd(fused: _Fused, q, arrays, params, layouts) -> tuple[Array, Any]:
    found = cudnn_attention.forward(fused.call, q, *fused.keys_values(*arrays, *params), layouts)
    o, lse = (checkpoint_name(x, SAVED) for x in found)
    return o, (q, arrays, params, layouts, o, lse)


def _fused_bwd(fused: _Fused, saved, d_o) -> Any:
    q, arrays, params, layouts, o, lse = saved
    make = lambda arrays, params: fused.keys_values(*arrays, *params)  # noqa: E731
    (key, value), pull = jax.vjp(make, arrays, params)
    dq, dk, dv = cudnn_attention.backward(fused.call, q, key, value, layouts, o, lse, d_o)
    return dq, *pull((dk, dv)), None


_fused.defvjp(_fused_fwd, _fused_bwd)
