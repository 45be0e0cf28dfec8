"""What a run tells of itself: norms, times, gates, a trace, and its command."""

import contextlib
import io
import math
import re
import shlex
import types

import jax
import pytest
from flax import nnx

from deltajax.models import PRESETS, abstract_model, get_preset
from tests.train.train_common import TINY, write_text
from train import config as options
from train import metrics
from train.__main__ import main
from train.command import command
from train.groups import parameter_group
from train.metrics import Throughput, read_metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with everything on: its directory, and its arguments."""
    folder = tmp_path_factory.mktemp("operations")
    text = write_text(folder / "a text.jsonl")
    args = [*TINY, "--data.files", str(text), "--steps", "5", "--run-dir", str(folder / "run")]
    args += [
        "--log.gates-every",
        "2",
        "--log.trace-at",
        "2",
        "--log.trace-steps",
        "2",
        "--log.peak-tflops",
        "1",
    ]
    return folder / "run", args


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """Its metrics and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(run[1]) == 0
    return read_metrics(run[0] / "metrics.jsonl"), out.getvalue()


def test_norms_of_groups_make_up_the_whole(finished):
    for line in finished[0]:
        groups = {name.removeprefix("grad_norm/"): x for name, x in line.items() if "grad_norm/" in name}
        assert set(groups) == {
            "embedding", "lm_head", "mlp", "norm", "decay", "beta", "output_gate", "conv", "projections"
        }  # fmt: skip
        assert all(x > 0 for x in groups.values())
        assert math.hypot(*groups.values()) == pytest.approx(line["grad_norm"], rel=1e-5)


def test_gates_are_told_every_so_many_steps_and_cost_nothing_between(finished):
    for line in finished[0]:
        gates = {name: x for name, x in line.items() if name.startswith("gates/")}
        assert bool(gates) == (line["step"] in (2, 4))
        if gates:
            assert len(gates) == 6
            assert 0 < gates["gates/0/beta_min"] < gates["gates/0/beta_mean"] < gates["gates/0/beta_max"] < 1
            assert gates["gates/0/log_decay_min"] < gates["gates/0/log_decay_max"] < 0


def test_times_and_tensorboard(finished, run):
    for line in finished[0]:
        assert 0 < line["step_seconds_p50"] <= line["step_seconds_p90"] <= line["step_seconds_p99"]
        assert line["tokens"] / line["tokens_per_second"] == pytest.approx(line["step_seconds"])
        assert line["mfu"] > 0
    events = b"".join(f.read_bytes() for f in (run[0] / "tensorboard").iterdir())
    for name in (b"grad_norm/decay", b"gates/0/beta_mean", b"step_seconds_p90", b"mfu", b"tokens_per_second"):
        assert name in events


def test_the_steps_asked_for_are_traced(finished, run):
    traces = list((run[0] / "trace").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000
    assert f"trace of steps up to 3: {run[0] / 'trace'}" in finished[1]


def test_the_printed_command_is_that_of_the_run(finished, run):
    printed = re.search(r"to reproduce: python -m train (.*)", finished[1]).group(1)
    assert options.parse(shlex.split(printed)) == options.parse(run[1])


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--preset", "tiny_kda", "--data.files", "a b", "c@0.5", "--checkpoint.no-resume", "--seed", "3"],
        ["--mesh.distributed", "--mesh.coordinator", "h:1", "--mesh.num-processes", "2"],
        ["--model.allow-neg-eigval", "True", "--optimizer.no-decay-embeddings", "--optimizer.b1", "0.85"],
        ["--model.allow-neg-eigval", "False", "--sample.prompt", "class 'x", "--optimizer.eps", "1e-12"],
    ],
    ids=" ".join,
)
def test_any_options_are_reproduced(args):
    config = options.parse(args)
    assert options.parse(shlex.split(command(config))[3:]) == config


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_is_of_a_group(preset):
    params = nnx.to_pure_dict(nnx.state(abstract_model(get_preset(preset)), nnx.Param))
    for path, _ in jax.tree.leaves_with_path(params):
        parameter_group(path)


def test_percentiles_are_of_recent_steps(monkeypatch):
    now = 0.0
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(perf_counter=lambda: now))
    throughput = Throughput(1.0, None)
    for seconds in [50.0] * 100 + [1.0] * 95 + [9.0] * 5:
        now += seconds
        found = throughput.update(10)
    assert found["step_seconds"] == 9 and found["tokens_per_second"] == 10 / 9
    assert found["step_seconds_p50"] == found["step_seconds_p90"] == 1 and found["step_seconds_p99"] == 9
