"""`python -m train` as a user meets it, in this process."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tokenizers

from tests.train.train_common import TINY, environment, losses, write_text
from train import config as options
from train import loop, metrics
from train.__main__ import main
from train.config_dict import from_dict, to_dict
from train.guard import StopRequest, only_run_in
from train.mesh import MESH_AXES
from train.metrics import MetricsFile, Throughput, peak_flops, read_metrics


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(write_text(tmp_path_factory.mktemp("text") / "text.jsonl"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    """A finished run of 8 steps, all its even checkpoints kept, and its command line."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    args = [*TINY, "--data.files", text, "--steps", "8", "--checkpoint.every", "2", "--checkpoint.keep", "9"]
    args += ["--eval.every", "4", "--run-dir", str(directory)]
    assert main(args) == 0
    return directory, args


def in_copy(finished, tmp_path):
    """The finished run's copy, free to spoil, and the command line that resumes it."""
    directory, args = finished
    shutil.copytree(directory, tmp_path / "run")
    return tmp_path / "run", [*args, "--run-dir", str(tmp_path / "run")]


@pytest.mark.parametrize(
    "preset",
    [
        "tiny_delta_net",
        pytest.param("tiny_gated_delta_net", marks=pytest.mark.slow),  # all other runs here are of it
        "tiny_kda",
        "tiny_hybrid",
    ],
)
def test_every_tiny_preset_trains_and_samples(tmp_path, text, preset, capsys):
    args = ["--preset", preset, "--steps", "2", "--data.files", text, "--data.seq-len", "32"]
    args += [
        "--data.batch-size",
        "2",
        "--eval.batches",
        "1",
        "--run-dir",
        str(tmp_path),
        "--sample.tokens",
        "4",
    ]
    args += ["--model.hidden-size", "32", "--model.head-dim", "16", "--model.intermediate-size", "48"]
    args += [] if preset == "tiny_hybrid" else ["--model.num-layers", "1"]
    # Two with the default backend, two with the one that compiles soonest.
    args += ["--model.implementation", "scan"] if "gated" in preset or "hybrid" in preset else []
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "bigram baseline" in out and "--- sample at step 2 ---\ndef " in out and "eval loss" in out
    assert list(losses(tmp_path)) == [1, 2]


def test_metrics_and_events_hold_every_step(finished):
    directory, _ = finished
    lines = read_metrics(directory / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all({"loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second"} <= set(x) for x in lines)
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 8]
    assert "mfu" not in lines[0]  # this CPU's peak is not known
    events = b"".join(f.read_bytes() for f in (directory / "tensorboard").iterdir())
    assert b"eval_loss" in events and b"grad_norm" in events


def test_run_directory_holds_the_configuration(finished):
    directory, args = finished
    saved = json.loads((directory / "config.json").read_text())
    assert from_dict(options.TrainConfig, saved["train"]) == options.parse(args)
    assert saved["model"]["hidden_size"] == 32 and saved["model"]["vocab_size"] == 260


