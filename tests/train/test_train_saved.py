"""What is made of a run's checkpoints: exported weights, and their evaluation."""

import json
import math
import re
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from deltajax import generate
from deltajax.models import load_weights
from deltajax.models.weights import read_about, tokenizer_path
from deltajax.tokenizer import ByteTokenizer, FileTokenizer
from tests.train.test_train_checkpoint import damage
from tests.train.train_common import TINY, write_text
from train import evaluate, export
from train.__main__ import main
from train.config import DataConfig, SampleConfig
from train.documents import DataError
from train.metrics import read_metrics
from train.mixture import tokenizer_of
from train.sample import sample_text
from train.saved import open_saved


def write_tokenizer(path):
    """A tokenizer of a few words, one of which ends documents."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "end", "alpha", "beta"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(path))
    return path


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


def test_a_run_is_exported_and_generates_text(finished, tmp_path, capsys):
    assert generate.main(["--model", str(finished), "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert f"{finished} is a training run" in error and f"python -m train.export {finished} --out" in error
    assert export.main([str(finished), "--out", str(tmp_path / "w.safetensors")]) == 0
    assert f"python -m deltajax.generate --model {tmp_path / 'w.safetensors'}" in capsys.readouterr().out
    args = ["--model", str(tmp_path), "--prompt", "alpha be", "--max-tokens", "12", "--temperature", "0"]
    assert generate.main(args) == 0
    # What the trainer itself would sample: documents begin after their separator.
    saved = open_saved(finished)
    model, tokenizer = load_weights(tmp_path / "w.safetensors"), ByteTokenizer()
    want = sample_text(model, tokenizer, SampleConfig(prompt="alpha be", tokens=12, temperature=0.0), seed=0)
    assert capsys.readouterr().out == want + "\n" and saved.config["corpus"]["tokenizer"] == "bytes"


def test_an_export_carries_the_tokenizer_of_its_run(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    other = tmp_path / "run" / "checkpoints" / "3" / "config" / "metadata"
    saved = json.loads(other.read_text())
    path = write_tokenizer(tmp_path / "words.json")
    saved["train"]["data"] |= {"tokenizer": str(path), "eos_token": "end"}
    saved["corpus"]["tokenizer"] = FileTokenizer(path, "end").fingerprint
    other.write_text(json.dumps(saved))
    out = tmp_path / "w.safetensors"
    assert export.main([str(tmp_path / "run"), "--out", str(out)]) == 0
    assert tokenizer_path(out).read_bytes() == path.read_bytes()
    assert read_about(out)["eos_token"] == "end"
    capsys.readouterr()
    args = ["--model", str(out), "--prompt", "alpha", "--max-tokens", "3"]
    assert generate.main(args) == 0
    assert capsys.readouterr().out.startswith("alpha")
    tokenizer_path(out).write_text(path.read_text().replace("alpha", "alphb"))
    assert generate.main(args) == 2
    assert "not the tokenizer that the model was trained with" in capsys.readouterr().err

    path.unlink()
    assert export.main([str(tmp_path / "run"), "--out", str(out)]) == 0
    assert "warning: exported without the tokenizer: " in capsys.readouterr().err
    assert not tokenizer_path(out).exists()
    assert generate.main(args) == 2
    assert f"argument --tokenizer: expected a file, as {out} names no tokenizer" in capsys.readouterr().err


def test_evaluation_of_a_checkpoint_is_the_runs_own(finished, capsys):
    for step, line in enumerate(read_metrics(finished / "metrics.jsonl"), start=1):
        assert evaluate.main([str(finished), "--step", str(step), "--mesh.data", "1"]) == 0
        out, error = capsys.readouterr()
        assert "note:" not in error
        loss, perplexity = map(float, re.search(r"loss (\S+) nats.* perplexity (\S+) over", out).groups())
        assert out.startswith(f"step {step}: ")
        assert loss == pytest.approx(line["eval_loss"], abs=1e-4)
        assert perplexity == pytest.approx(math.exp(line["eval_loss"]), abs=1e-3)


def test_evaluation_tells_that_other_text_is_held_out_now(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    config = tmp_path / "run" / "checkpoints" / "3" / "config" / "metadata"
    saved = json.loads(config.read_text())
    saved["corpus"]["fingerprint"] = "as it was"
    config.write_text(json.dumps(saved))
    assert evaluate.main([str(tmp_path / "run"), "--mesh.data", "1"]) == 0
    assert "note: corpus.fingerprint was 'as it was' in the run and is '30-" in capsys.readouterr().err


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
    damage(newest, "metrics", "cut")  # which nobody needs here
    damage(newest, "state", "removed")
    assert command([str(tmp_path / "run")]) == 1
    assert "checkpoints/3 cannot be read" in (err := capsys.readouterr().err) and "--step" in err
    assert [p.name for p in tmp_path.iterdir()] == ["run"]  # nothing was written


def test_options_that_cannot_work_are_named(finished, tmp_path, capsys):
    for args, expected in {
        ("--batches", "0"): "argument --batches: must be positive",
        ("--batch-size", "-1"): "argument --batch-size: must be positive",
        ("--mesh.fsdp", "64"): "needs 64 devices",
        ("--mesh.context", "0"): "argument --mesh.context: must be positive",
        ("--mesh.data", "-2"): "argument --mesh.data: must be positive or -1",
        ("--mesh.context", "3"): "argument --mesh.context: 3 does not divide",
        ("--files", "/nowhere/*.txt"): "data file not found",
    }.items():
        assert evaluate.main([str(finished), *args]) == 2
        assert expected in capsys.readouterr().err
    assert export.main([str(finished), "--out", str(tmp_path / "w.bin")]) == 2
    assert "argument --out: must be FILE.safetensors" in capsys.readouterr().err


def test_the_tokenizer_of_a_run_does_without_its_text_where_it_can(tmp_path):
    gone = (str(tmp_path / "gone.jsonl"),)
    assert isinstance(tokenizer_of(DataConfig(gone), "bytes"), ByteTokenizer)
    given = FileTokenizer(write_tokenizer(tmp_path / "words.json"), "end")
    config = DataConfig(gone, tokenizer=str(tmp_path / "words.json"), eos_token="end")
    assert tokenizer_of(config, given.fingerprint).fingerprint == given.fingerprint
    with pytest.raises(DataError, match=r"data file not found: .*gone"):  # a prepared directory had it
        tokenizer_of(DataConfig(gone), given.fingerprint)
