"""Static report of the ops compiled for TPUs, without a TPU: compiled, static schedule, never measured.

    uv run --with libtpu python -m benchmarks.tpu_static                          # all gates, T 8192, v6e
    uv run --with libtpu python -m benchmarks.tpu_static --topologies v5e:2x2 tpu7x:2x2x1 --gates kda_softplus
    uv run --with libtpu python -m benchmarks.tpu_static --topologies v5e:2x2 tpu7x:2x2x1 --gates delta
    uv run --with libtpu python -m benchmarks.tpu_static --check                  # against the stored table
    uv run --with libtpu python -m benchmarks.tpu_static --update                 # rewrites it

A row for every Pallas call, with counts of one call, and one for the other XLA operations added up. libtpu's
schedule is replayed, see `benchmarks.tpu_schedule`:

  issue    bundles with instructions, all that the final program holds: the least time the units can take
  cycles   and those in which the compiler expects to wait for a result: what chains of matrix products cost
  spills   vector registers stored to and loaded from VMEM, as instructions in the code (not times executed)
  VMEM     a kernel's scratch and block buffers
  HBM      bytes of DMAs; a block that stays is not fetched again. What XLA keeps in VMEM between operations,
           or fetches there ahead of a kernel (in "the program"), is not the kernel's
  ms       the slower of cycles and HBM traffic at the chip's rates, operation by operation; "issue ms": of
           issue and HBM traffic

Not seen: DMA latency, the start of an operation (about 1 us each), instruction fetch, collectives,
``dma.general`` (in a few XLA gathers), and what `tpu_schedule` names. A row with a guess in it has a star;
--notes says which. Of v5p's two cores the first is replayed. `--check` fails where a figure is over 5 % worse
than stored.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator

import rich.console
import rich.table
import tyro

from benchmarks import tpu_report
from benchmarks.tpu_report import Job, Operation, Report

TABLE = pathlib.Path(__file__).parent / "data" / "tpu_static.json"
GATES = ("delta", "gated", "kda_safe", "kda_softplus")
TOLERANCE = 0.05  # of a figure: libtpu's scheduler moves by a few bundles with any change
SPILLS = 16  # that many more spill instructions are within tolerance
CHECK_TOPOLOGIES = ("v5e:2x2", "v6e:2x2", "tpu7x:2x2x1")
COLUMNS = (
    *("calls", "steps", "issue /step", "cycles /step", "issue", "cycles"),
    *("spills /fills", "VMEM MiB", "HBM in MB", "out MB", "issue ms", "ms"),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile."""

    gates: tuple[str, ...] = GATES
    topologies: tuple[str, ...] = ("v6e:2x2",)
    """Of v5e:2x2, v5p:2x2x1, v6e:2x2, tpu7x:2x2x1."""
    B: int = 1
    T: int = 8192
    H: int = 32
    HV: int | None = None
    """Value heads; H if None."""
    K: int = 128
    V: int = 128
    dtype: str = "bfloat16"
    passes: tuple[str, ...] = ("fwd", "fwd_bwd")
    implementation: str = "pallas"
    make: str | None = None
    """Instead of the ops: "module:function" or "file.py:function" returning (function, arguments)."""
    json: str | None = None
    """File for the full numbers."""
    xla: int = 0
    """Rows for so many of the longest XLA operations."""
    notes: bool = False
    """Print what the replay had to guess."""
    check: bool = False
    update: bool = False


def jobs(options: Options) -> list[Job]:
    """The programs that the options name."""
    if options.make:
        return [Job(options.make.rpartition(":")[2], options.make)]
    out = []
    for gate in options.gates:
        for name in options.passes:
            o = options
            shape = dict(B=o.B, T=o.T, H=o.H, HV=o.HV or o.H, K=o.K, V=o.V, dtype=o.dtype)
            label = f"{gate} {o.B}x{o.T}x{o.H}" + (f"({o.HV})" if o.HV not in (None, o.H) else "")
            label += f" {o.K}/{o.V} {o.dtype} {name}"
            out.append(
                Job(
                    label,
                    "benchmarks.tpu_report:op",
                    shape | dict(gate=gate, backward=name == "fwd_bwd", implementation=o.implementation),
                )
            )
    return out


def check_jobs(topology: str) -> list[Job]:
    """The programs of the stored table: most on v6e, the extremes elsewhere (5 to 20 s of compiling each)."""
    small = Options(T=1024, H=4, passes=("fwd_bwd",))
    variants = [dataclasses.replace(small, gates=("delta", "kda_softplus"))]
    if topology.startswith("v6e"):
        variants += [
            dataclasses.replace(small, gates=("gated",), HV=8),
            dataclasses.replace(small, gates=("kda_safe",)),
            dataclasses.replace(small, gates=("kda_softplus",), passes=("fwd",)),
        ]
    return [job for options in variants for job in jobs(options)]


