"""The op problems that are timed: the shapes of the published comparisons, with fresh random data."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from deltajax import ops


@dataclasses.dataclass(frozen=True)
class Problem:
    """One timed call: q/k normalisation and gate activation inside the op, bf16 inputs.

    gate: "delta" (DeltaNet), "gated" (Gated DeltaNet), "kda_safe" (gate bounded at -5) or "kda_softplus".
    """

    gate: str
    B: int
    T: int
    H: int
    HV: int
    K: int = 128
    V: int = 128

    def __str__(self):
        heads = f"{self.H}" if self.H == self.HV else f"{self.H}({self.HV})"
        size = "" if self.K == self.V == 128 else f" {self.K}x{self.V}"
        return f"{self.gate} {self.B}x{self.T}x{heads}{size}"


def _all() -> list[Problem]:
    long = ((16, 2048, 16), (4, 8192, 16), (1, 32768, 16))
    out = []
    for gate in ("delta", "gated", "kda_safe", "kda_softplus"):
        out += [Problem(gate, B, T, H, H) for B, T, H in long]
    out += [Problem("gated", 1, 8192, 16, 32), Problem("kda_safe", 1, 8192, 96, 96)]
    # Heads as wide as the Gated DeltaNet paper's.
    out += [
        Problem(gate, B, T, 8, 8, 256, 512)
        for gate in ("delta", "gated", "kda_safe", "kda_softplus")
        for B, T in ((16, 2048), (1, 32768))
    ]
    return out


PROBLEMS = _all()


def arguments(p: Problem, key: jax.Array, dtype=jnp.bfloat16) -> tuple[tuple, jax.Array]:
    """(arguments of `function(p)`, cotangent of o)."""
    keys = iter(jax.random.split(key, 8))

    def normal(*shape):
        return jax.random.normal(next(keys), shape, dtype)

    q, k, v = (normal(p.B, p.T, h, d) for h, d in ((p.H, p.K), (p.H, p.K), (p.HV, p.V)))
    beta = jax.nn.sigmoid(normal(p.B, p.T, p.HV))
    do = normal(p.B, p.T, p.HV, p.V)
    if p.gate == "delta":
        return (q, k, v, beta), do
    channels = () if p.gate == "gated" else (p.K,)
    g = normal(p.B, p.T, p.HV, *channels)
    A_log = jnp.log(jax.random.uniform(next(keys), (p.HV,), minval=1.0, maxval=16.0))
    dt = jnp.exp(jax.random.uniform(next(keys), (p.HV, *channels), minval=jnp.log(1e-3), maxval=jnp.log(0.1)))
    dt_bias = jnp.log(jnp.expm1(dt))
    return (q, k, v, beta, g, A_log, dt_bias), do


def function(p: Problem, implementation: str, chunk_size: int | None = None, axis_name: str | None = None):
    """The op as a function of `arguments`' first result, returning o."""
    options: dict[str, Any] = dict(
        normalize_qk=True, implementation=implementation, chunk_size=chunk_size, axis_name=axis_name
    )

    def run(q, k, v, beta, g=None, A_log=None, dt_bias=None):
        if p.gate == "delta":
            return ops.delta_rule(q, k, v, beta, **options)[0]
        gate = ops.Gate(A_log, dt_bias, lower_bound=-5.0 if p.gate == "kda_safe" else None)
        op = ops.gated_delta_rule if p.gate == "gated" else ops.kimi_delta_attention
        return op(q, k, v, g, beta, gate=gate, **options)[0]

    return run


def with_gradients(f):
    """`function`'s result as one of o's cotangent and the arguments: o, and all their gradients."""

    def both(do, *args):
        o, pull = jax.vjp(f, *args)
        return o, pull(do)

    return both


# Published rivals on an NVIDIA H100 80GB HBM3, 2026-11-24, milliseconds: flash-linear-attention 0.6.0
# (Triton) forward and forward + backward, FlashKDA forward. None: refused, or not offered.
RIVALS = {
    "kda_safe 16x2048x16": (2.05, 9.12, 0.895),
    "kda_safe 4x8192x16": (2.09, 9.25, 1.245),
    "kda_safe 1x32768x16": (2.77, 11.52, 3.637),
    "kda_safe 1x8192x96": (3.15, 14.33, 1.528),
    "kda_softplus 16x2048x16": (2.28, 11.47, None),
    "kda_softplus 4x8192x16": (2.31, 11.59, None),
    "kda_softplus 1x32768x16": (3.03, 13.81, None),
    "delta 16x2048x16": (1.38, 3.98, None),
    "delta 4x8192x16": (1.40, 4.03, None),
    "delta 1x32768x16": (1.85, 5.53, None),
    "gated 16x2048x16": (1.21, None, None),
    "gated 4x8192x16": (1.23, None, None),
    "gated 1x32768x16": (1.80, None, None),
    "gated 1x8192x16(32)": (0.72, None, None),
}
