"""`python -m train.preference`: tunes a saved run, resumes to the same curve, and says what is wrong."""

import json
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

from deltajax.tokenizer import ByteTokenizer
from tests.train.train_common import TINY, environment, write_text
from train.__main__ import main as pretrain
from train.documents import BadData, DataError
from train.metrics import read_metrics
from train.preference import run as tuning
from train.preference.__main__ import main
from train.preference.data import read_pairs
from train.preference.options import PairsConfig, PreferenceOptions, parse

QUICK = ["--optimizer.warmup-steps", "1", "--optimizer.learning-rate", "3e-3", "--log.no-tensorboard",
         "--log.gates-every", "0", "--checkpoint.every", "2", "--eval.every", "2"]  # fmt: skip


def write_pairs(path, count=40):
    """The better answer repeats the prompt's letter, the worse says x."""
    with open(path, "w") as file:
        for i in range(count):
            letter = "abcdefgh"[i % 8]
            record = {"prompt": f"{letter}=", "chosen": letter * (1 + i % 3), "rejected": "x" * (1 + i % 5)}
            file.write(json.dumps(record) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    text = write_text(directory / "text.jsonl")
    files = ["--data.files", str(text), "--log.no-tensorboard", "--log.gates-every", "0"]
    assert pretrain([*TINY, *files, "--steps", "1", "--run-dir", str(directory / "run")]) == 0
    return directory / "run"


def test_dpo_learns_pairs_and_resumes_to_the_same_curve(base, tmp_path, monkeypatch, capfd):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    base = shutil.copytree(base, tmp_path / "base")

    own = [str(base), "--data.files", pairs, "--run-dir", str(tmp_path / "run"), *QUICK]

    def tune():
        assert main([*own, "--beta", "0.5", "--steps", "6"]) == 0
        return read_metrics(tmp_path / "run" / "metrics.jsonl")

    whole = tune()
    assert whole[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)  # it starts as the reference
    assert abs(whole[0]["reward_margin"]) < 1e-4
    last = whole[-1]
    assert last["eval_loss"] < 0.6 and last["eval_reward_accuracy"] > 0.9 and last["reward_margin"] > 0.2

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    shutil.copytree(base / "checkpoints" / "1", base / "checkpoints" / "2")  # the tuned run goes on
    assert main([*own, "--beta", "0.5", "--step", "2"]) == 2
    assert "argument --step: " in (error := capfd.readouterr().err) and "tunes step 1, got 2" in error
    with monkeypatch.context() as patched:  # neither is needed any more
        patched.setattr(tuning, "reference_log_probs", None)
        patched.setattr(tuning.PreferenceRun, "base_params", None)
        again = tune()
    shown = capfd.readouterr().out
    assert "at step 4" in shown and "python -m train.preference" in shown
    assert f"dpo of {base} at step 1 " in shown and " --step 1 " in shown
    for name in ("loss", "reward_margin", "grad_norm"):
        assert [line[name] for line in again] == [line[name] for line in whole]

    config = base / "checkpoints" / "1" / "config" / "metadata"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"params_digest": 1}))
    assert main(own) == 2
    assert "tunes other parameters than those of step 1" in capfd.readouterr().err


def test_fine_tuning_takes_the_chosen_answers_alone(base, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    own = [str(base), "--data.files", pairs, "--run-dir", str(tmp_path / "run"), *QUICK]
    assert main([*own, "--method", "sft", "--steps", "6"]) == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    assert not (tmp_path / "run" / "reference.npz").exists()


@pytest.mark.slow
@pytest.mark.parametrize("axes", [("data", "fsdp"), ("fsdp", "context")])
def test_the_curve_is_one_devices_on_any_mesh(base, tmp_path, axes):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    found = []
    for devices in (1, 4):
        sizes = [x for axis in axes for x in (f"--mesh.{axis}", "2" if devices == 4 else "1")]
        mesh = sizes if "data" in axes else ["--mesh.data", "1", *sizes]
        out = tmp_path / str(devices)
        command = [sys.executable, "-m", "train.preference", str(base), "--data.files", pairs]
        command += ["--run-dir", str(out), "--steps", "4", *QUICK, "--beta", "0.5", *mesh]
        done = subprocess.run(command, env=environment(devices), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found.append([line["reward_margin"] for line in read_metrics(out / "metrics.jsonl")])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3, atol=1e-5)


def test_wrong_options_and_pairs_are_named(base, tmp_path, capfd):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    own = [str(base), "--run-dir", str(tmp_path / "run"), "--data.files", pairs]
    for args, message in (
        (["--beta", "0"], "argument --beta"),
        (["--data.seq-len", "5"], "raise --data.seq-len"),
        (["--data.batch-size", "3", "--optimizer.accumulate", "2"], "--optimizer.accumulate"),
        (["--run-dir", str(base)], "choose another"),
        (["--step", "7"], "argument --step"),
    ):
        assert main([*own, *args]) == 2
        assert message in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_bad_records_are_named_or_passed_over(tmp_path):
    path = tmp_path / "pairs.jsonl"
    good = {"prompt": "p", "chosen": "é", "rejected": ""}
    lines = [
        json.dumps(good),
        "{",
        json.dumps({"prompt": "p", "chosen": 3}),
        json.dumps(good | {"chosen": "\ud800"}),
    ]
    path.write_text("\n".join(lines))
    bad = BadData("skip")
    (pair,) = read_pairs([str(path)], ByteTokenizer(), bad)
    assert bytes(pair.chosen.tolist()) == "é".encode() and len(pair.rejected) == 0 and bad.count == 3
    with pytest.raises(DataError, match=r"pairs.jsonl:2: not valid JSON"):
        read_pairs([str(path)], ByteTokenizer())
    assert "chosen, rejected" in " ".join(bad.messages)


def test_the_command_reproduces_the_options():
    options = PreferenceOptions(
        "runs/a", "runs/b", PairsConfig(("x y.jsonl",), seq_len=64), beta=0.3, steps=7
    )
    again = parse(shlex.split(options.command())[3:])
    assert (
        str(again.base) == "runs/a" and again.data == options.data and again.beta == 0.3 and again.steps == 7
    )
