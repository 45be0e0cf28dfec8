"""Weak scaling of whole training steps over the GPUs of a host: fsdp, and context parallelism.

    python -m benchmarks.scaling --devices 1 2 4                  # on a host of 4 GPUs
    python -m benchmarks.scaling --presets tiny_delta_net --devices 1 2 --batch 2 --seq-len 64 \\
        --context-len 64 --remat none --context-remat none --check

Every device has the same number of tokens: ``--batch`` rows of ``--seq-len`` with parameters split over all
devices, and with context parallelism its share of one row of ``--context-len`` tokens (131,072 over 4 devices
are 32,768 a device). One more run on a single device accumulates the gradients of the largest fsdp run's
batch, whose losses that run must have. Each run is `benchmarks.train_step` in a process of its own; runs that
fit beside one another on the devices go at once. ``--check`` fails where a run does or where these losses
differ by more than ``--tolerance``.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro

from train.config import Remat


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run."""

    presets: tuple[str, ...] = ("delta_net_1p3b", "kda_hybrid_1p3b")
    devices: tuple[int, ...] = (1, 2, 4)
    batch: int = 2
    """Rows a device."""
    seq_len: int = 8192
    context_devices: tuple[int, ...] = (4,)
    context_len: int = 131072
    """Tokens of one row over the largest number of ``context_devices``; 0 leaves the runs out."""
    remat: Remat = "save_dots"
    context_remat: Remat = "save_delta_rule"
    steps: int = 8
    tolerance: float = 2e-2
    """Of losses, relative, in the first half of the steps: repeating one batch makes the later ones tiny."""
    timeout: float = 200.0
    """Seconds that a run may take."""
    check: bool = False
    json: str | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """One process."""

    preset: str
    kind: str
    """"fsdp", "context" or "accumulate"."""
    devices: int
    arguments: tuple[str, ...]


def runs(options: Options) -> list[Run]:
    """All runs, those on most devices first."""
    found = []
    for preset in options.presets:
        common = ("--preset", preset, "--steps", str(options.steps), "--no-scan-layers", "--collectives")
        rows = ("--seq-len", str(options.seq_len), "--remat", options.remat)
        for n in options.devices:
            size = ("--batch", str(options.batch * n), "--fsdp", str(n))
            found.append(Run(preset, "fsdp", n, (*common, *rows, *size)))
        if (most := max(options.devices, default=1)) > 1:
            size = ("--batch", str(options.batch * most), "--accumulate", str(most))
            found.append(Run(preset, "accumulate", 1, (*common, *rows, *size)))
        if options.context_len:
            share = options.context_len // max(options.context_devices)
            for n in dict.fromkeys((1, *options.context_devices)):
                size = ("--batch", "1", "--seq-len", str(share * n), "--context", str(n))
                found.append(Run(preset, "context", n, (*common, *size, "--remat", options.context_remat)))
    return sorted(found, key=lambda run: -run.devices)


def waves(todo: list[Run], devices: int) -> list[list[Run]]:
    """The runs in groups that fit on the devices side by side, the largest first."""
    groups = []
    left = list(todo)
    while left:
        group, free = [], devices
        for run in list(left):
            if run.devices <= free:
                group.append(run)
                left.remove(run)
                free -= run.devices
        if not group:
            raise ValueError(f"devices {left[0].devices}: expected at most {devices}, as there are")
        groups.append(group)
    return groups


def start(run: Run, first: int, gpus: list[str] | None, file: Path) -> subprocess.Popen:
    """Starts a run on devices ``first`` and following, or on host devices."""
    environment = dict(os.environ)
    if gpus is None:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={run.devices}"
    else:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + run.devices])
    command = [sys.executable, "-m", "benchmarks.train_step", *run.arguments, "--json", str(file)]
    return subprocess.Popen(command, env=environment)


def measure(options: Options, folder: Path) -> list[tuple[Run, dict]]:
    """Runs everything; a run that fails or takes too long has an empty row."""
    gpus = visible_gpus()
    todo = runs(options)
    most = max(run.devices for run in todo) if gpus is None else len(gpus)
    done = []
    for group in waves(todo, most):
        first, started = 0, []
        for run in group:
            file = folder / f"{len(done) + len(started)}.json"
            started.append((run, file, start(run, first, gpus, file)))
            first += run.devices
        for run, file, process in started:
            try:
                process.wait(options.timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            row = json.loads(file.read_text()) if file.exists() else {}
            done.append((run, row))
            if options.json:
                with open(options.json, "a") as f:
                    f.write(json.dumps({"kind": run.kind, "devices": run.devices, **row}) + "\n")
    return done


def visible_gpus() -> list[str] | None:
    """The host's NVIDIA GPUs, without starting JAX on them; None without any."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [x for x in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if x] or None
    found = sorted(int(p.name[6:]) for p in Path("/dev").glob("nvidia[0-9]*"))
    return [str(i) for i in range(len(found))] or None


def report(options: Options, done: list[tuple[Run, dict]]) -> bool:
    """Prints the table; whether all is well."""
    ok = True
    print(
        "preset, kind, devices | tokens/s | a device | of one | peak GiB | ms exposed/in collectives, kernels"
    )
    single = {(r.preset, r.kind): row["tokens_per_s"] for r, row in done if row and r.devices == 1}
    for run, row in sorted(done, key=lambda x: (x[0].preset, x[0].kind, x[0].devices)):
        name = f"{run.preset} {run.kind} {run.devices}"
        if not row:
            print(f"{name} | FAILED")
            ok = False
            continue
        each = row["tokens_per_s"] / run.devices
        base = single.get((run.preset, run.kind))
        share = f"{each / base:.3f}" if base else "-"
        times = [row.get(f"{x}_ms") for x in ("exposed", "collectives", "busy")]
        text = "-" if None in times else "{:.1f}/{:.1f}, {:.1f}".format(*times)
        print(f"{name} | {row['tokens_per_s']:,.0f} | {each:,.0f} | {share} | {row['peak_gib']:.1f} | {text}")
    for run, row in done:
        if run.kind != "accumulate" or not row:
            continue
        for other, its in done:
            if other.preset == run.preset and other.kind == "fsdp" and other.devices == max(options.devices):
                half = options.steps // 2
                pairs = list(zip(row["losses"][:half], its.get("losses", [])[:half], strict=False))
                worst = max((abs(a - b) / abs(a) for a, b in pairs), default=float("inf"))
                good = worst <= options.tolerance
                ok &= good
                print(
                    f"{run.preset}: losses of {other.devices} devices and of one, accumulating, differ by "
                    f"{worst:.1e} or less over {len(pairs)} steps: {'ok' if good else 'FAILED'}"
                )
    return ok


def main(options: Options) -> int:
    """Runs everything and prints a table."""
    with tempfile.TemporaryDirectory() as folder:
        done = measure(options, Path(folder))
    ok = report(options, done)
    if options.check:
        print("check:", "ok" if ok else "FAILED")
    return 0 if ok or not options.check else 1


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
