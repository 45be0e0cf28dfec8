"""A run may be killed at any moment: run again, its losses are those of a run left alone."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.train.train_common import TINY, command, environment, losses, run, write_text

STEPS = 90


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Losses of a run left alone, and the arguments of it."""
    folder = tmp_path_factory.mktemp("kill")
    text = write_text(folder / "text.jsonl")
    # The default backend: its resumption is the one that most runs rely on.
    args = [*TINY, "--model.implementation", "None"]
    args += ["--data.files", text, "--steps", STEPS, "--checkpoint.every", "3", "--eval.every", "30"]
    done = run(*args, "--run-dir", folder / "run")
    assert done.returncode == 0, done.stderr
    return losses(folder / "run"), args


def start(undisturbed, directory: Path) -> subprocess.Popen:
    _, args = undisturbed
    return subprocess.Popen(
        command(*args, "--run-dir", directory),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, process, what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"ended before {what}: {process.stdout.read()}"
        assert time.monotonic() < deadline, what
        time.sleep(0.002)  # leaves the processor to it


def lines(directory: Path) -> int:
    file = directory / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def unfinished_saves(directory: Path) -> list[Path]:
    folder = directory / "checkpoints"
    return [p for p in folder.iterdir() if "tmp" in p.name] if folder.exists() else []


def test_killed_at_a_random_moment_and_during_a_save_then_told_to_stop(undisturbed, tmp_path):
    rng = random.Random()  # another moment on every run of the tests
    process = start(undisturbed, tmp_path)
    moment = rng.randint(1, STEPS // 3)
    wait_for(lambda: lines(tmp_path) >= moment, process, f"step {moment}")
    time.sleep(rng.uniform(0, 0.05))
    process.kill(), process.wait()

    for _ in range(5):  # a save takes tens of milliseconds: it can be over before the signal arrives
        process, resumed = start(undisturbed, tmp_path), lines(tmp_path)
        wait_for(lambda resumed=resumed: lines(tmp_path) != resumed, process, "resuming")
        wait_for(lambda: unfinished_saves(tmp_path), process, "a save")
        process.kill(), process.wait()
        if unfinished_saves(tmp_path):
            break
    else:
        pytest.fail("no save was caught in the act")

    last = 0
    for number in (signal.SIGTERM, signal.SIGINT):  # the second stops the run that the first one's resumes
        process, resumed = start(undisturbed, tmp_path), lines(tmp_path)
        wait_for(lambda resumed=resumed: lines(tmp_path) != resumed, process, "resuming")
        process.send_signal(number)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 128 + number, out
        assert "cannot be read" not in out  # a killed save never looks complete
        assert not last or f"at step {last}" in out
        last = max(losses(tmp_path))
        assert f"stopped by {number.name} after step {last} of {STEPS}; saved" in out
        assert (tmp_path / "checkpoints" / str(last)).is_dir()

    expected, args = undisturbed
    done = run(*args, "--run-dir", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"at step {last}" in done.stdout
    assert losses(tmp_path) == expected
    assert not unfinished_saves(tmp_path)
