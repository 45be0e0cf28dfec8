"""Two real processes of four CPU devices each, joined by jax.distributed (Gloo), train one model."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.train_common import TINY, command, environment, losses, run, write_text

EIGHT = [*TINY, "--data.batch-size", "8", "--mesh.data", "1", "--mesh.fsdp", "8", "--checkpoint.every", "5"]
# Bit for bit the same rate at any length: the start of a fall would round otherwise than the peak.
EIGHT += ["--optimizer.schedule", "wsd", "--optimizer.final-fraction", "1"]
LOST_AFTER = 10


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_pair(*args, slurm: bool = False) -> list[subprocess.Popen]:
    """Both processes, told of each other by options or by what Slurm puts into the environment."""
    port, pair = free_port(), []
    for i in range(2):
        join: list = ["--mesh.distributed", "--mesh.lost-after", LOST_AFTER]
        env = environment(devices=4)
        if slurm:
            env |= {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
            env |= {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "JAX_COORDINATOR_PORT": str(port)}
        else:
            join += ["--mesh.coordinator", f"127.0.0.1:{port}", "--mesh.num-processes", "2"]
            join += ["--mesh.process-id", i]
        pair.append(
            subprocess.Popen(
                command(*args, *join),
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return pair


def ends(pair: list[subprocess.Popen], within: float = 300) -> list[str]:
    """What each printed, once both have ended."""
    try:
        return [process.communicate(timeout=within)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()


def run_pair(*args) -> list[str]:
    pair = start_pair(*args)
    outputs = ends(pair)
    assert [process.returncode for process in pair] == [0, 0], "\n".join(outputs)
    return outputs


def wait_for_step(step: int, directory: Path, pair: list[subprocess.Popen]) -> None:
    """Until metrics.jsonl has the step's line, with the next steps under way."""
    deadline = time.monotonic() + 240
    while step not in seen(directory):
        assert all(p.poll() is None for p in pair), "\n".join(ends(pair))
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.02)


def seen(directory: Path) -> dict[int, float]:
    return losses(directory) if (directory / "metrics.jsonl").exists() else {}


def checkpoint_steps(directory: Path) -> list[int]:
    return sorted(int(p.name) for p in (directory / "checkpoints").iterdir() if p.name.isdigit())


def test_a_killed_process_ends_the_other_and_a_signal_to_one_stops_both(tmp_path):
    text, directory = write_text(tmp_path / "text.jsonl"), tmp_path / "run"
    args = [*EIGHT, "--data.files", text, "--run-dir", directory, "--steps", "100000"]
    pair = start_pair(*args)
    wait_for_step(8, directory, pair)
    pair[1].kill()
    survivor, killed = ends(pair, within=LOST_AFTER + 30)
    assert pair[0].returncode not in (0, None)
    assert "error: process 0 of 2" in (last := survivor.strip().splitlines()[-1]), survivor
    assert "in step" in last and "start all processes again with the same command" in last
    assert killed.strip().splitlines()[-1].startswith("error: process 1 of 2 ended in step")
    before = losses(directory)

    pair = start_pair(*args, slurm=True)
    wait_for_step(max(before) + 2, directory, pair)
    pair[1].terminate()
    asked = time.monotonic()
    first, second = ends(pair)
    assert time.monotonic() - asked < 25  # 30 s are the shortest grace period of the common schedulers
    assert [p.returncode for p in pair] == [128 + signal.SIGTERM] * 2, first + second
    last_step = max(losses(directory))
    assert f"stopped by SIGTERM after step {last_step} of 100000; saved" in first
    assert "stopped by" not in second and "parameters on" not in second  # only process 0 prints
    assert checkpoint_steps(directory)[-1] == last_step
    resumed = losses(directory)
    assert "at step 5" in first and before == {step: resumed[step] for step in before}


