"""A sharded run has the curve of one device, and goes on along it on another mesh."""

import json
import subprocess
import sys

import pytest

from tests.train.train_common import TINY, environment, losses, write_text
from train.metrics import read_metrics

OTHERS = {
    "data 4, fsdp 2": ["--mesh.data", "4", "--mesh.fsdp", "2"],
    "data 2, tensor 4": ["--mesh.data", "2", "--mesh.tensor", "4"],
    "data 2, context 4": ["--mesh.data", "2", "--mesh.context", "4"],
}
# Reductions over devices add in another order on another mesh.
RTOL = 1e-5

# All runs in one process: JAX is imported once.
RUNS = """
import json, shutil, sys
from pathlib import Path
from train.__main__ import main

directory, common, others = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
one = [*common, "--mesh.data", "1", "--run-dir", str(directory / "one")]
assert main([*one, "--checkpoint.every", "6"]) == 0
whole = [*common, "--mesh.data", "1", "--mesh.fsdp", "8", "--run-dir", str(directory / "whole")]
assert main(whole) == 0
shutil.rmtree(directory / "whole" / "checkpoints" / "6")
for name, mesh in others.items():
    shutil.copytree(directory / "whole", directory / name)
    assert main([*common, *mesh, "--run-dir", str(directory / name)]) == 0
"""


def evaluated(directory):
    """The last step's evaluation."""
    return read_metrics(directory / "metrics.jsonl")[-1]["eval_loss"]


def gates(directory):
    """What the last step told of every layer's gates."""
    line = read_metrics(directory / "metrics.jsonl")[-1]
    return {name: value for name, value in line.items() if name.startswith("gates/")}


@pytest.mark.parametrize(
    "optimizer, others",
    [
        ("muon", ["data 2, tensor 4"]),  # it has AdamW within it
        *(pytest.param(name, [*OTHERS], marks=pytest.mark.slow) for name in ("adamw", "muon", "adafactor")),
    ],
)
def test_a_run_has_one_devices_curve_and_continues_it_on_other_meshes(tmp_path, optimizer, others):
    text = write_text(tmp_path / "text.jsonl")
    common = [
        *TINY,
        "--data.files",
        str(text),
        "--data.batch-size",
        "16",
        "--optimizer.accumulate",
        "2",
        "--preset",
        "tiny_kda",
        "--steps",
        "6",
        "--model.num-heads",
        "4",
    ]
    common += ["--checkpoint.every", "3", "--checkpoint.keep", "9", "--eval.batches", "1"]
    common += ["--optimizer.name", optimizer, "--optimizer.weight-decay", "0.3"]
    common += ["--log.gates-every", "6" if len(others) > 1 else "0"]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            RUNS,
            str(tmp_path),
            json.dumps(common),
            json.dumps({name: OTHERS[name] for name in others}),
        ],
        env=environment(devices=8),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("at step 3") == len(others)
    one, whole = losses(tmp_path / "one"), losses(tmp_path / "whole")
    assert whole[6] < whole[1]
    for name in ("whole", *others):
        found = losses(tmp_path / name)
        assert list(found) == list(one) == list(range(1, 7))
        assert list(found.values()) == pytest.approx(list(one.values()), rel=RTOL), name
        assert evaluated(tmp_path / name) == pytest.approx(evaluated(tmp_path / "one"), rel=RTOL), name
        assert gates(tmp_path / name) == pytest.approx(gates(tmp_path / "whole"), rel=1e-4), name
