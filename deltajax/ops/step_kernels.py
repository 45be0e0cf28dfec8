"""The step kernels as implementations of `delta_rule_step`: what they take, by lowering platform.

They are imported when they are traced, since Pallas is slow to import.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deltajax.ops import gates, pallas_gpu
from pallas_kernels.tpu.config import TOKEN_BYTES, TOKEN_HEADS, block_heads


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
    return _unsupported_dtype(inputs, "float32", "bfloat16", "float16") or pallas_gpu.other_gpu()


def _unsupported_tpu(inputs: StepInputs) -> str | None:
    HV, K, V = inputs.state.shape[1:]
    if K % 64 or V % 64 or K > 256 or V > 512:
        return f"K must be a multiple of 64 up to 256, V up to 512, got K = {K}, V = {V}"
    H = inputs.q.shape[1]
    heads = block_heads(H, HV)
    if heads > TOKEN_HEADS or heads * K * V * inputs.state.dtype.itemsize > TOKEN_BYTES:
        return f"{HV} value heads of {K} x {V} on {H} key heads make blocks of {heads}, too large"
    return _unsupported_dtype(inputs, "float32", "bfloat16")


def _unsupported_dtype(inputs: StepInputs, *dtypes: str) -> str | None:
    for name, x in inputs._asdict().items():
        if x is not None and x.dtype.name not in dtypes:
            return f"{name} must be {', '.join(dtypes[:-1])} or {dtypes[-1]}, got {x.dtype}"
    return None


def _run_gpu(inputs: StepInputs, options: StepOptions) -> tuple[Array, Array]:
    from pallas_kernels.gpu import step as gpu_step

    return gpu_step.step(*inputs, **vars(options))


def run_tpu(inputs: StepInputs, options: StepOptions, interpret: Any = False) -> tuple[Array, Array]:
    """The TPU kernel; ``interpret``: False, or the `InterpretParams` to run with elsewhere."""
    from pallas_kernels.tpu import step as tpu_step

    state, q, k, v, beta, g, A_log, dt_bias = inputs
    rate = None
    if g is not None and g.ndim == 2:  # a number a head: activated outside
        g = gates.per_head_log_decay(g, A_log, dt_bias, options.lower_bound)[:, :, None]
        dt_bias = None
    elif g is not None and A_log is not None:
        rate = jnp.broadcast_to(jnp.exp(A_log.astype(jnp.float32))[:, None], g.shape[1:])
        dt_bias = jnp.zeros_like(rate) if dt_bias is None else dt_bias.astype(jnp.float32)
    return tpu_step.step(state, q, k, v, beta, g, rate, dt_bias, **vars(options), interpret=interpret)


# Lowering platform -> its kernel.
STEP_KERNELS: Mapping[str, StepKernel] = {
    "cuda": StepKernel(_run_gpu, _unsupported_gpu),
    "tpu": StepKernel(run_tpu, _unsupported_tpu),
}


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