def rows(report: Report, most_xla: int) -> Iterator[tuple[str, ...]]:
    """Cells of the table."""

    def cells(name: str, o: Operation | None, many: list[Operation]) -> tuple[str, ...]:
        total = lambda f: sum(getattr(x, f) * x.calls for x in many)  # noqa: E731
        one = lambda f: getattr(o, f) if o else total(f)  # noqa: E731
        static = lambda f: sum(getattr(x, f) for x in many)  # noqa: E731
        return (
            name + (" *" if any(x.notes for x in many) else ""),
            str(sum(x.calls for x in many)),
            f"{o.grid_steps}" if o and o.pallas else "",
            f"{o.issue / o.grid_steps:.0f}" if o and o.pallas else "",
            f"{o.cycles / o.grid_steps:.0f}" if o and o.pallas else "",
            f"{one('issue'):,}",
            f"{one('cycles'):,}",
            f"{static('spills')}/{static('fills')}",
            f"{max((x.vmem for x in many), default=0) / 2**20:.1f}",
            f"{one('hbm_read') / 1e6:.1f}",
            f"{one('hbm_write') / 1e6:.1f}",
            f"{sum(x.ms(report.chip, issue_only=True) for x in many):.3f}",
            f"{sum(x.ms(report.chip) for x in many):.3f}",
        )

    for o in sorted(report.pallas, key=lambda o: -o.ms(report.chip)):
        yield cells(o.name, o, [o])
    for o in sorted(report.xla, key=lambda o: -o.ms(report.chip))[:most_xla]:
        yield cells(f"({o.name})", o, [o])
    yield cells(f"XLA, {len(report.xla)} operations", None, report.xla)
    yield cells("total", None, report.operations)


def show(console: rich.console.Console, reports: list[Report], topology: str, options: Options) -> None:
    """Prints the table of a topology."""
    chip = tpu_report.CHIPS[topology.partition(":")[0]]
    table = rich.table.Table(
        title=f"{topology}, compiled, static schedule; {chip.ghz} GHz, {chip.hbm_gbps:.0f} GB/s",
        title_justify="left",
    )
    for column in ("program", "operation"):
        table.add_column(column, no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for report in reports:
        if report.error:
            table.add_row(report.name, "FAILED, see below")
            continue
        lines = list(rows(report, options.xla))
        for i, line in enumerate(lines):
            title = report.name if i == 0 else f"  temp {report.temp / 2**20:.1f} MiB" if i == 1 else ""
            table.add_row(title, *line, end_section=i == len(lines) - 1)
    console.print(table)
    for report in reports if options.notes else []:
        for o in report.operations:
            for note in o.notes:
                console.print(f"{report.name}: {o.name}: {note}", highlight=False)
    for report in reports:
        if report.error:
            console.print(f"{report.name}: {report.error}", highlight=False, markup=False)


def figures(report: Report) -> dict[str, int]:
    """What the stored table holds."""
    return {
        "issue": report.total("issue"),
        "cycles": report.total("cycles"),
        "spills": sum(o.spills + o.fills for o in report.operations),
        "vmem": max((o.vmem for o in report.operations), default=0),
        "hbm": report.total("hbm_read") + report.total("hbm_write"),
        "temp": report.temp,
    }


def compare(stored: dict[str, int], now: dict[str, int]) -> tuple[list[str], list[str]]:
    """(figures that are worse than the tolerance allows, figures that are better), in words."""
    worse, better = [], []
    for name, before in stored.items():
        slack = max(before * TOLERANCE, SPILLS if name == "spills" else 0)
        change = f"{name} {before:,} -> {now[name]:,}"
        if now[name] > before + slack:
            worse.append(change)
        elif now[name] < before - slack:
            better.append(change)
    return worse, better


def check(topologies: Iterable[str] = CHECK_TOPOLOGIES) -> tuple[list[str], list[str]]:
    """The stored table against this tree: (worse, better), a line for each figure."""
    stored = json.loads(TABLE.read_text())
    worse: list[str] = []
    better: list[str] = []
    for topology in topologies:
        for report in tpu_report.reports(check_jobs(topology), topology):
            key = f"{topology} {report.name}"
            if report.error:
                worse.append(f"{key}: {report.error}")
            elif key not in stored:
                worse.append(f"{key}: not in {TABLE.name}, run --update")
            else:
                up, down = compare(stored[key], figures(report))
                worse += [f"{key}: {change}" for change in up]
                better += [f"{key}: {change}" for change in down]
    return worse, better


def update() -> int:
    """Writes the table, unless a program does not compile."""
    table = {}
    for topology in CHECK_TOPOLOGIES:
        for report in tpu_report.reports(check_jobs(topology), topology):
            if report.error:
                print(f"{topology} {report.name}: {report.error}")
                return 1
            table[f"{topology} {report.name}"] = figures(report)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(f"wrote {len(table)} programs to {TABLE}")
    return 0


def main(options: Options) -> int:
    """Prints, checks or stores."""
    if options.update:
        return update()
    if options.check:
        worse, better = check()
        for x in worse:
            print("worse: ", x)
        for x in better:
            print("better, --update keeps it: ", x)
        print("static schedules:", "WORSE than stored" if worse else "ok")
        return 1 if worse else 0
    console = rich.console.Console(width=None if rich.console.Console().is_terminal else 200)
    everything = []
    for topology in options.topologies:
        found = tpu_report.reports(jobs(options), topology)
        show(console, found, topology, options)
        everything += found
    if options.json:
        plain = [dataclasses.asdict(r) for r in everything]
        pathlib.Path(options.json).write_text(json.dumps(plain, indent=1))
    return 1 if any(r.error for r in everything) else 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
