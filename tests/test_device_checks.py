"""Checks of `benchmarks` that need a device: what they say and when they fail, with stand-ins on a CPU."""

import jax.numpy as jnp
import pytest

from benchmarks import hopper, hopper_plans, op_times, problems
from deltajax.ops import dispatch
from tests import cases
from tests.tpu.bounds import Direction

CASE = "none-B4T1H2"  # one of the shared list, of one token


@pytest.fixture
def kernels(monkeypatch):
    """Sets the kernels that ops find."""

    def install(found: dict) -> None:
        monkeypatch.setattr(dispatch, "PALLAS", found)
        for f in (cases.compiled, dispatch._by_platform, hopper.forward_alone):
            f.clear_cache()

    yield install
    install({})


def test_op_times_counts_what_it_compared(capsys):
    assert op_times.main(op_times.Options(check=True, only=(CASE,))) == 0
    assert "check: ok, 2 compared, 0 failed, 0 not supported" in capsys.readouterr().out


def test_op_times_fails_where_nothing_was_compared(capsys):
    assert op_times.main(op_times.Options(check=True, only=("NO_SUCH",))) == 1
    assert "check: FAILED, 0 compared" in capsys.readouterr().out


def test_op_times_names_what_the_kernels_do_not_support_and_goes_on(capsys):
    options = op_times.Options(check=True, only=(CASE,), implementations=("pallas", "chunked"))
    assert op_times.main(options) == 0
    said = capsys.readouterr().out
    assert f"not supported: pallas float32 {CASE}" in said
    assert "check: ok, 2 compared, 0 failed, 2 not supported" in said


def test_op_times_fails_for_an_error_inside_a_kernel(kernels, capsys):
    def broken(inputs, options):
        raise NotImplementedError("no such instruction")

    kernels({"cpu": dispatch.Kernel(broken, broken, lambda inputs, options: None)})
    assert not op_times.check(op_times.Options(check=True, only=(CASE,), implementations=("pallas",)))
    assert "0 compared, 2 failed, 0 not supported" in capsys.readouterr().out


def test_op_times_holds_kernels_to_the_bounds_of_their_tests():
    case = cases.Case(
        "head", T=1000, K=64, V=64, keys="identical", beta_max=2.0, decay="zero", normalize=False
    )
    errors, directions = {"o": 2e-4, "dA_log": 0.5}, {"dA_log": Direction(0.9995, 1.0)}
    assert set(op_times.over("chunked", case, jnp.float32, errors, directions)) == {"o", "dA_log"}
    assert set(op_times.over("pallas", case, jnp.float32, errors, directions)) == {"dA_log"}
    other = cases.Case("head", T=64, K=64, V=64)
    assert set(op_times.over("pallas", other, jnp.float32, errors, directions)) == {"o", "dA_log"}
    assert not op_times.over("pallas", other, jnp.bfloat16, errors, directions)
    for wrong in (Direction(0.9, 1.0), Direction(0.9995, 1.1)):
        assert set(op_times.over("pallas", other, jnp.bfloat16, {"dg": 3e-2}, {"dA_log": wrong})) == {
            "dg",
            "dA_log",
        }


HOPPER = hopper.Options(check=True, only=(CASE,), repeats=1, shard=(0, 1))


def test_hopper_fails_for_cases_that_are_refused(kernels, monkeypatch, capsys):
    monkeypatch.setattr(hopper, "check_transformations", lambda: True)
    kernels({"cuda": hopper.KERNEL})
    assert hopper.main(HOPPER) == 1
    said = capsys.readouterr().out
    assert f"REFUSED bfloat16 {CASE}" in said
    assert "check: FAILED" in said and "0 compared, 2 refused" in said


def test_hopper_counts_what_it_compared(kernels, monkeypatch, capsys):
    monkeypatch.setattr(hopper, "check_transformations", lambda: True)
    kernels({"cpu": dispatch.CHUNKED})
    assert hopper.check(HOPPER)
    assert "check: ok" in (said := capsys.readouterr().out) and "2 compared, 0 refused" in said
    assert not hopper.check(hopper.Options(check=True, only=("NO_SUCH",)))


@pytest.mark.parametrize(
    "chosen, others, status, said",
    [
        (1.0, 1.001, 0, "check: ok, 1 compared, 1 do not compile"),
        (1.0, 1.1, 1, "check: FAILED, 1 compared, 1 do not compile"),
        (1.0, None, 1, "check: FAILED, 0 compared, 2 do not compile"),
        (None, 1.0, 1, "check: FAILED, 0 compared, 2 do not compile"),
    ],
)
def test_hopper_plans_count_layouts_that_do_not_compile(
    chosen, others, status, said, kernels, monkeypatch, capsys
):
    """Of three layouts the last never compiles; the others give a number."""
    kernels({})
    p = problems.Problem("delta", 1, 64, 1, 1, 64, 64)
    best = hopper_plans.chosen(p)
    found = [best, hopper_plans.Plan(2, 2), hopper_plans.Plan(2, 3)]
    programs = [None if x is None else lambda *_, x=x: jnp.full(2, x) for x in (chosen, others, None)]
    monkeypatch.setattr(problems, "PROBLEMS", [p])
    monkeypatch.setattr(hopper_plans, "layouts", lambda p: found)
    monkeypatch.setattr(hopper_plans, "programs", lambda *_: programs)
    assert hopper_plans.main(hopper_plans.Options(check=True)) == status
    assert said in capsys.readouterr().out
