"""Checks and times the Hopper kernel of `delta_rule_step`.

    python -m benchmarks.hopper_step --check   # against the recurrence in float64, and equal bits on 20 runs
    python -m benchmarks.hopper_step --plain   # device time and state traffic, 32 heads of 128 x 128

`kernel` is the median time of one kernel in a loop over steps, `elapsed` a queued run from the host with the
state donated, launches included.
"""

import dataclasses
import statistics
import time
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import tyro

from deltajax import ops
from deltajax.ops import step_kernels
from tests.ops import step_cases
from tests.ops.step_cases import StepCase

KERNEL = step_kernels.STEP_KERNELS["cuda"]
STEPS = 20
H, K, V = 32, 128, 128
# KDA, float32 state, of Triton kernels on an H100 80GB, 2026-11-24: milliseconds by B.
RIVAL = {1: 0.032, 32: 0.060, 256: 0.398}

LARGE = [
    StepCase("none", K=128, V=128, B=32, H=16, HV=32, beta_max=2.0),
    StepCase("head", K=256, V=512, B=8, H=4, HV=8, decay="softplus"),
    StepCase("channel", K=128, V=128, B=33, H=32, HV=32, decay="softplus", dtype="float32"),
    StepCase("channel", K=128, V=128, B=33, H=32, HV=32, decay="bounded", beta_max=2.0),
    StepCase("channel", K=128, V=128, B=1, H=32, HV=32, decay="bounded"),
]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run."""

    check: bool = False
    """Check errors instead of timing."""
    gates: tuple[str, ...] = ("none", "head", "channel")
    """Gate kinds to time: "head" and "channel" with the unbounded activation in the kernel."""
    B: tuple[int, ...] = (1, 32, 256)
    """Sequences to time."""
    state: Literal["float32", "bfloat16"] = "float32"
    """The state's dtype."""
    plain: bool = False
    """Also time `implementation="scan"`."""


def check() -> bool:
    """Errors, and equal bits on repeated runs."""
    seed, ok = int(time.time()), True
    for case in [*step_cases.STEPS, *LARGE]:
        x = step_cases.arrays(case, seed)
        run = jax.jit(partial(step_cases.call, case, implementation="pallas"))
        got = run(x)
        same = all(
            bool(jnp.array_equal(a, b)) for _ in range(STEPS) for a, b in zip(got, run(x), strict=True)
        )
        got = jax.device_get(got)
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            errors = step_cases.relative_errors(case, jax.device_get(x), got)
        good = same and all(e < step_cases.tolerance(case, n) for n, e in errors.items())
        ok &= good
        text = " ".join(f"{n} {e:.1e}" for n, e in errors.items())
        print(f"{'ok  ' if good else 'FAIL'} {case}: {text} same={same}", flush=True)
    print(f"check: {'ok' if ok else 'FAILED'}, seed {seed}, {card()}")
    return ok


def card() -> str:
    return jax.devices()[0].device_kind


def inputs(gate: str, B: int, state: str) -> dict:
    """Random bfloat16 inputs of a step, by name."""
    keys = iter(jax.random.split(jax.random.key(int(time.time())), 8))

    def normal(*shape):
        return jax.random.normal(next(keys), shape, jnp.bfloat16)

    x = dict(q=normal(B, H, K), k=normal(B, H, K), v=normal(B, H, V))
    x["beta"] = jax.nn.sigmoid(normal(B, H))
    x |= dict(g=None, A_log=None, dt_bias=None)
    if gate != "none":
        shape = (H,) if gate == "head" else (H, K)
        x |= dict(g=normal(B, *shape), A_log=jnp.zeros(H), dt_bias=jnp.full(shape, -3.0))
    x["state"] = jax.random.normal(next(keys), (B, H, K, V), jnp.dtype(state))
    return x


def step(x: dict, implementation: str) -> tuple[jax.Array, jax.Array]:
    """The op, everything fused."""
    gate = None if x["A_log"] is None else ops.Gate(x["A_log"], x["dt_bias"])
    given = (x[n] for n in ("state", "q", "k", "v", "beta", "g"))
    return ops.delta_rule_step(*given, gate=gate, normalize_qk=True, implementation=implementation)


def kernel_ms(x: dict, implementation: str) -> float:
    """Median device time of a step; the plain form's is the sum over its kernels."""
    from jax.experimental.mosaic.gpu import profiler

    @jax.jit
    def loop(x):
        def turn(_, carry):
            return step(x | dict(state=carry[1]), implementation)

        return jax.lax.fori_loop(0, STEPS, turn, (jnp.zeros_like(x["v"]), x["state"]))

    jax.block_until_ready(loop(x))
    times = profiler.measure(loop, aggregate=False)(x)[1]
    if implementation == "scan":
        return sum(ms for name, ms in times if "memcpy" not in name.lower()) / STEPS
    found = [ms for name, ms in times if "delta_step" in name]
    if not found:
        raise RuntimeError(f"no kernel named delta_step among {sorted({name for name, _ in times})}")
    return statistics.median(found)


def elapsed_ms(x: dict, implementation: str) -> float:
    """Median over groups of a queued run, state donated."""
    state = x["state"] + 0
    rest = {n: a for n, a in x.items() if n != "state"}
    run = jax.jit(lambda state, rest: step(rest | dict(state=state), implementation), donate_argnums=0)
    samples = []
    for _ in range(8):
        start = time.perf_counter()
        for _ in range(STEPS):
            o, state = run(state, rest)
        jax.block_until_ready((o, state))
        samples.append((time.perf_counter() - start) / STEPS * 1e3)
    return statistics.median(samples[1:])


def main(options: Options) -> int:
    """Runs the check or the table."""
    step_kernels.STEP_KERNELS = {"cuda": KERNEL}
    if options.check:
        return 0 if check() else 1
    print(f"{card()}, jax {jax.__version__}, {H} heads of {K} x {V}, {options.state} state, milliseconds")
    for gate in options.gates:
        for B in options.B:
            x = inputs(gate, B, options.state)
            traffic = 2 * x["state"].nbytes
            for implementation in ("pallas", "scan") if options.plain else ("pallas",):
                ms, elapsed = kernel_ms(x, implementation), elapsed_ms(x, implementation)
                rival = f"  rival {RIVAL[B]}" if gate == "channel" and B in RIVAL else ""
                print(
                    f"{gate:8s} B {B:4d}  {implementation:6s}  kernel {ms:.4f} "
                    f"({traffic / ms / 1e6:5.0f} GB/s)  elapsed {elapsed:.4f}{rival}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
