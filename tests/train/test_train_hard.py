"""Hard mini-batches: which are chosen, that a run resumes in the middle of a window, and what it records."""

import json
import shutil

import grain
import numpy as np
import pytest

from tests.train.train_common import TINY, losses, write_text
from train.__main__ import main
from train.data import merge_states
from train.hard import HardBatches
from train.metrics import read_metrics


class Numbers(grain.DatasetIterator):
    """Batches of one token, numbered."""

    def __init__(self):
        super().__init__()
        self.at = 0

    def __next__(self):
        self.at += 1
        return {"tokens": np.array([[self.at - 1]]), "segment_ids": np.ones((1, 1), np.int32)}

    def get_state(self):
        return {"at": self.at, "streams": {}}

    def set_state(self, state):
        self.at = state["at"]


def hardness(batch):  # 0, 1, 2, ... -> an order that is not the batches'
    return float(batch["tokens"][0, 0] * 7 % 10)


def take(hard, count):
    found = []
    for _ in range(count):
        if hard.empty:
            hard.refill(hardness)
        found.append(int(next(hard)["tokens"][0, 0]))
    return found


def test_the_hardest_of_every_window_come_hardest_first():
    hard = HardBatches(Numbers(), window=10, fraction=0.3)
    told = hard.refill(hardness)
    assert take(hard, 3) == [7, 4, 1]  # 49, 28, 7 mod 10
    assert told == {"window_loss": 4.5, "hard_loss": 8.0, "measured_tokens": 10.0}
    assert take(hard, 3) == [17, 14, 11]
    with pytest.raises(RuntimeError, match="refill"):
        next(hard)
    assert take(HardBatches(Numbers(), window=4, fraction=0.01), 2) == [1, 5 + 2]  # one at least


@pytest.mark.parametrize("done", range(7))
def test_a_restored_position_goes_on_with_the_same_batches(done):
    hard = HardBatches(Numbers(), window=10, fraction=0.3)
    take(hard, done)
    state = merge_states([json.loads(json.dumps(hard.get_state()))])
    again = HardBatches(Numbers(), window=10, fraction=0.3)
    again.set_state(state)
    assert again.get_state() == hard.get_state()
    assert take(again, 7) == take(hard, 7)


def test_training_takes_the_hard_ones_and_resumes_to_the_same_curve(tmp_path):
    text, out = write_text(tmp_path / "text.jsonl"), tmp_path / "run"
    args = [*TINY, "--data.files", str(text), "--run-dir", str(out), "--data.hard-window", "6",
            "--data.hard-fraction", "0.5", "--steps", "8", "--checkpoint.every", "4",
            "--log.gates-every", "0", "--log.no-tensorboard"]  # fmt: skip
    assert main(args) == 0
    lines, whole = read_metrics(out / "metrics.jsonl"), losses(out)
    for line in lines:  # steps 1, 4 and 7 begin a window
        assert ("hard_loss" in line) == (line["step"] % 3 == 1)
    assert all(x["hard_loss"] > x["window_loss"] for x in lines if "hard_loss" in x)
    first = lines[0]  # measured and trained on by the same parameters, and the hardest comes first
    assert first["loss"] >= first["hard_loss"] - 1e-5 and first["measured_tokens"] > first["tokens"]

    shutil.rmtree(out / "checkpoints" / "8")  # what is left is step 4, one batch into the second window
    assert main(args) == 0
    assert losses(out) == whole


@pytest.mark.parametrize("args", [["--data.hard-window", "-1"], ["--data.hard-fraction", "0"]])
def test_options_that_cannot_work_are_named(args, tmp_path, capfd):
    assert main([*TINY, "--run-dir", str(tmp_path / "run"), *args]) == 2
    assert args[0] in capfd.readouterr().err
