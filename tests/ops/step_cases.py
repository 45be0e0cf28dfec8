"""One-token problems for every implementation of `delta_rule_step`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from deltajax import ops
from tests import cases


@dataclasses.dataclass(frozen=True)
class StepCase:
    """A shape, a gate and the kind of data; ``decay`` as in `cases.Case`."""

    gate: str
    K: int = 64
    V: int = 64
    B: int = 2
    H: int = 1
    HV: int = 2
    decay: str = "random"
    beta_max: float = 1.0
    normalize: bool = True
    dtype: str = "bfloat16"
    state: str = "float32"
    scale: float | None = None

    def __str__(self):
        parts = [self.gate, f"B{self.B}H{self.H}-{self.HV}K{self.K}V{self.V}", self.decay, self.dtype]
        parts += [self.state + "-state"] if self.state != "float32" else []
        parts += ["raw"] if not self.normalize else []
        return "-".join(parts)


STEPS = [
    StepCase("none", K=128, V=128, beta_max=2.0),
    StepCase("none", K=64, V=256, H=2, HV=4, dtype="float32", normalize=False),
    StepCase("head", K=128, V=64, decay="softplus", dtype="float32", beta_max=2.0),
    StepCase("head", K=256, V=512, B=1, HV=1, decay="random"),
    StepCase("head", K=64, V=64, HV=1, decay="bounded", state="bfloat16"),
    StepCase("head", K=64, V=128, HV=3, decay="reset", scale=0.5),
    StepCase("channel", K=128, V=128, decay="bounded", dtype="float32", beta_max=2.0),
    StepCase("channel", K=128, V=128, B=3, H=2, HV=4, decay="softplus"),
    StepCase("channel", K=64, V=64, decay="reset", state="bfloat16", normalize=False),
    StepCase("channel", K=256, V=64, HV=1, decay="half50", dtype="float16"),
]


def arrays(case: StepCase, seed: int = cases.SEED) -> dict:
    """state, q, k, v, beta and what the gate needs, of one token."""
    sequence = cases.Case(
        case.gate, 1, case.K, case.V, case.B, case.H, case.HV, case.decay, beta_max=case.beta_max,
        normalize=case.normalize,
    )  # fmt: skip
    x = cases.arrays(sequence, jnp.dtype(case.dtype), seed)
    x = {n: a[:, 0] if n in ("q", "k", "v", "g", "beta") else a for n, a in x.items()}
    x["state"] = x.pop("initial_state").astype(jnp.dtype(case.state))
    return {n: jnp.asarray(a) for n, a in x.items() if n not in ("do", "dstate")}


def call(case: StepCase, x: dict, implementation: str | None):
    """(o, state) through the public op."""
    gate = None
    if "A_log" in x:
        gate = ops.Gate(x["A_log"], x["dt_bias"], lower_bound=-5.0 if case.decay == "bounded" else None)
    return ops.delta_rule_step(
        x["state"], x["q"], x["k"], x["v"], x["beta"], x.get("g"), gate=gate, normalize_qk=case.normalize,
        scale=case.scale, implementation=implementation,
    )  # fmt: skip


def reference(case: StepCase, x: dict) -> list[np.ndarray]:
    """`call` of the definition in float64."""
    with jax.enable_x64(True):
        wide = {n: jnp.asarray(np.asarray(a, np.float64)) for n, a in x.items()}
        return [np.asarray(a) for a in call(case, wide, "scan")]


def relative_errors(case: StepCase, x: dict, got) -> dict[str, float]:
    """Of o and the state, against `reference`."""
    return {
        name: cases.relative_error(a, b)
        for name, a, b in zip(("o", "state"), got, reference(case, x), strict=True)
    }


def tolerance(case: StepCase, name: str) -> float:
    """What a result's rounding to its own dtype allows; the arithmetic is float32."""
    dtype = case.dtype if name == "o" else case.state
    return {"float32": 2e-6, "float16": 1e-3, "bfloat16": 4e-3}[dtype]