def test_complete_run_says_so_and_can_be_extended(finished, tmp_path, capsys):
    directory, args = in_copy(finished, tmp_path)
    assert main([*args, "--sample.tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert "already complete: resumed at step 8 of 8; pass --steps 16" in out
    assert "--- sample at step 8 ---" in out
    assert main([*args, "--steps", "10"]) == 0
    out = capsys.readouterr().out
    assert "resumed" in out and "note: train.steps was 8 when that was saved and is 10 now" in out
    assert list(losses(directory)) == list(range(1, 11))


@pytest.mark.parametrize("last", [2, 6])
def test_resumed_losses_are_exactly_those_of_an_uninterrupted_run(finished, tmp_path, last):
    directory, args = in_copy(finished, tmp_path)
    for checkpoint in (directory / "checkpoints").iterdir():
        if int(checkpoint.name) > last:
            shutil.rmtree(checkpoint)
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # as a crash leaves it
    assert main(args) == 0
    assert losses(directory) == losses(finished[0])
    final = [read_metrics(d / "metrics.jsonl")[-1]["eval_loss"] for d in (directory, finished[0])]
    assert final[0] == final[1]


@pytest.mark.parametrize(
    "optimizer",
    [
        ["adamw", "--optimizer.moment-dtype", "bfloat16", "--optimizer.second-moment-dtype", "bfloat16"],
        ["muon"],
        ["adafactor"],
        pytest.param(["adafactor", "--optimizer.b1", "0"], marks=pytest.mark.slow),  # has other arrays
    ],
    ids=" ".join,
)
def test_every_optimizer_trains_and_resumes_as_if_uninterrupted(tmp_path, text, optimizer):
    args = [*TINY, "--data.files", text, "--optimizer.name", *optimizer, "--optimizer.schedule", "wsd"]
    args += [
        "--steps",
        "6",
        "--checkpoint.every",
        "3",
        "--checkpoint.keep",
        "9",
        "--optimizer.accumulate",
        "2",
    ]
    assert main([*args, "--run-dir", str(tmp_path / "whole")]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "6")
    assert main([*args, "--run-dir", str(tmp_path / "cut")]) == 0
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "cut") == whole and len(whole) == 6
    assert whole[6] < whole[1]


def test_resuming_with_another_optimizer_is_refused(finished, tmp_path, capsys):
    directory, args = in_copy(finished, tmp_path)
    assert main([*args, "--steps", "9", "--optimizer.name", "muon"]) == 2
    assert "another optimizer: name is 'adamw' there and 'muon' here" in capsys.readouterr().err
    assert losses(directory) == losses(finished[0])


def test_damaged_newest_checkpoint_is_passed_over(finished, tmp_path, capsys):
    directory, args = in_copy(finished, tmp_path)
    shutil.rmtree(directory / "checkpoints" / "8" / "state")
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "checkpoints/8 cannot be read" in out and "resumed" in out and "at step 6" in out
    assert losses(directory) == losses(finished[0])


def test_used_run_directory_is_refused_without_resume(finished, tmp_path, capsys):
    directory, args = in_copy(finished, tmp_path)
    assert main([*args, "--checkpoint.no-resume"]) == 2
    assert "--checkpoint.no-resume" in (err := capsys.readouterr().err) and "up to step 8" in err
    assert losses(directory) == losses(finished[0])


def test_checkpoint_of_another_model_is_refused_naming_the_fields(finished, tmp_path, capsys):
    _, args = in_copy(finished, tmp_path)
    assert main([*args, "--model.hidden-size", "48"]) == 2
    assert "hidden_size is 32 there and 48 here" in capsys.readouterr().err


def test_the_same_model_computed_otherwise_resumes_with_a_note(finished, tmp_path, capsys):
    directory, args = in_copy(finished, tmp_path)
    assert main([*args, "--model.remat", "full", "--steps", "9"]) == 0
    out = capsys.readouterr().out
    assert "at step 8" in out
    assert "note: model.remat was 'none' when that was saved and is 'full' now" in out
    assert list(losses(directory)) == list(range(1, 10))


def test_asked_to_stop_it_saves_without_evaluating(finished, tmp_path, monkeypatch, capsys):
    @contextlib.contextmanager
    def asked():
        stop = StopRequest()
        stop.signal = signal.SIGTERM
        yield stop

    def never(*_):
        raise AssertionError("evaluated or sampled within the grace period")

    monkeypatch.setattr(loop, "stop_on_signals", asked)
    monkeypatch.setattr(loop.Run, "evaluate", never)
    monkeypatch.setattr(loop.Run, "_sample", never)
    _, args = finished
    args = [*args, "--run-dir", str(tmp_path / "r"), "--eval.every", "1", "--sample.every", "1"]
    assert main([*args, "--sample.tokens", "4"]) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 1 of 8; saved" in capsys.readouterr().out
    assert (tmp_path / "r" / "checkpoints" / "1").is_dir() and list(losses(tmp_path / "r")) == [1]


def test_steps_run_under_the_runs_mesh_and_compilation_does_not_count(finished, tmp_path, monkeypatch):
    late, under = 0.0, []
    make = loop.make_train_step

    def slow_to_compile(*args):
        step, compiled = make(*args), False

        def call(*args):
            nonlocal late, compiled
            late, compiled = late if compiled else late + 10_000, True
            under.append(jax.sharding.get_mesh())
            return step(*args)

        return call

    monkeypatch.setattr(loop, "make_train_step", slow_to_compile)
    clock = types.SimpleNamespace(perf_counter=lambda: time.perf_counter() + late)
    monkeypatch.setattr(metrics, "time", clock)
    assert main([*finished[1], "--run-dir", str(tmp_path / "r"), "--steps", "2"]) == 0
    for line in read_metrics(tmp_path / "r" / "metrics.jsonl"):
        assert line["tokens"] / line["tokens_per_second"] < 10_000
    assert [mesh.axis_names for mesh in under] == [MESH_AXES] * 2 and jax.sharding.get_mesh().empty


def test_two_runs_in_one_directory_are_refused(finished, tmp_path, capsys):
    directory, args = in_copy(finished, tmp_path)
    with only_run_in(directory):
        assert main(args) == 2
    assert "another process is training in" in capsys.readouterr().err


def test_a_directory_that_cannot_be_written_is_named_before_any_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "lock").mkdir()
    with pytest.raises(options.ConfigError, match=r"argument --run-dir: .* cannot be written"):
        only_run_in(tmp_path).__enter__()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    assert main(["--data.files", "none.txt", "--run-dir", str(tmp_path)]) == 2
    assert f"argument --run-dir: {tmp_path} cannot be written" in capsys.readouterr().err


