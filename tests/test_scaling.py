"""The scaling benchmark's own logic: which runs go at once, which collectives are exposed, the verdict."""

from types import SimpleNamespace

import pytest

from benchmarks import collectives, scaling


def test_runs_fill_the_devices_and_none_is_lost():
    options = scaling.Options(presets=("a", "b"), devices=(1, 2, 4), context_devices=(4,))
    todo = scaling.runs(options)
    groups = scaling.waves(todo, 4)
    assert sorted(map(str, todo)) == sorted(str(run) for group in groups for run in group)
    assert all(sum(run.devices for run in group) <= 4 for group in groups)
    assert [sum(run.devices for run in group) for group in groups[:-1]] == [4] * (len(groups) - 1)
    context = [run for run in todo if run.kind == "context" and run.devices == 1]
    assert all("32768" in run.arguments for run in context)  # a quarter of the row


def test_too_few_devices_are_named():
    with pytest.raises(ValueError, match="devices 4: expected at most 2"):
        scaling.waves(scaling.runs(scaling.Options()), 2)


def test_only_collectives_that_nothing_hides_are_exposed():
    def event(name, start, end):
        return SimpleNamespace(name=name, start_ns=start * 1e6, duration_ns=(end - start) * 1e6)

    compute = SimpleNamespace(name="Stream #1(Compute)", events=[event("gemm", 0, 4), event("fusion", 6, 8)])
    other = SimpleNamespace(name="Stream #2", events=[event("ncclAllGather", 3, 7), event("ncclX", 9, 10)])
    host = SimpleNamespace(name="XLA Ops", events=[event("all", 0, 100)])
    plane = SimpleNamespace(name="/device:GPU:0", lines=[compute, other, host])
    assert collectives.device(plane) == pytest.approx((5.0, 3.0, 9.0))  # 4 to 6 and 9 to 10 are exposed


@pytest.mark.parametrize("loss, good", [(5.001, True), (5.5, False)])
def test_losses_that_differ_from_one_devices_fail(loss, good, capsys):
    options = scaling.Options(presets=("a",), devices=(1, 2), context_len=0, steps=2)
    row = {"tokens_per_s": 10.0, "peak_gib": 1.0, "losses": [5.0, 4.0]}
    rows = {("fsdp", 2): row | {"losses": [loss, 4.0]}, ("fsdp", 1): row, ("accumulate", 1): row}
    done = [(run, rows[run.kind, run.devices]) for run in scaling.runs(options)]
    assert scaling.report(options, done) is good
    assert "0.500" in capsys.readouterr().out  # two devices at one's speed


def test_a_run_without_a_row_fails():
    options = scaling.Options(presets=("a",), devices=(1,), context_len=0)
    assert not scaling.report(options, [(run, {}) for run in scaling.runs(options)])
