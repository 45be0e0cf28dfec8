"""Checks and times the Hopper kernels.

    python -m benchmarks.hopper --check            # every shared test case and full-width ones
    python -m benchmarks.hopper                    # the table, also as JSON with --json FILE

Times are medians of device time, as in `benchmarks.op_times`: `elapsed` from the start of one queued run to
the start of the next, `busy` the sum of the kernels alone.
"""

import dataclasses
import json
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import problems
from benchmarks.op_times import busy_ms, elapsed_ms, print_profile
from deltajax.ops import dispatch
from tests import cases

KERNEL = dispatch.PALLAS["cuda"]
TOLERANCE = 5e-3  # of o and the final state; gradients:
TOLERANCES = dict(
    dq=8e-3, dk=8e-3, dv=8e-3, dinitial_state=8e-3, dbeta=2e-2, dg=2e-2, dA_log=2e-2, ddt_bias=2e-2
)

FULL_WIDTH = [
    cases.Case("none", T=1000, K=128, V=128, H=2, HV=4),
    cases.Case("none", T=2048, K=128, V=128, H=2, HV=2, beta_max=2.0),
    cases.Case("none", T=520, K=64, V=192, H=2, HV=2, keys="identical", beta_max=2.0, normalize=False),
    cases.Case("head", T=1000, K=128, V=128, H=2, HV=4, decay="softplus"),
    cases.Case("head", T=1000, K=128, V=128, H=2, HV=4, decay="slow", beta_max=2.0),
    cases.Case("head", T=1000, K=128, V=128, B=2, H=2, HV=4, decay="slow", segments="packed"),
    cases.Case("channel", T=1000, K=128, V=128, H=2, HV=2, decay="bounded"),
    cases.Case("channel", T=1000, K=128, V=128, H=2, HV=2, decay="softplus"),
    cases.Case("channel", T=1000, K=128, V=128, H=2, HV=2, decay="slow", beta_max=2.0),
    cases.Case("channel", T=1000, K=128, V=128, B=2, H=2, HV=4, decay="softplus", segments="packed"),
    # Segments with states of their own.
    cases.Case("none", T=1000, K=128, V=128, H=2, HV=4, segments="states", beta_max=2.0),
    cases.Case("head", T=1000, K=128, V=128, B=2, H=2, HV=4, segments="states", decay="softplus"),
    cases.Case("channel", T=1000, K=128, V=128, B=2, H=2, HV=2, segments="states", decay="bounded"),
    cases.Case("head", T=1000, K=256, V=256, B=2, segments="states", decay="slow"),
    # Every token there: the gate's fast form in all chunks.
    cases.Case("channel", T=1024, K=128, V=128, H=2, HV=4, decay="bounded"),
    cases.Case("channel", T=1024, K=64, V=64, H=2, HV=2, decay="bounded", beta_max=2.0),
    # Heads enough for two warpgroups a block, too few for a block each in two waves.
    cases.Case("channel", T=256, K=128, V=128, H=96, HV=96, decay="bounded"),
    cases.Case("head", T=130, K=128, V=128, H=48, HV=96, decay="slow"),
    # Heads of which two warpgroups share a state column.
    cases.Case("none", T=1000, K=256, V=256, H=2, HV=4, beta_max=2.0),
    cases.Case("none", T=520, K=256, V=512, keys="identical", beta_max=2.0, normalize=False),
    cases.Case("none", T=4100, K=200, V=128, H=1, HV=2, beta_max=2.0),
    cases.Case("head", T=1000, K=256, V=512, H=2, HV=2, decay="softplus"),
    cases.Case("head", T=1000, K=256, V=256, H=2, HV=4, decay="slow", beta_max=2.0),
    cases.Case("head", T=1000, K=256, V=512, B=2, decay="slow", segments="packed"),
    cases.Case("head", T=4100, K=256, V=64, H=1, HV=2, decay="slow", beta_max=2.0),
    cases.Case("channel", T=1024, K=256, V=512, H=2, HV=4, decay="bounded"),
    cases.Case("channel", T=1000, K=256, V=256, H=2, HV=2, decay="bounded", beta_max=2.0),
    cases.Case("channel", T=1000, K=256, V=512, H=2, HV=2, decay="softplus"),
    cases.Case("channel", T=1000, K=200, V=64, H=2, HV=4, decay="slow", beta_max=2.0, normalize=False),
    cases.Case("channel", T=520, K=256, V=64, keys="identical", beta_max=2.0, decay="zero", normalize=False),
    cases.Case("channel", T=1000, K=256, V=512, B=2, decay="bounded", segments="packed"),
    cases.Case("channel", T=1000, K=256, V=256, B=2, decay="softplus", segments="states"),
    cases.Case("channel", T=4100, K=256, V=64, H=1, HV=2, decay="slow"),
    # Long enough for few heads to be split into runs.
    cases.Case("none", T=4100, K=128, V=128, H=1, HV=2, beta_max=2.0),
    cases.Case("head", T=4100, K=128, V=128, H=1, HV=2, decay="slow", beta_max=2.0),
    cases.Case("channel", T=4100, K=128, V=128, H=1, HV=2, decay="slow"),
    cases.Case("channel", T=4100, K=64, V=64, H=1, HV=2, decay="softplus", initial=False),
]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run."""

    check: bool = False
    """Check errors instead of timing."""
    only: tuple[str, ...] = ("",)
    """Only problems (or cases, with --check) whose name contains one of these."""
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    """Input types to check."""
    repeats: int = 5
    """With --check: runs that must agree bit by bit."""
    shard: tuple[int, int] = (0, 1)
    """With --check: i, n to take every n-th case from the i-th; compiling is slow, so run several at once."""
    backward: bool = False
    """Also time forward + backward."""
    implementation: str = "pallas"
    """What is timed: "chunked" for the plain form on the same card."""
    json: str | None = None
    """File for the full numbers."""
    profile: int = 0
    """Print so many of the kernels that take longest."""

    def selects(self, x) -> bool:
        return any(part in str(x) for part in self.only)


def recurrence(case: cases.Case, x: dict) -> dict[str, np.ndarray]:
    """Outputs and gradients of the recurrence in float64 on the CPU."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return cases.reference(case, x)


