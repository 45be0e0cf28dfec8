"""Choice of an implementation, made when a program is lowered and never from the default backend."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array

from deltajax.ops import chunked, scan
from deltajax.ops.problem import Inputs, Options, vary_alike


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A platform's implementation: the two halves of the op's custom derivative.

    Attributes:
      forward: inputs -> (o, final_state).
      backward: inputs, gradients of o and of final_state -> gradients of the inputs (an `Inputs` with None
        for the absent and the integer ones). Nothing else is kept between the two: which platform's branch
        runs is known only at lowering, after the residuals' shapes are fixed.
      unsupported: why a call cannot run here, or None if it can.
    """

    forward: Callable[[Inputs, Options], tuple[Array, Array]]
    backward: Callable[[Inputs, Options, Array, Array], Inputs]
    unsupported: Callable[[Inputs, Options], str | None]


# Lowering platform ("tpu", "cuda") -> its Pallas kernels.
PALLAS: Mapping[str, Kernel] = {}


def run(inputs: Inputs, options: Options, implementation: str | None) -> tuple[Array, Array]:
    """Runs a checked call.

    Raises:
      ValueError: unknown implementation.
      NotImplementedError: "pallas", and no kernel supports the call.
    """
    inputs = Inputs(*vary_alike(*inputs))
    if implementation == "scan":
        return _scan(inputs, options)
    if implementation == "chunked":
        return _op(inputs, options, (), True)
    if implementation not in ("pallas", None):
        raise ValueError(
            f"implementation must be 'pallas', 'chunked', 'scan' or None, got {implementation!r}"
        )
    reasons = {platform: kernel.unsupported(inputs, options) for platform, kernel in PALLAS.items()}
    platforms = tuple(sorted(p for p, reason in reasons.items() if reason is None))
    if implementation == "pallas":
        if not platforms:
            why = "; ".join(f"{p}: {reason}" for p, reason in reasons.items()) or "no platform has one yet"
            raise NotImplementedError(f"implementation='pallas' has no kernel for this call ({why})")
        return _op(inputs, options, platforms, False)
    return _op(inputs, options, platforms, True)


_scan = jax.jit(scan.forward, static_argnums=1)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _op(inputs: Inputs, options: Options, platforms: tuple[str, ...], fall_back: bool) -> Any:
    """The op as kernels on ``platforms`` and, if ``fall_back``, the chunked form on all others."""
    return _by_platform("forward", platforms, fall_back, options, inputs)


def _op_fwd(inputs, options, platforms, fall_back):
    return _op(inputs, options, platforms, fall_back), inputs


def _op_bwd(options, platforms, fall_back, inputs, cotangents):
    return (_by_platform("backward", platforms, fall_back, options, inputs, *cotangents),)


_op.defvjp(_op_fwd, _op_bwd)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))  # one program also for a caller outside jit
def _by_platform(half: str, platforms: tuple[str, ...], fall_back: bool, options: Options, inputs, *args):
    def bind(fn):
        return lambda inputs, *args: fn(inputs, options, *args)

    default = bind(getattr(chunked, half))
    if not platforms:
        return default(inputs, *args)
    if not fall_back:
        message = f"implementation='pallas' has a kernel for this call on {', '.join(platforms)} only"
        default = lambda inputs, *args: bind(getattr(chunked, half))(  # noqa: E731
            inputs._replace(q=_refuse.bind(inputs.q, message=message)), *args
        )
    branches = {p: bind(getattr(PALLAS[p], half)) for p in platforms}
    return lax.platform_dependent(inputs, *args, default=default, **branches)


# The identity, except that lowering it is an error: a branch for platforms that must not be lowered for.
_refuse = Primitive("deltajax_refuse")
_refuse.def_abstract_eval(lambda x, message: x)
batching.defvectorized(_refuse)


def _refuse_lowering(ctx, x, *, message):
    platforms = ", ".join(ctx.module_context.platforms)
    raise NotImplementedError(f"{message}; this program is lowered for {platforms}")


mlir.register_lowering(_refuse, _refuse_lowering)
