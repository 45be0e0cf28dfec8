"""Choice of an implementation, made when a program is lowered and never from the default backend."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from deltajax.ops import chunked, context, pallas_gpu, pallas_tpu, scan
from deltajax.ops.problem import Inputs, Options, vary_alike
from deltajax.ops.refusal import in_32_bits, on_platforms, refuse, supporting


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A platform's implementation: the two halves of the op's custom derivative.

    Attributes:
      forward: inputs -> (o, final_state).
      backward: inputs, gradients of o and of final_state, then what ``saving`` kept -> gradients of the
        inputs (an `Inputs` with None for the absent and the integer ones).
      unsupported: why a call cannot run here, or None if it can.
      saving: inputs -> (o, final_state, arrays kept for ``backward``), the forward half when it will be
        differentiated; None: ``forward``, keeping nothing. Which platform's branch runs is known only at
        lowering, after the residuals' shapes are fixed, so the other platforms carry unused zeros.
      spreads: whether the halves take a call whose tokens are spread over a mesh axis; `context` makes such
        halves of the others.
    """

    forward: Callable[[Inputs, Options], tuple[Array, Array]]
    backward: Callable[..., Inputs]
    unsupported: Callable[[Inputs, Options], str | None]
    saving: Callable[[Inputs, Options], tuple[Array, Array, tuple[Array, ...]]] | None = None
    spreads: Callable[[Options], bool] = lambda options: False


# Name (of `jax.ad_checkpoint.checkpoint_name`) of what kernels save for their backward halves: a remat policy
# may save it, or leave it out and pay a second forward pass.
SAVED = "delta_rule_saved"
# Lowering platform ("tpu", "cuda") -> its Pallas kernels.
PALLAS: Mapping[str, Kernel] = {
    "cuda": Kernel(
        pallas_gpu.forward, pallas_gpu.backward, pallas_gpu.unsupported, pallas_gpu.saving, pallas_gpu.spreads
    ),
    "tpu": Kernel(pallas_tpu.forward, pallas_tpu.backward, pallas_tpu.unsupported, pallas_tpu.saving),
}


CHUNKED = Kernel(chunked.forward, chunked.backward, lambda inputs, options: None)


def run(inputs: Inputs, options: Options, implementation: str | None) -> tuple[Array, Array]:
    """Runs a checked call.

    Raises:
      ValueError: unknown implementation.
      NotImplementedError: "pallas", and no kernel supports the call.
    """
    o, final = _run(Inputs(*vary_alike(*inputs)), options, implementation)
    return o, final if options.axis_name is None else context.whole_final(final, inputs, options)


def _run(inputs: Inputs, options: Options, implementation: str | None) -> tuple[Array, Array]:
    if implementation == "scan":
        forward = _scan if options.axis_name is None else partial(context.forward, _scan)
        return forward(inputs, options)
    if implementation == "chunked":
        return _op(inputs, options, (), True)
    if implementation not in ("pallas", None):
        raise ValueError(
            f"implementation must be 'pallas', 'chunked', 'scan' or None, got {implementation!r}"
        )
    asked = implementation == "pallas"
    reasons = {platform: _unsupported(kernel, inputs, options) for platform, kernel in PALLAS.items()}
    return _op(inputs, options, supporting(reasons, asked=asked, what="call"), not asked)


def _unsupported(kernel: Kernel, inputs: Inputs, options: Options) -> str | None:
    if options.axis_name is None or kernel.spreads(options):
        return kernel.unsupported(inputs, options)
    reason = kernel.unsupported(context.extended_shapes(inputs, options), options)
    return reason and f"with axis_name, where the kernel's V is V + K: {reason}"


def _halves(platform: str | None, options: Options) -> Kernel:
    """The implementation on a platform (None: the chunked form), of this call's tokens."""
    kernel = PALLAS[platform] if platform else CHUNKED
    if options.axis_name is None or kernel.spreads(options):
        return kernel
    saves = kernel.saving

    def backward(inputs, options, do, dfinal, *saved):
        if saves is None:  # nothing is kept of the op's own, so not of this either
            saved = context.made_again(kernel.forward, inputs, options)
        return context.backward(kernel.backward, inputs, options, do, dfinal, *saved)

    return Kernel(
        partial(context.forward, kernel.forward),
        backward,
        kernel.unsupported,
        None if saves is None else partial(context.saving, saves),
    )


_scan = jax.jit(scan.forward, static_argnums=1)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _op(inputs: Inputs, options: Options, platforms: tuple[str, ...], fall_back: bool) -> Any:
    """The op as kernels on ``platforms`` and, if ``fall_back``, the chunked form on all others."""
    return _by_platform("forward", platforms, fall_back, options, inputs)


def _op_fwd(inputs, options, platforms, fall_back):
    o, final, saved = _by_platform("saving", platforms, fall_back, options, inputs)
    saved = jax.tree.map(lambda x: checkpoint_name(x, SAVED), saved)
    return (o, final), (inputs, saved)


def _op_bwd(options, platforms, fall_back, residuals, cotangents):
    inputs, saved = residuals
    return (_by_platform("backward", platforms, fall_back, options, inputs, *cotangents, saved),)


_op.defvjp(_op_fwd, _op_bwd)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))  # one program also for a caller outside jit
def _by_platform(half: str, platforms: tuple[str, ...], fall_back: bool, options: Options, inputs, *args):
    kept = {}  # platform -> shapes of what it saves
    if half == "saving":
        kept = {p: _saved_shapes(_halves(p, options), inputs, options) for p in platforms}

    def branch(platform: str | None):
        kernel = _halves(platform, options)

        def compute(inputs, *args):
            if half == "forward":
                return kernel.forward(inputs, options)
            if half == "backward":
                *cotangents, saved = args
                own = saved[platform] if platform else ()
                return kernel.backward(inputs, options, *cotangents, *own)
            own = ()
            if kernel.saving is not None:
                o, final, own = kernel.saving(inputs, options)
            else:
                o, final = kernel.forward(inputs, options)
            zeros = lambda x: jnp.zeros(x.shape, x.dtype)  # noqa: E731
            return o, final, {p: own if p == platform else jax.tree.map(zeros, kept[p]) for p in platforms}

        def run(inputs, *args):
            # Inside a shard_map all branches' results vary as the inputs do.
            leaves, tree = jax.tree.flatten(compute(inputs, *args))
            return jax.tree.unflatten(tree, vary_alike(*leaves, inputs.q)[: len(leaves)])

        return run

    if not platforms:
        return branch(None)(inputs, *args)
    default = branch(None)
    if not fall_back:
        default = lambda inputs, *args: branch(None)(  # noqa: E731
            inputs._replace(q=refuse(inputs.q, platforms, "call")), *args
        )
    return on_platforms(inputs, *args, default=default, kernels={p: branch(p) for p in platforms})


def _saved_shapes(kernel: Kernel, inputs: Inputs, options: Options) -> tuple[jax.ShapeDtypeStruct, ...]:
    saving = kernel.saving
    if saving is None:
        return ()
    return jax.eval_shape(in_32_bits(lambda inputs: saving(inputs, options)[2]), inputs)