@partial(jax.jit, static_argnums=0)
def forward_alone(case: cases.Case, x: dict) -> dict[str, jax.Array]:
    """Outputs of a forward pass that keeps nothing for a backward one."""
    o, state = cases.call(case, x, "pallas")
    return {"o alone": o, "final_state alone": state}


def passes(case: cases.Case, x: dict) -> dict[str, jax.Array]:
    """Outputs and gradients, and `forward_alone`."""
    return cases.outputs_and_gradients(case, x, "pallas") | forward_alone(cases.program(case), x)


def check(options: Options) -> bool:
    """Errors against the float64 recurrence on the same inputs, and equal bits on repeated runs.

    The kernels take every case, so one that they refuse is a failure. ``alone`` is the forward pass as it is
    where nobody differentiates it.
    """
    seed = int(time.time())
    start, step = options.shard
    ok, worst, compared, refused = start != 0 or check_transformations(), {}, 0, 0
    for case in [c for c in [*cases.CASES, *FULL_WIDTH] if options.selects(c)][start::step]:
        for dtype in options.dtypes:
            x = cases.arrays(case, jnp.dtype(dtype), seed)
            device = jax.tree.map(jnp.asarray, x)
            try:
                got = jax.device_get(passes(case, device))
            except NotImplementedError as error:
                refused += 1
                print(f"REFUSED {dtype} {case}: {error}", flush=True)
                continue
            compared += 1
            same = all(
                np.array_equal(got[name], np.asarray(again[name]), equal_nan=True)
                for again in (passes(case, device) for _ in range(options.repeats))
                for name in got
            )
            expected = recurrence(case, x)
            expected |= {f"{name} alone": expected[name] for name in ("o", "final_state")}
            errors = {name: cases.relative_error(got[name], expected[name]) for name in got}
            for name, e in errors.items():
                key = (case.gate, dtype, name)
                worst[key] = max(worst.get(key, (0.0, "")), (e if e == e else float("inf"), str(case)))
            over = {name: f"{e:.1e}" for name, e in errors.items() if not e < TOLERANCES.get(name, TOLERANCE)}
            if over or not same:
                ok = False
                print(f"FAIL {dtype} {case}: {over} same={same}", flush=True)
    for key, (e, name) in sorted(worst.items()):
        print(f"worst {' '.join(key):24s} {e:.1e}  {name}")
    ok = ok and compared > 0 and not refused
    print(f"check: {'ok' if ok else 'FAILED'}, seed {seed}, {compared} compared, {refused} refused, {card()}")
    return ok