@pytest.mark.slow  # ten processes, each of which compiles
def test_lost_and_stopped_processes_leave_the_curve_as_it_was(tmp_path):
    text = write_text(tmp_path / "text.jsonl")
    args = [*EIGHT, "--data.files", text, "--steps", "60"]
    run_pair(*args, "--run-dir", whole := tmp_path / "whole")
    args += ["--run-dir", parts := tmp_path / "parts"]

    pair = start_pair(*args)  # the process that coordinates is killed
    wait_for_step(7, parts, pair)
    pair[0].kill()
    outputs = ends(pair, within=LOST_AFTER + 30)
    assert pair[1].returncode not in (0, None)
    assert "error: process 1 of 2" in outputs[1].strip().splitlines()[-1]

    pair = start_pair(*args)  # a process hangs: its connections stay open
    wait_for_step(12, parts, pair)
    pair[1].send_signal(signal.SIGSTOP)
    lost = time.monotonic()
    pair[0].wait(timeout=LOST_AFTER + 30)
    assert time.monotonic() - lost < LOST_AFTER + 30
    pair[1].kill()
    last = ends(pair)[0].strip().splitlines()[-1]
    assert last.startswith("error: process 0 of 2 ended in step")

    pair = start_pair(*args)  # both are asked to stop
    wait_for_step(22, parts, pair)
    for process in pair:
        process.terminate()
    ends(pair)
    assert [p.returncode for p in pair] == [128 + signal.SIGTERM] * 2

    # The newest checkpoint is cut short: the one before it serves.
    newest, before = checkpoint_steps(parts)[-1], checkpoint_steps(parts)[-2]
    files = [f for f in (parts / "checkpoints" / str(newest) / "state").rglob("*") if f.is_file()]
    largest = max(files, key=lambda f: f.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    first, _ = run_pair(*args)
    assert f"checkpoints/{newest} cannot be read" in first and f"at step {before}" in first
    assert losses(parts) == losses(whole)


@pytest.mark.slow  # six processes, each of which compiles
def test_two_processes_train_save_and_resume_as_one_run(tmp_path):
    text = write_text(tmp_path / "text.jsonl")
    args = [*EIGHT, "--data.files", text, "--checkpoint.every", "2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first, second = run_pair(*args, "--run-dir", whole, "--steps", "6")
    assert "eval loss" in first and "eval loss" not in second  # only process 0 prints
    run_pair(*args, "--run-dir", parts, "--steps", "4")
    shutil.copytree(parts, alone := tmp_path / "alone")
    first, _ = run_pair(*args, "--run-dir", parts, "--steps", "6")
    assert "at step 4" in first
    assert losses(parts) == losses(whole)
    # One process goes on with the batches of both.
    done = run(*args, "--run-dir", alone, "--steps", "6", devices=8)
    assert done.returncode == 0 and "at step 4" in done.stdout, done.stderr
    assert losses(alone) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.slow  # three processes, each of which compiles
def test_processes_that_hold_parts_of_the_same_rows_read_the_same_rows(tmp_path):
    text = write_text(tmp_path / "text.jsonl")
    args = [*EIGHT, "--data.files", text, "--steps", "4", "--mesh.data", "1", "--mesh.fsdp", "1"]
    args += ["--mesh.context", "8", "--eval.every", "2"]
    run_pair(*args, "--run-dir", tmp_path / "pair")
    done = run(*args, "--run-dir", tmp_path / "alone", devices=8)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "pair") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)


def test_a_process_that_finds_no_other_says_so(tmp_path):
    join = ["--mesh.distributed", "--mesh.num-processes", "2", "--mesh.process-id", "1"]
    alone = ["--mesh.coordinator", f"127.0.0.1:{free_port()}", "--mesh.join-within", "1"]
    done = run(*join, *alone, "--run-dir", tmp_path / "run")
    assert done.returncode not in (0, None)
    assert (last := done.stderr.strip().splitlines()[-1]).startswith("error: this process could not join")
    assert alone[1] in last and "within 1 s" in last


# One process cannot read its part of the newest checkpoint, and the other has no complaint.
ONE_SIDED = """
import os, sys
from pathlib import Path
import grain, jax, jax.numpy as jnp, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
from train.checkpoint import Checkpoints
from train.step import TrainState

directory, port, me = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, me)
mesh = jax.make_mesh((2,), ("fsdp",))
numbers = np.random.default_rng(0).normal(size=1_000_000).astype(np.float32)  # too many to lie in an index

def place(x, spec):
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])

def state(step):
    return TrainState(place(np.array(step), P()), {"w": place(numbers + step, P("fsdp"))}, ())

checkpoints, data = Checkpoints(directory, 2), iter(grain.MapDataset.range(100).to_iter_dataset())
for step in (1, 2):
    next(data)
    checkpoints.save(step, state(step), data, {"model": {}}, None)
checkpoints.wait()
multihost_utils.sync_global_devices("saved")
if me == 0:
    files = [f for f in (directory / "2" / "state" / "ocdbt.process_1").rglob("*") if f.is_file()]
    largest = max(files, key=lambda f: f.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
multihost_utils.sync_global_devices("cut")
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
restored = checkpoints.restore_newest(abstract, data, {"model": {}}, print)
assert int(restored.state.step) == 1 and checkpoints.steps() == [1] and next(data) == 1
mine = restored.state.params["w"].addressable_shards[0].data
np.testing.assert_array_equal(mine, numbers.reshape(2, -1)[me] + 1)
checkpoints.close()
"""


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_both(tmp_path):
    port = free_port()
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_SIDED, str(tmp_path / "c"), str(port), str(i)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = ends(pair, within=120)
    assert [p.returncode for p in pair] == [0, 0], "\n".join(outputs)
    assert "another process cannot read its part" in outputs[0] and "cannot be read" in outputs[1]
