"""Two real processes, joined by jax.distributed, train one model."""

import shutil
import socket
import subprocess

import pytest

from tests.train.train_common import TINY, command, environment, losses, run, write_text


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_pair(*args) -> list[str]:
    """Runs both processes to the end; returns what each printed."""
    join = [
        "--mesh.distributed",
        "--mesh.coordinator",
        f"127.0.0.1:{free_port()}",
        "--mesh.num-processes",
        "2",
    ]
    pair = [
        subprocess.Popen(
            command(*args, *join, "--mesh.process-id", i),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], "\n".join(outputs)
    return outputs


@pytest.mark.slow  # six processes, each of which compiles
def test_two_processes_train_save_and_resume_as_one_run(tmp_path):
    text = write_text(tmp_path / "text.jsonl")
    args = [*TINY, "--data.files", text, "--checkpoint.every", "2", "--mesh.data", "1", "--mesh.fsdp", "2"]
    # Bit for bit the same rate at any length: the start of a fall would round otherwise than the peak.
    args += ["--optimizer.schedule", "wsd", "--optimizer.final-fraction", "1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first, second = run_pair(*args, "--run-dir", whole, "--steps", "6")
    assert "eval loss" in first and "eval loss" not in second  # only process 0 prints
    run_pair(*args, "--run-dir", parts, "--steps", "4")
    shutil.copytree(parts, alone := tmp_path / "alone")
    first, _ = run_pair(*args, "--run-dir", parts, "--steps", "6")
    assert "at step 4" in first
    assert losses(parts) == losses(whole)
    # One process goes on with the batches of both.
    done = run(*args, "--run-dir", alone, "--steps", "6", devices=2)
    assert done.returncode == 0 and "at step 4" in done.stdout, done.stderr
    assert losses(alone) == pytest.approx(losses(whole), rel=1e-5)