def check_transformations() -> bool:
    """vmap, scan and grad of the op with the kernels give what plain calls give."""
    case = cases.Case("channel", T=130, K=64, V=64, B=4, H=1, HV=2, decay="softplus")
    x = {n: jnp.asarray(a) for n, a in cases.arrays(case, jnp.bfloat16, int(time.time())).items()}
    parameters = {n: x.pop(n) for n in ("A_log", "dt_bias")}
    x.pop("do"), x.pop("dstate")

    def run(x):
        return cases.call(case, {**x, **parameters}, "pallas")

    def energy(x):
        return sum(jnp.sum(jnp.square(a.astype(jnp.float32))) for a in run(x))

    def same(a, b):
        return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))

    fold = lambda t: jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), t)  # noqa: E731
    plain = fold(jax.jit(run)(x))
    ok = same(jax.jit(jax.vmap(run))(fold(x)), plain)
    ok &= same(jax.jit(lambda x: jax.lax.scan(lambda _, row: (None, run(row)), None, x)[1])(fold(x)), plain)
    slopes = jax.jit(jax.grad(energy))(x)
    again = jax.jit(jax.vmap(jax.grad(jax.checkpoint(energy))))(fold(x))
    ok &= all(cases.relative_error(again[n], fold(slopes)[n]) < TOLERANCE for n in slopes)
    print(f"vmap, scan, grad, remat: {'ok' if ok else 'FAILED'}")
    return bool(ok)


def card() -> str:
    return jax.devices()[0].device_kind


def main(options: Options) -> int:
    """Runs the check or the table."""
    dispatch.PALLAS = {"cuda": KERNEL}
    if options.check:
        return 0 if check(options) else 1
    rows = []
    print(
        f"{card()}, jax {jax.__version__}, milliseconds; FLA and FlashKDA measured 2026-11-24 on an H100 80GB"
    )
    for p in problems.PROBLEMS:
        if not options.selects(p):
            continue
        args, do = problems.arguments(p, jax.random.key(int(time.time())))
        f = problems.function(p, options.implementation)

        both = problems.with_gradients(f)
        runs = {"fwd": (f, args)} | ({"fwd_bwd": (both, (do, *args))} if options.backward else {})
        row = {"problem": str(p), "card": card(), "rival": problems.RIVALS.get(str(p))}
        for name, (fn, xs) in runs.items():
            try:
                compiled = jax.jit(fn).lower(*xs).compile()
            except NotImplementedError as e:
                print(f"{p}: {e}")
                continue
            row[name], row[name + "_busy"] = elapsed_ms(compiled, xs), busy_ms(jax.jit(fn), xs)
            row[name + "_temp_mib"] = compiled.memory_analysis().temp_size_in_bytes / 2**20
            if options.profile:
                print(p)
                print_profile(jax.jit(fn), xs, options.profile)
        rows.append(row)
        print(line(row), flush=True)
        if options.json:
            with open(options.json, "w") as file:
                json.dump(rows, file, indent=1)
    return 0


def line(row: dict) -> str:
    """A problem's row of the table."""
    text = f"{row['problem']:24s}"
    for name in ("fwd", "fwd_bwd"):
        if name in row:
            text += f"  {name} {row[name]:.3f} busy {row[name + '_busy']:.3f}"
            text += f" ({row[name + '_temp_mib']:.0f} MiB)"
    fla, fla_both, flash = (f"{x:.2f}" if x else "-" for x in row["rival"] or (None,) * 3)
    return text + f"  FLA {fla} / {fla_both}  FlashKDA {flash}"


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
