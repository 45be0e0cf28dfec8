"""Static reports of programs compiled for TPUs: every operation's schedule, replayed and added up.

`reports` starts a process for each call, because libtpu reads its flags once per process; this module is also
that process: ``python -m benchmarks.tpu_report TOPOLOGY`` reads jobs and writes reports as JSON.
"""

import base64
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
import tempfile
from typing import NamedTuple

from benchmarks import tpu_dump
from benchmarks.tpu_schedule import Counts, Schedule
from train import tpu_aot


class Chip(NamedTuple):
    """What one replayed core has to itself."""

    ghz: float
    hbm_gbps: float
    delay_slots: int


# ghz: the published bfloat16 peak over what the matrix units take per cycle (v5: 4 of 128 x 128, one row
# each; v6e, 7x: 2 of 256 x 256, two rows each). A v5p chip is one device of two cores, of which core 0 is
# replayed, with half the bandwidth; a 7x chip is two devices.
CHIPS = {
    "v5e": Chip(1.50, 819, 4),
    "v5p": Chip(1.75, 2765 / 2, 4),
    "v6e": Chip(1.75, 1640, 4),
    "tpu7x": Chip(2.20, 7380 / 2, 2),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A program to compile.

    make: "module:function" or "file.py:function"; called with options it returns (function, arguments).
    """

    name: str
    make: str
    options: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Operation:
    """A Pallas call, or XLA operations added up. Counts are those of one call."""

    name: str
    pallas: bool
    calls: int
    grid_steps: int
    issue: int
    cycles: int
    hbm_read: int
    hbm_write: int
    matmuls: int
    spills: int
    fills: int
    vmem: int
    notes: list[str]

    def ms(self, chip: Chip, issue_only: bool = False) -> float:
        """All calls, each as long as the slower of its bundles and its HBM traffic."""
        bundles = self.issue if issue_only else self.cycles
        transfer = (self.hbm_read + self.hbm_write) / chip.hbm_gbps
        return self.calls * max(bundles / chip.ghz, transfer) / 1e6


@dataclasses.dataclass
class Report:
    """Of one program on one topology."""

    name: str
    topology: str
    operations: list[Operation]
    temp: int = 0
    arguments: int = 0
    outputs: int = 0
    error: str | None = None

    @property
    def chip(self) -> Chip:
        return CHIPS[self.topology.partition(":")[0]]

    @property
    def pallas(self) -> list[Operation]:
        return [o for o in self.operations if o.pallas]

    @property
    def xla(self) -> list[Operation]:
        return [o for o in self.operations if not o.pallas]

    def total(self, field: str) -> int:
        """Sum of a count over all calls."""
        return sum(getattr(o, field) * o.calls for o in self.operations)

    def ms(self, issue_only: bool = False) -> float:
        """The operations one after another."""
        return sum(o.ms(self.chip, issue_only) for o in self.operations)


def op(
    gate: str,
    B: int,
    T: int,
    H: int,
    HV: int,
    K: int,
    V: int,
    dtype: str,
    backward: bool,
    implementation: str,
) -> tuple:
    """(the op of `benchmarks.problems`, forward or forward + backward; shapes of its arguments)."""
    import jax

    from benchmarks import problems

    problem = problems.Problem(gate, B, T, H, HV, K, V)
    make = functools.partial(problems.arguments, problem, dtype=jax.numpy.dtype(dtype))
    args, do = jax.eval_shape(make, jax.random.key(0))
    forward = problems.function(problem, implementation)
    if not backward:
        return forward, args

    return problems.with_gradients(forward), (do, *args)


def reports(jobs: list[Job], topology: str) -> list[Report]:
    """Compiles and replays jobs in a new process.

    Raises:
      RuntimeError: libtpu cannot be imported, or the process failed.
    """
    if not tpu_aot.available():
        raise RuntimeError("libtpu cannot be imported: run with `uv run --with libtpu ...`")
    root = pathlib.Path(__file__).parents[1]
    environment = os.environ | tpu_aot.environment()
    environment.pop("XLA_FLAGS", None)  # the tests' choices for the CPU
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tpu_report", topology],
        input=json.dumps([dataclasses.asdict(job) for job in jobs]),
        capture_output=True,
        text=True,
        cwd=root,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(f"compiling for {topology} failed:\n{done.stderr[-4000:]}")
    return [
        Report(**r | {"operations": [Operation(**o) for o in r["operations"]]})
        for r in json.loads(done.stdout.splitlines()[-1])
    ]


# What follows runs in the process that `reports` starts.

_HLO = re.compile(
    r"^\s+(?:ROOT )?%(?P<name>\S+) = (?P<type>\(.*?\)|\S+) (?P<opcode>[\w-]+)\((?P<operands>.*?)\)(?=,|$).*$",
    re.M,
)


class _Instruction(NamedTuple):
    line: str
    pallas: bool
    signature: tuple  # equal for instructions that libtpu compiles once


def _instructions(hlo: str) -> dict[str, _Instruction]:
    found = {m["name"]: m for m in _HLO.finditer(hlo)}
    out = {}
    for name, m in found.items():
        pallas = 'custom_call_target="tpu_custom_call"' in m[0]
        operands = tuple(found[o]["type"] for o in re.findall(r"%([\w.\-]+)", m["operands"]) if o in found)
        cost = re.findall(r'"estimated_cycles":"(\d+)"', m[0])
        body = re.search(r'"body":"([^"]*)"', m[0])
        kernel = hashlib.sha256(base64.b64decode(body[1])).hexdigest() if body else ""
        signature = (m["type"], m["opcode"], operands, *cost, kernel)
        out[name] = _Instruction(m[0], pallas, signature)
    return out


def _vmem(line: str) -> int:
    scoped = line.partition("used_scoped_memory_configs")[2]
    return sum(map(int, re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', scoped)))


def _analyse(hlo: str, dump: pathlib.Path, chip: Chip) -> list[Operation]:
    """The operations that the program ("TLP" in the dump) calls, and the program itself."""
    schedules: dict[str, Schedule] = {}
    for path in sorted(dump.glob("*-packed-bundles-post-ra.txt")):  # by time: the last try of a kernel counts
        if found := re.fullmatch(r"\d+-(.*)-\d+-packed-bundles-post-ra", path.stem):
            schedules[found[1]] = Schedule(path.read_text(errors="replace"), chip.delay_slots)
    instructions = _instructions(hlo)
    dumped = {instructions[n].signature: n for n in schedules if n in instructions}
    counts: dict[str, Counts] = {}
    program = schedules["TLP"].replay()
    out = []
    for name, calls in [("TLP", 1), *sorted(program.calls.items())]:
        instruction = instructions.get(name, _Instruction("", False, ()))
        source = name if name in schedules else dumped.get(instruction.signature)
        if source is None:
            note = "its schedule was not dumped"
            out.append(Operation(name, instruction.pallas, calls, 1, 0, 0, 0, 0, 0, 0, 0, 0, [note]))
            continue
        schedule = schedules[source]
        if source not in counts:
            counts[source] = program if name == "TLP" else schedule.replay()
        c = counts[source]
        out.append(
            Operation(
                name="the program" if name == "TLP" else name,
                pallas=instruction.pallas,
                calls=calls,
                grid_steps=schedule.grid_steps,
                issue=c.issue,
                cycles=c.cycles,
                hbm_read=c.hbm_read,
                hbm_write=c.hbm_write,
                matmuls=c.matmuls,
                spills=schedule.spills,
                fills=schedule.fills,
                vmem=_vmem(instruction.line),
                # Which core of which chip this is, is never known and decides nothing.
                notes=[] if name == "TLP" or name.startswith("<") else c.notes,
            )
        )
    return out


def _load(make: str):
    module, _, name = make.rpartition(":")
    if not module.endswith(".py"):
        return getattr(importlib.import_module(module), name)
    return runpy.run_path(module)[name]


def _report(job: Job, topology: str, dump: pathlib.Path) -> Report:
    report = Report(job.name, topology, [])
    try:
        fn, args = _load(job.make)(**job.options)
        compiled = tpu_aot.compile_for(fn, args, topology)
    except Exception as e:  # said in the table, beside the jobs that do compile
        report.error = f"{type(e).__name__}: {e}"
        return report
    memory = compiled.memory_analysis()
    report.temp = memory.temp_size_in_bytes
    report.arguments = memory.argument_size_in_bytes
    report.outputs = memory.output_size_in_bytes
    report.operations = _analyse(compiled.as_text(), dump, report.chip)
    return report


def _worker(topology: str) -> None:
    jobs = [Job(**job) for job in json.load(sys.stdin)]
    with tempfile.TemporaryDirectory(prefix="tpu_report_") as folder:
        dump = pathlib.Path(folder)
        tpu_dump.prepare(dump)
        out = []
        with contextlib.redirect_stdout(sys.stderr):
            for job in jobs:
                out.append(dataclasses.asdict(_report(job, topology, dump)))
                for path in dump.iterdir():
                    path.unlink()
    print(json.dumps(out))


if __name__ == "__main__":
    _worker(sys.argv[1])