def test_loss_that_is_not_finite_stops_and_keeps_the_evidence(text, tmp_path, capsys):
    args = [
        *TINY,
        "--data.files",
        text,
        "--steps",
        "8",
        "--checkpoint.every",
        "1",
        "--run-dir",
        str(tmp_path),
    ]
    args += ["--optimizer.learning-rate", "1e38", "--optimizer.warmup-steps", "0"]
    assert main(args) == 1
    assert re.search(r"stopped: step 2 is not finite: loss .*(nan|inf)", capsys.readouterr().out)
    evidence = tmp_path / "failure" / "step_2"
    assert json.loads((evidence / "failure.json").read_text())["step"] == 2
    batch = np.load(evidence / "batch_0.npz")
    assert {batch[name].shape for name in ("tokens", "targets", "segment_ids")} == {(4, 64)}
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(evidence / "state")
    assert int(state["step"]) == 1  # the state the step started from
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]  # nothing bad was saved
    assert list(losses(tmp_path)) == [1]


@pytest.mark.parametrize(
    "args,expected",
    [
        (["--preset", "tiny_transformer"], ["--preset", "tiny_kda", "tiny_hybrid"]),
        (["--optimizer.momentum", "0.9"], ["--optimizer.momentum"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--optimizer.schedule", "linear"], ["--optimizer.schedule", "cosine", "wsd"]),
        (["--model.remat", "some"], ["--model.remat", "save_dots", "save_delta_rule"]),
    ],
)
def test_wrong_options_are_named_and_give_status_2(args, expected, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert all(text in err for text in expected), err


@pytest.mark.parametrize(
    "args,expected",
    [
        (["--steps", "0"], "argument --steps: must be positive"),
        (["--data.batch-size", "6", "--optimizer.accumulate", "4"], "argument --optimizer.accumulate: 4"),
        (["--data.held-out-fraction", "1.5"], "argument --data.held-out-fraction"),
        (["--data.files", "/nowhere/*.txt"], "data file not found: /nowhere/*.txt"),
        (["--data.tokenizer", "nothing.json"], "tokenizer file not found: nothing.json"),
        (["--mesh.fsdp", "64"], "needs 64 devices"),
        (["--mesh.lost-after", "0"], "argument --mesh.lost-after: must be positive"),
        (["--mesh.coordinator", "host:1"], "argument --mesh.coordinator: goes with --mesh.num-processes"),
        (
            [
                "--mesh.coordinator",
                "host",
                "--mesh.num-processes",
                "2",
                "--mesh.process-id",
                "0",
                "--mesh.distributed",
            ],
            "argument --mesh.coordinator: must be host:port, got 'host'",
        ),
        (["--seed", "-1"], "argument --seed"),
        (["--sample.temperature", "-1"], "argument --sample.temperature"),
        (["--sample.tokens", "-1"], "argument --sample.tokens"),
        (["--data.prefetch", "-1"], "argument --data.prefetch"),
        (["--loss.z-loss", "-1"], "argument --loss.z-loss"),
        (["--log.peak-tflops", "0"], "argument --log.peak-tflops"),
        (["--log.gates-every", "-1"], "argument --log.gates-every: must be 0 or more"),
        (["--log.trace-at", "0"], "argument --log.trace-at: must be positive"),
        (["--log.trace-steps", "0"], "argument --log.trace-steps: must be positive"),
        (["--optimizer.b1", "1.5"], "argument --optimizer.b1"),
        (["--optimizer.b2", "-0.1"], "argument --optimizer.b2"),
        (["--optimizer.eps", "0"], "argument --optimizer.eps"),
        (["--optimizer.weight-decay", "nan"], "argument --optimizer.weight-decay"),
        (["--optimizer.warmup-steps", "-5"], "argument --optimizer.warmup-steps"),
        (["--optimizer.decay-fraction", "0"], "argument --optimizer.decay-fraction"),
        (["--optimizer.final-fraction", "1.5"], "argument --optimizer.final-fraction"),
        (["--data.eos-token", "X"], "argument --data.eos-token: goes with --data.tokenizer"),
        (["--data.tokenizer", "{dir}/broken.json"], "argument --data.tokenizer: {dir}/broken.json"),
        (
            ["--data.tokenizer", "{dir}/words.json", "--data.eos-token", "X"],
            "argument --data.eos-token: {dir}/words.json: no token 'X'",
        ),
        (["--data.files", "{dir}/half.jsonl"], "{dir}/half.jsonl:1: text in field 'text' is not Unicode"),
        (["--run-dir", "{dir}/broken.json"], "argument --run-dir: {dir}/broken.json is a file"),
        (["--run-dir", "{dir}/broken.json/r"], "argument --run-dir: {dir}/broken.json/r cannot be made"),
        (["--model.chunk-size", "48"], "--model.chunk-size 48: "),
        (["--model.head-dim", "300"], "--model.head-dim 300: "),
        (["--model.implementation", "pallas"], "--model.implementation pallas: "),
    ],
)
def test_values_that_cannot_work_are_named_and_leave_no_trace(args, expected, tmp_path, text, capsys):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "half.jsonl").write_text(r'{"text": "\ud83d"}')
    words = tokenizers.models.WordLevel({"a": 0}, unk_token="a")
    tokenizers.Tokenizer(words).save(str(tmp_path / "words.json"))
    there = {path: path.read_bytes() for path in tmp_path.iterdir()}
    args = [arg.replace("{dir}", str(tmp_path)) for arg in args]
    assert main(["--data.files", text, "--run-dir", str(tmp_path / "r"), *args]) == 2
    assert expected.replace("{dir}", str(tmp_path)) in (err := capsys.readouterr().err)
    assert err.startswith("error: ") and err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == there


def test_presets_may_be_spelt_with_dashes():
    for args in (["--preset", "tiny-kda"], ["--preset=tiny-kda"], ["--preset", "tiny_kda"]):
        assert options.parse([*args, "--run-dir", "a-b"]) == options.TrainConfig("tiny_kda", run_dir="a-b")


def test_kernels_of_attention_are_chosen():
    for name in ("xla", "cudnn"):
        config = options.parse(["--preset", "tiny_kda_mla", "--model.attention-implementation", name])
        assert options.model_config(config, 257).attention_implementation == name
    assert options.model_config(options.TrainConfig(), 257).attention_implementation is None


def test_missing_packages_are_told_in_one_line():
    code = "import sys; sys.modules[{!r}] = None; from train.__main__ import main; sys.exit(main([]))"
    for name, status in {"tyro": 2, "numpy": 1}.items():  # without NumPy not even the layers work
        done = subprocess.run(
            [sys.executable, "-c", code.format(name)], env=environment(), capture_output=True, text=True
        )
        assert done.returncode == status
        last = done.stderr.splitlines()[-1]
        assert ("pip install 'deltajax[train]'" in last) == (status == 2), done.stderr
        assert ("Traceback" in done.stderr) == (status == 1)


def test_help_is_readable(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "tiny_kda" in out and "--data.files" in out and "steps between checkpoints" in out


def test_configuration_survives_json():
    config = options.parse(
        ["--data.files", "a", "b", "--model.num-layers", "3", "--optimizer.schedule", "wsd"]
    )
    text = json.dumps(to_dict(config))
    assert from_dict(options.TrainConfig, json.loads(text)) == config
    with pytest.raises(options.ConfigError, match="unknown fields of DataConfig: sequence"):
        from_dict(options.TrainConfig, {"data": {"sequence": 3}})


def test_metrics_file_drops_later_steps_and_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    file = MetricsFile(path, resumed_step=1)
    file.write({"step": 2, "loss": 2.5})
    file.close()
    assert read_metrics(path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]


def test_mfu_is_given_where_a_peak_is_known():
    assert peak_flops("cpu") is None and peak_flops("cpu", 2.0) == 2e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    found = Throughput(flops_per_token=1e6, peak=1e9).update(tokens=100)
    assert found["mfu"] == pytest.approx(found["tokens_per_second"] * 1e6 / 1e9)
    assert "mfu" not in Throughput(1e6, None).update(1)
