"""A branch for platforms that a program must not be lowered for: lowering it is an error."""

from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array

_refuse = Primitive("deltajax_refuse")
_refuse.def_abstract_eval(lambda x, message: x)
batching.defvectorized(_refuse)


def refuse(x: Array, message: str) -> Array:
    """x; lowering it raises NotImplementedError with this message."""
    return _refuse.bind(x, message=message)


def _refuse_lowering(ctx, x, *, message):
    platforms = ", ".join(ctx.module_context.platforms)
    raise NotImplementedError(f"{message}; this program is lowered for {platforms}")


mlir.register_lowering(_refuse, _refuse_lowering)
