"""The step kernels as implementations of `delta_rule_step`: what they take, by lowering platform."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deltajax.ops import pallas_gpu
from pallas_kernels.gpu import step as gpu_step


class StepInputs(NamedTuple):
    """The arrays of one step, as the caller passed them. Absent ones are None."""

    state: Float[Array, "B HV K V"]
    q: Float[Array, "B H K"]
    k: Float[Array, "B H K"]
    v: Float[Array, "B HV V"]
    beta: Float[Array, "B HV"]
    g: Float[Array, "B HV"] | Float[Array, "B HV K"] | None  # log decay, or raw when A_log is given
    A_log: Float[Array, " HV"] | None
    dt_bias: Float[Array, " HV"] | Float[Array, "HV K"] | None


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """The static side of one step; hashable."""

    lower_bound: float | None
    scale: float
    normalize: bool


@dataclasses.dataclass(frozen=True)
class StepKernel:
    """A platform's step kernel.

    Attributes:
      run: inputs -> (o, state), the state in place where it is donated.
      unsupported: why a call cannot run here, or None if it can.
    """

    run: Callable[[StepInputs, StepOptions], tuple[Array, Array]]
    unsupported: Callable[[StepInputs], str | None]


def _unsupported_gpu(inputs: StepInputs) -> str | None:
    K, V = inputs.state.shape[2:]
    if K % 64 or K > 256 or V % 32:
        return f"K must be a multiple of 64 up to 256, V of 32, got K = {K}, V = {V}"
    if any(jax.typeof(x).manual_axis_type.varying for x in inputs if x is not None):
        return "inside jax.shard_map it needs check_vma=False (JAX has no references that vary)"
    return _unsupported_dtype(inputs) or pallas_gpu.other_gpu()


def _unsupported_dtype(inputs: StepInputs) -> str | None:
    half_or_single = (jnp.float32, jnp.bfloat16, jnp.float16)
    for name, x in inputs._asdict().items():
        if x is not None and x.dtype not in half_or_single:
            return f"{name} must be float32, bfloat16 or float16, got {x.dtype}"
    return None


def _run_gpu(inputs: StepInputs, options: StepOptions) -> tuple[Array, Array]:
    return gpu_step.step(*inputs, **vars(options))


# Lowering platform -> its kernel.
STEP_KERNELS: Mapping[str, StepKernel] = {"cuda": StepKernel(_run_gpu, _unsupported_gpu)}


def applied(kernels: Mapping[str, StepKernel], inputs: StepInputs) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The platforms whose kernels take a call, and why the others do not."""
    reasons = {platform: kernel.unsupported(inputs) for platform, kernel in kernels.items()}
    return tuple(sorted(p for p, why in reasons.items() if why is None)), reasons


def vmapped_as_one(
    run: Callable[[StepInputs], tuple[Array, Array]],
) -> Callable[[StepInputs], tuple[Array, Array]]:
    """``run`` that under `jax.vmap` is called once: a mapped axis joins the rows.

    It joins the heads where gate parameters are mapped too; then the state is copied.
    """
    one = jax.custom_batching.custom_vmap(run)

    @one.def_vmap
    def _many(n, batched, inputs):
        (batched,) = batched
        gate = ("A_log", "dt_bias")
        by_head = bool(batched.A_log or batched.dt_bias)

        def fold(name, x, is_batched):
            if x is None or (name in gate and not by_head):
                return x
            x = x if is_batched else jnp.broadcast_to(x, (n, *x.shape))
            if by_head and name not in gate:
                x = jnp.moveaxis(x, 0, 1)
                return x.reshape(x.shape[0], -1, *x.shape[3:])
            return x.reshape(-1, *x.shape[2:])

        def unfold(x):
            if by_head:
                return jnp.moveaxis(x.reshape(x.shape[0], n, -1, *x.shape[2:]), 1, 0)
            return x.reshape(n, -1, *x.shape[1:])

        folded = StepInputs(*map(fold, StepInputs._fields, inputs, batched))
        return jax.tree.map(unfold, one(folded)), (True, True)

    return one
