"""Shared by the tests of training: tiny models, tiny text, and runs in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]

# One layer of width 32 on rows of 64 tokens: a step is compiled in seconds and runs in milliseconds.
TINY = [
    "--model.num-layers", "1", "--model.hidden-size", "32", "--model.num-heads", "1",
    "--model.head-dim", "16", "--model.intermediate-size", "48", "--model.implementation", "scan",
    "--data.seq-len", "64", "--data.batch-size", "4", "--optimizer.warmup-steps", "2",
    "--eval.batches", "2", "--sample.tokens", "0",
]  # fmt: skip


def write_text(path: Path, documents: int = 30, seed: int = 0) -> Path:
    """A JSONL file of `documents` short pseudo-sentences of 20 to 300 bytes."""
    import json

    rng = np.random.default_rng(seed)
    words = ["alpha", "beta", "gamma", "delta", "state", "key", "value", "the", "of", "é"]
    with open(path, "w") as file:
        for _ in range(documents):
            text = " ".join(rng.choice(words, size=int(rng.integers(5, 60))))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def command(*args: str | Path) -> list[str]:
    """The command line of a training process."""
    return [sys.executable, "-m", "train", *map(str, args)]


def environment(devices: int = 1) -> dict[str, str]:
    """Its environment: CPU devices, and the tests' compilation cache (`conftest.py`)."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    flags = os.environ.get("XLA_FLAGS", "")  # compile as quickly as the tests themselves
    env["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}".strip()
    return env


def run(*args: str | Path, devices: int = 1) -> subprocess.CompletedProcess:
    """Trains in a process of its own, to the end."""
    return subprocess.run(
        command(*args), env=environment(devices), capture_output=True, text=True, timeout=300
    )


def losses(directory: Path) -> dict[int, float]:
    """Step -> loss, from a run's metrics.jsonl; every step may appear once only."""
    lines = read_metrics(directory / "metrics.jsonl")
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: line["loss"] for line in lines}
