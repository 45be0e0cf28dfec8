"""What is made of a run's checkpoints: exported weights, and their evaluation."""

import json
import math
import re
import shutil

import numpy as np
import pytest

from deltajax.models import load_weights
from tests.train.test_train_checkpoint import damage
from tests.train.train_common import TINY, write_text
from train import evaluate, export
from train.__main__ import main
from train.metrics import read_metrics
from train.saved import open_saved


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps, evaluated after each, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("saved")
    text = write_text(folder / "text.jsonl")
    args = [*TINY, "--data.files", str(text), "--steps", "3", "--checkpoint.every", "1", "--eval.every", "1"]
    assert main([*args, "--checkpoint.keep", "9", "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


def test_exported_weights_are_the_checkpoints_and_give_its_loss(finished, tmp_path, capsys):
    out = tmp_path / "weights.safetensors"
    assert export.main([str(finished), "--out", str(out), "--step", "2"]) == 0
    assert f"{out}: 29,026 parameters of step 2" in capsys.readouterr().out
    assert json.loads((tmp_path / "weights.json").read_text())["hidden_size"] == 32
    model, params = load_weights(out), open_saved(finished, 2).params()
    np.testing.assert_array_equal(model.embedding[...], params["embedding"])
    kernel = params["groups"][0]["blocks"][0]["mixer"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(model.groups[0].blocks[0].mixer.q_proj.kernel[...], kernel)
    other = open_saved(finished).params()
    assert not np.array_equal(other["embedding"], params["embedding"])


def test_evaluation_of_a_checkpoint_is_the_runs_own(finished, capsys):
    for step, line in enumerate(read_metrics(finished / "metrics.jsonl"), start=1):
        assert evaluate.main([str(finished), "--step", str(step), "--mesh.data", "1"]) == 0
        out = capsys.readouterr().out
        loss, perplexity = map(float, re.search(r"loss (\S+) nats.* perplexity (\S+) over", out).groups())
        assert out.startswith(f"step {step}: ")
        assert loss == pytest.approx(line["eval_loss"], abs=1e-4)
        assert perplexity == pytest.approx(math.exp(line["eval_loss"]), abs=1e-3)


def test_evaluation_on_other_text_takes_all_of_it(finished, tmp_path, capsys):
    text = "alpha beta gamma"
    (tmp_path / "other.txt").write_text(text)
    assert evaluate.main([str(finished), "--files", str(tmp_path / "other.txt"), "--batch-size", "1"]) == 0
    assert f"over {len(text) + 1} tokens" in capsys.readouterr().out  # and the end of the document


@pytest.mark.parametrize(
    "command", [evaluate.main, lambda args: export.main([*args, "--out", "w.safetensors"])]
)
def test_what_cannot_be_read_is_named(finished, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    assert command([str(tmp_path / "none")]) == 2
    assert f"argument RUN-DIR: {tmp_path / 'none'} holds no checkpoints" in capsys.readouterr().err
    assert command([str(finished), "--step", "7"]) == 2
    assert "argument --step: " in (err := capsys.readouterr().err) and "steps [1, 2, 3], got 7" in err
    shutil.copytree(finished, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "3"
    saved = json.loads((newest / "config" / "metadata").read_text())
    saved["params_digest"] += 1
    (newest / "config" / "metadata").write_text(json.dumps(saved))
    assert command([str(tmp_path / "run")]) == 1
    assert "checkpoints/3 cannot be read" in (err := capsys.readouterr().err) and "their checksum" in err
    damage(newest, "state", "removed")
    assert command([str(tmp_path / "run")]) == 1
    assert "checkpoints/3 cannot be read" in (err := capsys.readouterr().err) and "--step" in err
    assert [p.name for p in tmp_path.iterdir()] == ["run"]  # nothing was written


def test_options_that_cannot_work_are_named(finished, tmp_path, capsys):
    for args, expected in {
        ("--batches", "0"): "argument --batches: must be positive",
        ("--batch-size", "-1"): "argument --batch-size: must be positive",
        ("--mesh.fsdp", "64"): "needs 64 devices",
        ("--mesh.context", "3"): "argument --mesh.context: 3 does not divide",
        ("--files", "/nowhere/*.txt"): "data file not found",
    }.items():
        assert evaluate.main([str(finished), *args]) == 2
        assert expected in capsys.readouterr().err
    assert export.main([str(finished), "--out", str(tmp_path / "w.bin")]) == 2
    assert "argument --out: must be FILE.safetensors" in capsys.readouterr().err
