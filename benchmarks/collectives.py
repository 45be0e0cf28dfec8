"""How long a step's collectives take and how much of that nothing else hides, from a JAX profile."""

import glob
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

Interval = tuple[float, float]


class Collectives(NamedTuple):
    """Milliseconds of one run on one device, the mean over devices."""

    all: float
    """In collectives, waiting for the other devices included."""
    exposed: float
    """Of these, while no other kernel ran."""
    busy: float
    """In kernels of any kind."""


def measure(run: Callable[[], Any]) -> Collectives | None:
    """Profiles one call of ``run``; None where the profile has no device's kernels (on a CPU)."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        files = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        planes = [plane for f in files for plane in jax.profiler.ProfileData.from_file(f).planes]
        found = [device(plane) for plane in planes if "GPU" in plane.name]
    found = [x for x in found if x.busy]
    return Collectives(*(sum(x) / len(found) for x in zip(*found, strict=True))) if found else None


def device(plane: Any) -> Collectives:
    """Of one device's plane: its kernels lie on lines called streams."""
    events = [e for line in plane.lines if line.name.startswith("Stream") for e in line.events]
    spans = [(e.start_ns, e.start_ns + e.duration_ns, "nccl" in e.name.lower()) for e in events]
    collectives = union((a, b) for a, b, is_collective in spans if is_collective)
    others = union((a, b) for a, b, is_collective in spans if not is_collective)
    everything = length(union([*collectives, *others]))
    return Collectives(length(collectives) / 1e6, (everything - length(others)) / 1e6, everything / 1e6)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint intervals that cover the same points, in order."""
    joined: list[Interval] = []
    for a, b in sorted(intervals):
        if joined and a <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(b, joined[-1][1])
        else:
            joined.append((a, b))
    return joined


def length(intervals: Iterable[Interval]) -> float:
    """Of disjoint intervals."""
    return sum(b - a for a, b in intervals)
