"""What becomes of a call for which kernels were asked: platforms that have one, errors for the others."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array

_refuse = Primitive("deltajax_refuse")
_refuse.def_abstract_eval(lambda x, message: x)
batching.defvectorized(_refuse)


class NoKernelError(NotImplementedError):
    """Kernels were asked for and there is none for the call, or for the platform."""


def supporting(reasons: Mapping[str, str | None], *, asked: bool, what: str) -> tuple[str, ...]:
    """The platforms whose kernels take a call.

    Args:
      reasons: by platform, why its kernel does not take the call, or None if it does.
      asked: whether `implementation="pallas"` was.
      what: "call" or "step", for the error.

    Raises:
      NoKernelError: kernels were asked for and none takes the call.
    """
    platforms = tuple(sorted(platform for platform, reason in reasons.items() if reason is None))
    if asked and not platforms:
        why = "; ".join(f"{p}: {reason}" for p, reason in reasons.items()) or "no platform has one yet"
        raise NoKernelError(f"implementation='pallas' has no kernel for this {what} ({why})")
    return platforms


def in_32_bits(branch: Callable[..., Any]) -> Callable[..., Any]:
    """A branch for a kernel, traced as without ``jax_enable_x64``: kernels count in int32.

    Its arguments are none of 64 bits: kernels take no others.
    """

    @functools.wraps(branch)
    def run(*args: Any) -> Any:
        with jax.enable_x64(False):
            return branch(*args)

    return run


def on_platforms(*args: Any, default: Callable[..., Any], kernels: Mapping[str, Callable[..., Any]]) -> Any:
    """The kernel of the platform that the program is lowered for, on ``args``, or else ``default``."""
    branches = {platform: in_32_bits(kernel) for platform, kernel in kernels.items()}
    return lax.platform_dependent(*args, default=default, **branches)


def refuse(x: Array, platforms: tuple[str, ...], what: str) -> Array:
    """x; lowering it is an error that names the platforms with kernels: a branch for all others."""
    message = f"implementation='pallas' has a kernel for this {what} on {', '.join(platforms)} only"
    return _refuse.bind(x, message=message)


def _refuse_lowering(ctx, x, *, message):
    platforms = ", ".join(ctx.module_context.platforms)
    raise NoKernelError(f"{message}; this program is lowered for {platforms}")


mlir.register_lowering(_refuse, _refuse_lowering)
