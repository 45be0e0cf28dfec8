"""Properties that hold for any implementation: packing, splitting, neutral padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deltajax import ops
from tests import cases
from tests.cases import Case

TOLERANCE = 1e-5  # float32; decays are slow, so that a leak would show
few_examples = settings(max_examples=3, deadline=None, derandomize=cases.SEED == 0)
implementations = pytest.mark.parametrize("implementation", ("scan", "chunked"))
gates = pytest.mark.parametrize("gate", cases.GATES)


def assert_close(got, expected, name=""):
    assert cases.relative_error(got, expected) < TOLERANCE, name


def one_row(x: dict, b: int, tokens: slice) -> dict:
    """Row ``b``'s tokens of a case's arrays, gate parameters kept."""
    per_token = {"q", "k", "v", "g", "beta", "do"}
    return {n: a[b : b + 1, tokens] if n in per_token else a for n, a in x.items()}


@gates
@implementations
def test_packed_rows_equal_their_sequences_alone_in_outputs_states_and_gradients(gate, implementation):
    case = Case(gate, T=130, B=2, H=1, HV=2, K=16, V=8, decay="slow", segments="states", beta_max=2.0)
    alone = Case(gate, T=0, H=1, HV=2, K=16, V=8, decay="slow", beta_max=2.0)
    x = cases.arrays(case, np.float32)
    got = cases.outputs_and_gradients(case, x, implementation)
    for b in range(2):
        assert not np.any(got["o"][b][x["segment_ids"][b] == 0]), "padding outputs zero"
        for n in range(cases.NUM_SEGMENTS):
            where = np.flatnonzero(x["segment_ids"][b] == n + 1)
            if len(where) == 0:
                np.testing.assert_array_equal(got["final_state"][b, n], x["initial_state"][b, n])
                np.testing.assert_array_equal(got["dinitial_state"][b, n], x["dstate"][b, n])
                continue
            tokens = slice(where[0], where[-1] + 1)
            part = one_row(x, b, tokens)
            part["initial_state"] = x["initial_state"][b : b + 1, n]
            part["dstate"] = x["dstate"][b : b + 1, n]
            del part["segment_ids"]
            expected = cases.reference(alone, part)
            for name, value in expected.items():
                if name == "final_state" or name == "dinitial_state":
                    assert_close(got[name][b, n], value[0], name)
                else:
                    assert_close(got[name][b, tokens], value[0], name)


@gates
@implementations
def test_resets_without_segment_states_keep_only_the_first_and_the_last_segment(gate, implementation):
    case = Case(gate, T=70, HV=2, K=16, V=8, decay="slow", segments="packed")
    alone = Case(gate, T=0, HV=2, K=16, V=8, decay="slow")
    x = cases.arrays(case, np.float32)
    x["segment_ids"] = np.array([[0] * 2 + [7] * 30 + [0] * 3 + [3] * 33 + [0] * 2], np.int32)
    got = cases.outputs_and_gradients(case, x, implementation)
    first, last = one_row(x, 0, slice(2, 32)), one_row(x, 0, slice(35, 68))
    first["dstate"] = np.zeros_like(first["dstate"])
    last["initial_state"] = np.zeros_like(last["initial_state"])
    del first["segment_ids"], last["segment_ids"]
    first, last = cases.reference(alone, first), cases.reference(alone, last)
    assert_close(got["o"][0, 2:32], first["o"][0])
    assert_close(got["o"][0, 35:68], last["o"][0])
    assert_close(got["final_state"], last["final_state"])
    assert_close(got["dinitial_state"], first["dinitial_state"])
    for name in ("dq", "dk", "dv", "dbeta"):
        assert_close(got[name][0, 2:32], first[name][0], name)
        assert_close(got[name][0, 35:68], last[name][0], name)
        assert not np.any(got[name][0, [0, 1, 32, 33, 34, 68, 69]]), name


@gates
@implementations
def test_padding_hides_any_garbage_in_its_tokens(gate, implementation):
    case = Case(gate, T=40, K=16, V=8, decay="slow", segments="packed")
    x = cases.arrays(case, np.float32)
    x["segment_ids"] = np.array([[0] * 5 + [1] * 20 + [0] * 15], np.int32)
    for name in ("q", "k", "v", "beta", "g"):
        if name in x:
            x[name] = x[name].copy()
            x[name][0, 30] = np.nan
            x[name][0, 2] = -np.inf
    got = cases.outputs_and_gradients(case, x, implementation)
    for name, value in got.items():
        assert np.isfinite(value).all(), name


@gates
@few_examples
@given(split=st.integers(1, 129), seed=st.integers(0, 2**31))
@example(split=64, seed=0)
@example(split=65, seed=0)
@example(split=127, seed=0)
def test_splitting_a_sequence_and_carrying_the_state_equals_not_splitting(gate, split, seed):
    case = Case(gate, T=130, H=1, HV=2, K=16, V=16, decay="slow", beta_max=2.0)
    x = cases.arrays(case, np.float32, seed)
    o, state = cases.call(case, x, "chunked")
    head, tail = one_row(x, 0, slice(0, split)), one_row(x, 0, slice(split, None))
    o1, carried = cases.call(case, head, "chunked")
    o2, final = cases.call(case, {**tail, "initial_state": carried}, "chunked")
    assert_close(np.concatenate([o1, o2], axis=1), o)
    assert_close(final, state)


@gates
@few_examples
@given(seed=st.integers(0, 2**31), cuts=st.lists(st.integers(1, 64), min_size=5, max_size=5, unique=True))
def test_any_packing_of_any_lengths_equals_the_scan(gate, seed, cuts):
    case = Case(gate, T=65, K=16, V=16, decay="slow", segments="states")
    x = cases.arrays(case, np.float32, seed)
    rng = np.random.default_rng(seed)
    ids = np.searchsorted(np.sort(cuts), np.arange(65), side="right") + 1
    ids[rng.random(65) < 0.1] = 0
    relabel = np.concatenate([[0], rng.permutation(cases.NUM_SEGMENTS) + 1])  # ids in any order
    x["segment_ids"] = relabel[ids][None].astype(np.int32)
    got, expected = (cases.outputs_and_gradients(case, x, name) for name in ("chunked", "scan"))
    for name in expected:
        assert_close(got[name], expected[name], name)


@gates
def test_one_token_steps_equal_the_sequence(gate):
    case = Case(gate, T=20, B=2, H=2, HV=4, K=16, V=8, decay="softplus" if gate != "none" else "random")
    x = cases.arrays(case, np.float32)
    o, final = cases.call(case, x, "scan")
    options = {}
    if gate != "none":
        options["gate"] = ops.Gate(x["A_log"], x["dt_bias"])
    step = jax.jit(
        lambda state, q, k, v, beta, g: ops.delta_rule_step(
            state, q, k, v, beta, g, normalize_qk=True, **options
        ),
        donate_argnums=0,
    )
    state = jnp.asarray(x["initial_state"])
    for t in range(20):
        g = x["g"][:, t] if gate != "none" else None
        out, state = step(state, *(x[n][:, t] for n in ("q", "k", "v", "beta")), g)
        assert_close(out, o[:, t])
    assert_close(state, final)
