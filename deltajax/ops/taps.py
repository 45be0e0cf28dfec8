"""The taps of the short convolution, with a derivative of their own that keeps nothing but the inputs."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from deltajax.ops import taps_gpu
from deltajax.ops.problem import vary_alike
from deltajax.ops.refusal import on_platforms, refuse, supporting


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A platform's kernels; arguments as of `_forward_by_xla` and `_backward_by_xla`."""

    forward: Callable[..., Array]
    backward: Callable[..., tuple[Array, Array, Array | None]]
    unsupported: Callable[[Array, Array], str | None]


# Lowering platform -> its kernels.
KERNELS: Mapping[str, Kernel] = {"cuda": Kernel(taps_gpu.forward, taps_gpu.backward, taps_gpu.unsupported)}


def apply_taps(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D W"],
    bias: Float[Array, " D"] | None,
    runs: Int[Array, "B T"] | None,
    activation: str | None,
    implementation: str | None = None,
) -> Float[Array, "B T D"]:
    """``y_t = activation(bias + sum_j weight[:, W - 1 - j] * x_{t-j})``, with zeros before x.

    Args:
      x: [B, T, D]; may be anything where ``runs`` is 0.
      weight: [D, W].
      bias: [D] or None.
      runs: [B, T], a number for each token: a tap reaches tokens of its own token's number only, and y is 0
        where it is 0. None: all the same.
      activation: "silu" or None.
      implementation: "pallas", "xla" or None, the kernel where there is one for the call.

    Returns:
      y: [B, T, D] in x's dtype; the sum is in float32 (float64 if x or weight is).

    Raises:
      NotImplementedError: "pallas", and there is no kernel for the call.
    """
    counts = None if runs is None else _counting(runs, weight.shape[1])
    platforms: tuple[str, ...] = ()
    if implementation != "xla":
        reasons = {platform: kernel.unsupported(x, weight) for platform, kernel in KERNELS.items()}
        platforms = supporting(reasons, asked=implementation == "pallas", what="call")
    choice = (activation, platforms, implementation != "pallas")
    return _taps(choice, *vary_alike(x, weight, bias, counts))


def _counting(runs: Int[Array, "B T"], W: int) -> Int[Array, "B T"]:
    """Bit j says whether a token's tap j counts; bit 0, whether the token does."""
    counts = jnp.zeros(runs.shape, jnp.int32)
    for j in range(W):
        counts += jnp.where((runs != 0) & (_later(runs, j) == runs), 1 << j, 0)
    return counts


def _later(x: Array, j: int) -> Array:
    """``x[:, t - j]`` at t, zeros before x; -j takes it back."""
    if j == 0:
        return x
    edges = [(0, 0, 0), (j, -j, 0), (0, 0, 0)][: x.ndim]
    return lax.pad(x, jnp.zeros((), x.dtype), edges)


def _of_tap(counts: Int[Array, "B T"] | None, j: int, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """x where tap j counts, else 0, even for NaN."""
    return x if counts is None else jnp.where(((counts >> j) & 1 != 0)[..., None], x, 0)


def _weighted(x: Array, weight: Array, bias: Array | None, counts: Array | None) -> Array:
    """What the activation is taken of, [B, T, D] in at least float32."""
    dtype = jnp.result_type(jnp.float32, x.dtype, weight.dtype)
    W = weight.shape[1]
    total: Any = 0 if bias is None else bias.astype(dtype)
    for j in range(W):
        total += _of_tap(counts, j, _later(x, j)).astype(dtype) * weight[:, W - 1 - j].astype(dtype)
    return total


def _forward_by_xla(
    activation: str | None, x: Array, weight: Array, bias: Array | None, counts: Array | None
) -> Array:
    z = _weighted(x, weight, bias, counts)
    return _of_tap(counts, 0, jax.nn.silu(z) if activation == "silu" else z).astype(x.dtype)


def _backward_by_xla(
    activation: str | None, x: Array, weight: Array, bias: Array | None, counts: Array | None, dy: Array
) -> tuple[Array, Array, Array | None]:
    """Gradients of x, weight and bias."""
    W = weight.shape[1]
    dtype = jnp.result_type(jnp.float32, x.dtype, weight.dtype)
    dz = _of_tap(counts, 0, dy).astype(dtype)
    if activation == "silu":
        z = _weighted(x, weight, bias, counts)
        s = jax.nn.sigmoid(z)
        dz *= s * (1 + z * (1 - s))
    dx = jnp.zeros(x.shape, dtype)
    dweight: list[Array] = []
    for j in range(W):
        # Shifted before it is masked: XLA makes a float32 copy of what is masked first.
        own = None if counts is None else _later(counts, -j)
        dx += _of_tap(own, j, _later(dz, -j)) * weight[:, W - 1 - j].astype(dtype)
        dweight.insert(0, jnp.sum(dz * _of_tap(counts, j, _later(x, j)).astype(dtype), axis=(0, 1)))
    return (
        dx.astype(x.dtype),
        jnp.stack(dweight, axis=1).astype(weight.dtype),
        None if bias is None else dz.sum(axis=(0, 1)).astype(bias.dtype),
    )


@partial(jax.jit, static_argnums=(0, 1))
def _choose(half: str, choice: tuple, x: Array, *args) -> Any:
    """A half of the derivative by the platform's kernel, or by XLA where there is none."""
    activation, platforms, fall_back = choice

    def branch(function):
        def run(x, *args):
            out = function(activation, x, *args)
            leaves, tree = jax.tree.flatten(out)  # inside a shard_map all branches' results vary as x does
            return jax.tree.unflatten(tree, vary_alike(*leaves, x)[: len(leaves)])

        return run

    by_xla = _forward_by_xla if half == "forward" else _backward_by_xla
    if not platforms:
        return branch(by_xla)(x, *args)
    default = branch(by_xla)
    if not fall_back:
        default = lambda x, *args: branch(by_xla)(refuse(x, platforms, "call"), *args)  # noqa: E731
    kernels = {p: branch(getattr(KERNELS[p], half)) for p in platforms}
    return on_platforms(x, *args, default=default, kernels=kernels)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _taps(choice: tuple, x: Array, weight: Array, bias: Array | None, counts: Array | None) -> Array:
    """The taps; ``choice`` is the activation, the platforms with kernels, and whether XLA does the others."""
    return _choose("forward", choice, x, weight, bias, counts)


def _forward(choice, *args):
    return _taps(choice, *args), args


def _backward(choice, saved, dy):
    return *_choose("backward", choice, *saved, dy), None


_taps.defvjp(_forward, _backward)
