"""Times the layouts of the Hopper walks that `delta_rule.plan` chooses from, shape by shape.

    python -m benchmarks.hopper_plans                              # every shape, forward and backward
    python -m benchmarks.hopper_plans --only "delta 1x32768" --json plans.json
    python -m benchmarks.hopper_plans --check                      # all give what the chosen one does

A row of the table is a layout: warpgroups of a block, chunks in flight forward (backward two), and runs of
a sequence; `*` marks the chosen one. Device time, medians, as in `benchmarks.hopper`.
"""

import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import jax
import tyro

from benchmarks import problems
from benchmarks.hopper import KERNEL, card
from benchmarks.op_times import elapsed_ms
from deltajax.ops import dispatch
from pallas_kernels.gpu import delta_rule
from pallas_kernels.gpu.limits import CHUNK
from pallas_kernels.gpu.sides import SIDE
from pallas_kernels.gpu.walks import Plan
from tests import cases

BOUND = 5e-3  # of one layout's results from the chosen one's


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run."""

    only: tuple[str, ...] = ("",)
    """Only problems whose name contains one of these."""
    check: bool = False
    """Compare results instead of timing."""
    json: str | None = None
    """File for the table."""


def layouts(p: problems.Problem) -> list[Plan]:
    """Those that a problem's shape allows, and the chosen one with another number of stages."""
    best = chosen(p)
    most = max(best.stages, 3 if p.K <= SIDE and not p.gate.startswith("kda") else 2)
    found = [Plan(2, most)] if p.V % 128 == 0 and p.K <= SIDE else []
    runs = (1, 2, 3, 4, 6, 8) if p.B * p.HV * (p.V // 64) <= delta_rule.MULTIPROCESSORS else (1,)
    longest = max(1, p.T // CHUNK // delta_rule.LEAST_CHUNKS)
    found += [Plan(1, most, n) for n in runs if n <= longest]
    others = [dataclasses.replace(best, stages=n) for n in (2, 3)]
    return found + [x for x in others if x not in found]


def chosen(p: problems.Problem) -> Plan:
    """The layout that a call takes."""
    v = jax.ShapeDtypeStruct((p.B, p.T, p.HV, p.V), "bfloat16")
    return delta_rule.plan(v, p.K, channel=p.gate.startswith("kda"))


def programs(plans: list[Plan], function, args) -> list:
    """The compiled programs with these layouts, None where one does not fit on the chip."""

    def lowered(layout):
        jax.clear_caches()  # else what was traced with another layout is used again
        with mock.patch.object(delta_rule, "plan", lambda *_, **__: layout):
            try:
                return jax.jit(lambda *x: function(*x)).lower(*args)
            except (RuntimeError, ValueError):  # shared memory
                return None

    def compiled(program):
        try:
            return program and program.compile()
        except RuntimeError:
            return None

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(compiled, [lowered(layout) for layout in plans]))


def label(p: problems.Problem, layout: Plan, best: Plan) -> str:
    text = f"{p!s:24s} {'*' if layout == best else ' '} warpgroups {layout.warpgroups}"
    return text + f" stages {layout.stages} runs {layout.runs}"


def compare(p: problems.Problem, best: Plan, compiled: dict, args) -> tuple[bool, int, int]:
    """Whether all layouts give what the chosen one does; how many others were compared, did not compile."""
    missing = [layout for layout, program in compiled.items() if program is None]
    for layout in missing:
        verdict = "FAIL" if layout == best else "none"
        print(f"{verdict} {label(p, layout, best)}: does not compile", flush=True)
    if best in missing:
        return False, 0, len(missing)
    want, ok = compiled[best](*args), True
    others = [layout for layout in compiled if layout != best and layout not in missing]
    for layout in others:
        pairs = zip(jax.tree.leaves(compiled[layout](*args)), jax.tree.leaves(want), strict=True)
        worst = max(cases.relative_error(*map(jax.device_get, pair)) for pair in pairs)
        ok &= worst < BOUND
        print(f"{'ok  ' if worst < BOUND else 'FAIL'} {label(p, layout, best)}: {worst:.1e}", flush=True)
    return ok, len(others), len(missing)


def main(options: Options) -> int:
    """Runs the check or the table."""
    dispatch.PALLAS = {"cuda": KERNEL}
    rows, ok, compared, missing = [], True, 0, 0
    print(f"{card()}, jax {jax.__version__}, milliseconds forward, forward + backward")
    for p in problems.PROBLEMS:
        if not any(part in str(p) for part in options.only):
            continue
        args, do = problems.arguments(p, jax.random.key(int(time.time())))
        forward = problems.function(p, "pallas")
        best, plans = chosen(p), layouts(p)
        both = programs(plans, problems.with_gradients(forward), (do, *args))
        # A forward pass alone has its own number of stages, which may not fit where that of both passes does.
        halves = both if options.check else programs(plans, forward, args)
        if options.check:
            good, n, absent = compare(p, best, dict(zip(plans, both, strict=True)), (do, *args))
            ok, compared, missing = ok and good, compared + n, missing + absent
            continue
        for i, layout in enumerate(plans):
            if both[i] is None or halves[i] is None:
                continue
            times = elapsed_ms(halves[i], args), elapsed_ms(both[i], (do, *args))
            rows.append(
                {"problem": str(p), "chosen": layout == best, "card": card(), "ms": times}
                | dataclasses.asdict(layout)
            )
            print(f"{label(p, layout, best)}  {times[0]:.3f} {times[1]:.3f}", flush=True)
            if options.json:
                with open(options.json, "w") as file:
                    json.dump(rows, file, indent=1)
    if options.check:
        ok = ok and compared > 0
        print(f"check: {'ok' if ok else 'FAILED'}, {compared} compared, {missing} do not compile, {card()}")
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
