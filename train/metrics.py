"""What a run writes down: metrics.jsonl, TensorBoard events, throughput and model FLOP utilisation."""

import json
import os
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

# Steps that percentiles of their times are of, and which.
_RECENT = 100
_PERCENTILES = (50, 90, 99)

# Dense bf16 peak of one device, TFLOP/s, as JAX names its kind (the vendors' data sheets, without sparsity).
PEAK_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU7x": 1153.5,  # one of a chip's two devices
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.0,
    "NVIDIA B200": 2250.0,
}


def peak_flops(device_kind: str, peak_tflops: float | None = None) -> float | None:
    """Peak FLOP/s of one device: `peak_tflops` if given, else from `PEAK_TFLOPS`, else None."""
    tflops = PEAK_TFLOPS.get(device_kind) if peak_tflops is None else peak_tflops
    return None if tflops is None else tflops * 1e12


class MetricsFile:
    """metrics.jsonl, one JSON object per step, continued where the resumed checkpoint stands.

    Args:
        path: the file; lines of steps after `resumed_step`, and a last line cut short by a crash, go.
        resumed_step: the step training continues from, 0 for a new run.
    """

    def __init__(self, path: Path, resumed_step: int):
        kept = [line for line in read_metrics(path) if line["step"] <= resumed_step] if path.exists() else []
        scratch = path.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(scratch, path)  # a crash here leaves either the old file or the new one
        self._file = open(path, "a", buffering=1)  # noqa: SIM115, closed by close()

    def write(self, line: dict[str, Any]) -> None:
        """Appends one step's numbers; they are with the operating system on return."""
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, up to the first damaged one."""
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or "step" not in line:
            break
        lines.append(line)
    return lines


class Throughput:
    """Tokens per second, MFU and step times since the last call, from wall time.

    What should not count (compilation, evaluation, saving) is left out by the caller's `restart`.

    Args:
        flops_per_token: forward and backward.
        peak: FLOP/s of all devices together, or None where it is not known.
    """

    def __init__(self, flops_per_token: float, peak: float | None):
        self._flops_per_token, self._peak = flops_per_token, peak
        self._time = time.perf_counter()
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def restart(self) -> None:
        """Leaves out the time since the last call."""
        self._time = time.perf_counter()

    def update(self, tokens: float) -> dict[str, float]:
        """`{"tokens_per_second": ..., "mfu": ...}` for tokens processed since the last call.

        "step_seconds" is the time since then, "step_seconds_p50" and so on are percentiles of the last
        hundred: one slow step in twenty hides in a mean.
        """
        now = time.perf_counter()
        seconds = max(now - self._time, 1e-9)
        rate = tokens / seconds
        self._time = now
        self._recent.append(seconds)
        found = {"tokens_per_second": rate, "step_seconds": seconds}
        for percentile, value in zip(_PERCENTILES, np.percentile(self._recent, _PERCENTILES), strict=True):
            found[f"step_seconds_p{percentile}"] = float(value)
        if self._peak is not None:
            found["mfu"] = rate * self._flops_per_token / self._peak
        return found
