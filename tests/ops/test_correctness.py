"""Every implementation against the recurrence in float64, on every shared case."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import cases
from tests.cases import CASES, Case
from tests.ops import numpy_loop

SCAN_TOLERANCE = 1e-12  # float64 against float64
FLOAT32_TOLERANCE = 1e-5
BFLOAT16_TOLERANCE = 1e-2

SWEEP = [pytest.param(c, id=str(c), marks=[pytest.mark.slow] if c.slow_test else []) for c in CASES]


@pytest.mark.parametrize("case", SWEEP)
def test_scan_in_float64_equals_a_numpy_loop(case):
    """The very program that the other tests of this case refer to."""
    x = cases.arrays(case)
    got = cases.reference(case, x)
    expected_o, expected_state = numpy_loop.delta_rule(case, x)
    assert got["o"].dtype == got["final_state"].dtype == np.float64
    assert cases.relative_error(got["o"], expected_o) < SCAN_TOLERANCE
    assert cases.relative_error(got["final_state"], expected_state) < SCAN_TOLERANCE


def assert_close(got: dict, expected: dict, tolerance: float):
    errors = {name: cases.relative_error(got[name], expected[name]) for name in expected}
    bad = {name: error for name, error in errors.items() if not error < tolerance}
    assert not bad, f"relative errors above {tolerance}: {bad}"


def in_bfloat16_by_default(case: Case) -> bool:
    """All code of one gate, and some of the others' own: the casts do not depend on the shape.

    So of that gate's cases that differ in their shape alone the default run has those of one program.
    """
    if case.slow_test:
        return False
    if case.gate != "channel":
        return case.decay in ("zero", "softplus")
    plain = case.segments == "none" and case.initial and case.normalize
    of_shape = plain and case.decay not in ("softplus", "bounded")
    return not of_shape or cases.program(case) == cases.program(Case("channel", T=130))


@pytest.mark.parametrize("case", SWEEP)
def test_chunked_equals_the_float64_scan_in_outputs_and_all_gradients(case):
    dtypes = {np.float32: FLOAT32_TOLERANCE}
    if in_bfloat16_by_default(case):
        dtypes[jnp.bfloat16] = BFLOAT16_TOLERANCE
    for dtype, tolerance in dtypes.items():
        x = cases.arrays(case, dtype)
        assert_close(cases.outputs_and_gradients(case, x, "chunked"), cases.reference(case, x), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if not in_bfloat16_by_default(c)], ids=str)
def test_chunked_in_bfloat16_equals_the_float64_scan(case):
    x = cases.arrays(case, jnp.bfloat16)
    assert_close(
        cases.outputs_and_gradients(case, x, "chunked"), cases.reference(case, x), BFLOAT16_TOLERANCE
    )


@pytest.mark.parametrize("gate", cases.GATES)
def test_chunked_in_float64_equals_scan_in_float64(gate):
    case = Case(gate, T=130, B=2, H=2, HV=4, K=16, V=8, segments="states", decay="slow", beta_max=2.0)
    x = cases.arrays(case)
    with jax.enable_x64(True):
        got = jax.device_get(cases.outputs_and_gradients(case, jax.tree.map(jnp.asarray, x), "chunked"))
    assert got["o"].dtype == np.float64
    assert_close(got, cases.reference(case, x), 1e-12)


@pytest.mark.parametrize("gate", cases.GATES)
def test_float16_inputs_stay_within_half_precision(gate):
    case = Case(gate, T=65, K=32, V=16, decay="slow")
    x = cases.arrays(case, np.float16)
    got = cases.outputs_and_gradients(case, x, "chunked")
    assert got["o"].dtype == jnp.float16 and got["dq"].dtype == jnp.float16
    assert_close(got, cases.reference(case, x), 2e-3)


@pytest.mark.parametrize("direction", ("exact", "any"))
@pytest.mark.parametrize("T", (65, pytest.param(1000, marks=pytest.mark.slow)))
@pytest.mark.parametrize("gate", cases.GATES)
def test_decaying_identical_keys_with_beta_2_err_no_more_than_their_condition(gate, T, direction):
    """The worst legal keys: every token reflects the state along k, so all of T's entries are +-2 (decayed).

    Rounding each entry of A to float32 (relative u = 2^-24, a few times over: product, decay, beta) then
    moves T by T dA T, up to 4 C u for each chunk of C; and the error of k.k itself, where k is not exact, is
    the same for all tokens and adds up. Hence bounds linear in T; the cases of `CASES`, whose products are
    exact, hold the usual 1e-5 at any T.
    """
    roundings = {"exact": 16, "any": 64}[direction]
    case = Case(gate, T=T, K=64, V=32, keys="identical", beta_max=2.0, decay="slow", normalize=False)
    x = cases.arrays(case, np.float32)
    if direction == "any":
        k = np.random.default_rng(cases.SEED).normal(size=case.K)
        x["k"] = np.broadcast_to(k / np.linalg.norm(k), x["k"].shape).astype(np.float32)
    got = cases.outputs_and_gradients(case, x, "chunked")
    assert_close(got, cases.reference(case, x), roundings * T * 2.0**-24)


@pytest.mark.parametrize("gate", ("head", "channel"))
@pytest.mark.parametrize("implementation", ("scan", "chunked"))
def test_extreme_gates_give_finite_outputs_and_gradients(gate, implementation):
    """Raw gates of +-100 through the unbounded softplus, a fully forgetting token, zero keys."""
    case = Case(gate, T=65, K=16, V=16, decay="softplus", keys="zero")
    x = cases.arrays(case, np.float32)
    x["g"] = np.where(np.arange(65).reshape(1, -1, *[1] * (x["g"].ndim - 2)) % 2, 100.0, -100.0) + x["g"]
    x["g"] = x["g"].astype(np.float32)
    got = cases.outputs_and_gradients(case, x, implementation)
    for name, value in got.items():
        assert np.isfinite(value).all(), name


@pytest.mark.parametrize("gate", cases.GATES)
def test_every_chunk_size_gives_the_same_result(gate):
    case = Case(gate, T=130, K=16, V=16, decay="slow", segments="states")
    x = cases.arrays(case, np.float32)
    expected = cases.reference(case, x)
    for chunk_size in (16, 128):
        assert_close(cases.outputs_and_gradients(case, x, "chunked", chunk_size), expected, FLOAT32_TOLERANCE)
