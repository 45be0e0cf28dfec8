"""The experiments' commands: options, budget, results, table, plot."""

import json

import pytest

from train.experiments import mad, plot, recall, results, state_tracking
from train.experiments.results import Result

TINY = [
    *("--lengths", "8", "--steps", "4", "--eval-every", "2", "--eval-rows", "8", "--batch-tokens", "32"),
    *("--num-layers", "1", "--num-heads", "1", "--head-dim", "8", "--intermediate-size", "8"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "found.json"
    args = ["--tasks", "parity", "--mixers", "delta_net_neg", "delta_net", "--eval-lengths", "16"]
    args += ["--seeds", "0", "1", "--learning-rates", "0.01", "--budget-seconds", "1e-3", "--target", "1.0"]
    assert state_tracking.main([*args, *TINY, "--out", str(out)]) == 0
    return out


def test_a_budget_ends_after_a_turn_of_all_mixers_and_everything_is_saved(saved):
    about, found = results.load(saved)
    assert [x.mixer for x in found] == ["delta_net_neg", "delta_net"]
    for x in found:
        assert (x.task, x.length, x.stopped, x.parameters > 0) == ("parity", 8, "budget", True)
        assert [entry["step"] for entry in x.history] == [2]
        assert len(x.history[0]["loss"]) == len(x.history[0]["answers"]) == len(x.lanes) == 2
        assert len(x.lengths["16"]["late"]) == 2
    assert about["command"].startswith("python -m train.experiments.state_tracking --tasks parity")
    assert about["options"]["steps"] == 4 and about["device"] and about["date"]
    table = saved.with_suffix(".md").read_text()
    assert (
        "| task | length | delta_net_neg | delta_net |" in table and "| parity, trained on 8 | 16 |" in table
    )


def test_the_plot_needs_the_results_alone(saved, tmp_path):
    out = tmp_path / "plots" / "found.png"
    assert plot.main([str(saved), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_the_best_rate_counts_and_a_target_is_of_all_its_seeds(tmp_path):
    lanes = [{"learning_rate": rate, "seed": seed} for rate in (0.1, 0.2) for seed in (0, 1)]
    x = Result("parity", "kda", 8, lanes)
    assert not x.solved(0.5) and x.accuracy(0.1) == 0
    x.history.append({"step": 2, "loss": [1.0, float("nan"), 1.0, 1.0], "answers": [1.0, 0.2, 0.75, 0.75]})
    x.history[0] |= {"late": [0.0, 0.0, 0.5, 0.25]}
    assert x.best_rate() == 0.2 and x.accuracy(0.2) == 0.75 and x.accuracy(0.2, kind="late") == 0.375
    assert x.solved(0.75) and not x.solved(0.9)
    results.save(tmp_path / "x.json", {}, [x])
    assert json.loads((tmp_path / "x.json").read_text())["results"][0]["history"][0]["loss"][1] is None
    _, (again,) = results.load(tmp_path / "x.json")
    assert again.best_rate() == 0.2
    assert "75.0 (late 37.5) at 2, rate 0.2" in results.table([x])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--eval-every", "7"], "argument --eval-every: 7 does not divide --steps 600"),
        (["--lengths", "30", "--tasks", "stacks", "--eval-lengths", "3"], "--tasks stacks --lengths 3"),
        (["--target", "0"], "argument --target"),
        (["--learning-rates", "0"], "argument --learning-rates"),
        (["--seeds", "-1"], "argument --seeds"),
        (["--budget-seconds", "0"], "argument --budget-seconds"),
        (["full", "--head-dim", "512"], "head_dim"),
        (["--num-heads", "0"], "argument --num-heads: must be positive"),
    ],
)
def test_wrong_options_are_named(args, message, capsys):
    assert recall.main(args) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("experiment", [recall, state_tracking, mad])
def test_both_settings_fit(experiment):
    small, full = experiment.settings()
    for options in (small, full):
        options.check()
    assert (small.setting, full.setting) == ("small", "full")
