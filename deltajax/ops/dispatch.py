"""Choice of an implementation, made when a program is lowered and never from the default backend."""

from deltajax.ops import scan
from deltajax.ops.problem import Inputs, Options


def run(inputs: Inputs, options: Options, implementation):
    return scan.forward(inputs, options)
