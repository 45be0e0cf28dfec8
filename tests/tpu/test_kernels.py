"""The TPU kernels, run by Pallas' interpreter on the CPU, against the recurrence in float64.

The interpreter fills memory that was not written with NaN, also what lies behind an array's end. It walks the
parallel axes of the grid in an order drawn from a seed, another one for each case.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from deltajax.ops import dispatch, pallas_tpu
from tests import cases
from tests.cases import CASES, Case
from tests.tpu.bounds import BROKEN_FLOAT32, FLOAT32, HALF, PARAMETERS, beyond, measured


def supported(case: Case) -> Case:
    """The case at the next sizes the kernels take; with two heads: A_log's gradient has a direction."""
    size = lambda n: next(m for m in (64, 128, 256, 512) if m >= n)  # noqa: E731
    heads = {"H": 2, "HV": 2} if case.decay in ("softplus", "bounded") and case.HV == 1 else {}
    return dataclasses.replace(case, K=size(case.K), V=size(case.V), **heads)


SHARED = list(dict.fromkeys(supported(case) for case in CASES))
EXTRA = [
    # The widest heads.
    Case("none", T=70, K=256, V=512, beta_max=2.0),
    Case("head", T=70, K=256, V=512, decay="slow", slow_test=True),
    Case("channel", T=70, K=256, V=512, decay="bounded", H=2, HV=2, slow_test=True),
    Case("channel", T=150, K=256, V=256, decay="softplus", H=2, HV=2, slow_test=True),
    # Sizes that are no power of two.
    Case("none", T=70, K=192, V=64),
    Case("head", T=70, K=64, V=192),
    Case("channel", T=70, K=192, V=192, decay="slow"),
    # Heads: groups, odd numbers.
    Case("none", T=70, K=64, V=64, H=2, HV=8),
    Case("head", T=70, K=64, V=64, H=1, HV=4, slow_test=True),
    Case("channel", T=70, K=64, V=64, H=1, HV=4, slow_test=True),
    Case("none", T=70, K=64, V=64, H=3, HV=3),
    Case("head", T=70, K=64, V=64, H=1, HV=3),
    Case("channel", T=70, K=64, V=64, H=3, HV=3, slow_test=True),
    # Several blocks of tokens and of heads, the last one of tokens half empty.
    Case("none", T=300, K=64, V=64, H=8, HV=8, B=2),
    Case("none", T=200, K=64, V=64, H=8, HV=8, segments="packed"),
    Case("head", T=200, K=64, V=64, H=8, HV=16, decay="slow", slow_test=True),
    Case("channel", T=300, K=64, V=64, H=16, HV=16, decay="slow", slow_test=True),
    Case("none", T=130, K=64, V=64, H=16, HV=32, slow_test=True),
    Case("channel", T=130, K=128, V=128, H=8, HV=8, decay="softplus", segments="packed", slow_test=True),
    # A bounded gate, whose backward kernel is another one; other bounds, other blocks about their middle.
    Case("channel", T=130, K=64, V=64, B=2, HV=2, decay="bounded", segments="packed"),
    *[
        dataclasses.replace(
            Case("channel", T=70, K=64, V=64, HV=2, decay="bounded", slow_test=True),
            lower_bound=bound,
            normalize=bound < -5,
        )
        for bound in (-1.0, -10.0, -20.0)
    ],
    # Lengths.
    *[Case(gate, T=T, K=64, V=64, slow_test=True) for gate in cases.GATES for T in (1, 2, 31, 128, 129)],
]


# The code of "none" and "head" differs in the decay alone: of these shapes and data one of the two is enough,
# beside "channel". Packed rows of "head" come with "softplus", too, and states of segments without a gate in
# float32.
REPEATED = {
    "none-B4T1H2-4K64V64-random",
    "none-B1T130H1-1K64V64-zero-identical-keys-beta2",
    "none-B1T130H1-1K64V64-random-zero-keys",
    "none-B2T130H1-2K64V64-slow-states",
    "head-B2T130H1-2K64V64-slow-packed",
    "none-B1T63H1-2K128V64-random",
    "none-B2T65H2-4K64V128-random",
    "none-B1T130H1-1K128V128-random-beta2",
    "none-B1T130H1-1K64V256-random",
    "head-B2T15H1-1K64V64-random-beta2",
    "head-B1T64H1-1K64V64-random-no-state",
    "head-B1T130H1-1K256V64-random",
}


def parameter(case: Case, slow: bool = False, broken: Mapping[str, str] = MappingProxyType({})):
    slow = slow or is_slow(case)
    marks = [pytest.mark.slow] if slow else []
    if str(case) in broken:
        marks.append(pytest.mark.xfail(strict=True, reason=broken[str(case)]))
    return pytest.param(case, id=str(case), marks=marks)


def is_slow(case: Case) -> bool:
    return case.slow_test or case.T > 300 or str(case) in REPEATED


def by_program(all_cases: list[Case]):
    """One parameter, (case, ...), for all cases that are compiled once, named after the first."""
    groups: dict = {}
    for case in all_cases:
        groups.setdefault((cases.program(case), is_slow(case)), []).append(case)
    for (_, slow), group in groups.items():
        name = str(group[0]) + (f"-and-{len(group) - 1}-more" if len(group) > 1 else "")
        yield pytest.param(group, id=name, marks=[pytest.mark.slow] if slow else [])


def forget():
    """Drops traces that hold kernels of another patch: both functions' static arguments do not name them."""
    cases.compiled.clear_cache()
    dispatch._by_platform.clear_cache()


@pytest.fixture
def interpret(monkeypatch):
    """Call it with a seed: implementation="pallas" then runs the TPU kernels on the CPU.

    Without a seed, by the older interpreter: a pure program, which can be mapped and recomputed.
    """

    def install(seed: int | None = None, **options):
        params = True
        if seed is not None:
            params = pltpu.InterpretParams(out_of_bounds_reads="uninitialized", random_seed=seed, **options)
        forward, saving, backward = (
            partial(f, interpret=params) for f in (pallas_tpu.forward, pallas_tpu.saving, pallas_tpu.backward)
        )
        kernel = dispatch.Kernel(forward, backward, pallas_tpu.unsupported, saving)
        monkeypatch.setattr(dispatch, "PALLAS", {"cpu": kernel})
        forget()

    yield install
    forget()


def seed_of(case: Case) -> int:
    return zlib.crc32(str(case).encode()) + cases.SEED


def assert_close(got: dict, expected: dict, tolerances: dict, cosines: bool = True):
    """All relative errors, or of the gate parameters' gradients the directions and sizes."""
    assert set(got) == set(expected)
    bad = beyond(*measured(got, expected), tolerances, PARAMETERS if cosines else ())
    assert not bad, bad


@pytest.mark.parametrize("group", list(by_program(SHARED + EXTRA)))
def test_bfloat16_equals_the_float64_scan_in_outputs_and_all_gradients(group, interpret):
    interpret(seed_of(group[0]))
    for case in group:
        print(case)  # told with a failure
        x = cases.arrays(case, jnp.bfloat16)
        got = cases.outputs_and_gradients(case, x, "pallas")
        assert got["o"].dtype == got["dq"].dtype == jnp.bfloat16
        assert_close(got, cases.reference(case, x), HALF)


def is_default_in_float32(case: Case) -> bool:
    """Every gate, with two heads and segments; and the gradients of gates' parameters."""
    return "slow-states" in str(case) or "softplus-packed" in str(case)


@pytest.mark.parametrize("case", [parameter(c, not is_default_in_float32(c), BROKEN_FLOAT32) for c in SHARED])
def test_float32_equals_the_float64_scan_in_outputs_and_all_gradients(case, interpret):
    x = cases.arrays(case, np.float32)
    expected = cases.reference(case, x)
    interpret(seed_of(case))
    got = cases.outputs_and_gradients(case, x, "pallas")
    assert_close(got, expected, FLOAT32, cosines=False)


@pytest.mark.parametrize(
    "gate, dtype",
    [
        ("head", jnp.bfloat16),
        pytest.param("head", np.float32, marks=pytest.mark.slow),
        ("channel", jnp.bfloat16),
        pytest.param("channel", np.float32, marks=pytest.mark.slow),
    ],
)
def test_slow_decays_out_of_the_unbounded_activation(gate, dtype, interpret):
    """exp(A_log) of 1e-3 to 1e-2: a memory of many thousand tokens; the state hardly decays over a row."""
    case = Case(gate, T=200, K=64, V=64, H=1, HV=2, decay="softplus", beta_max=2.0)
    x = cases.arrays(case, dtype)
    x["A_log"] = np.log(np.random.default_rng(cases.SEED).uniform(1e-3, 1e-2, size=2)).astype(np.float32)
    expected = cases.reference(case, x)
    interpret(5)
    got = cases.outputs_and_gradients(case, x, "pallas")
    assert_close(got, expected, HALF if dtype == jnp.bfloat16 else FLOAT32)


@pytest.mark.parametrize(
    "gate, dtype",
    [
        ("head", jnp.bfloat16),
        pytest.param("head", np.float32, marks=pytest.mark.slow),
        ("channel", jnp.bfloat16),
        ("channel", np.float32),
    ],
)
def test_extreme_gates_give_finite_outputs_and_gradients(gate, dtype, interpret):
    """Raw gates of +-100 through the unbounded softplus, zero keys."""
    case = Case(gate, T=65, K=64, V=64, decay="softplus", keys="zero")
    x = cases.arrays(case, dtype)
    alternating = np.where(np.arange(65).reshape(1, -1, *[1] * (x["g"].ndim - 2)) % 2, 100.0, -100.0)
    x["g"] = (alternating + x["g"].astype(np.float32)).astype(dtype)
    interpret(6)
    for name, value in cases.outputs_and_gradients(case, x, "pallas").items():
        assert np.isfinite(np.asarray(value, np.float32)).all(), name


@pytest.mark.parametrize("gate", ("head", "channel"))
def test_a_reset_by_minus_infinity_cuts_the_row_in_two(gate, interpret):
    """What comes before the token does not change a bit of what follows, nor the other way round."""
    case = Case(gate, T=130, K=64, V=64, H=2, HV=2, decay="reset")
    x = cases.arrays(case, np.float32)
    other = dict(x)
    for name in ("q", "k", "v", "do"):
        other[name] = x[name].copy()
        other[name][:, : case.T // 2] *= -0.5
    other["initial_state"] = 3 * x["initial_state"]
    interpret(7)
    a, b = (cases.outputs_and_gradients(case, y, "pallas") for y in (x, other))
    for name in ("o", "dq", "dk", "dv", "dbeta"):
        np.testing.assert_array_equal(a[name][:, case.T // 2 :], b[name][:, case.T // 2 :], name)
        assert np.any(a[name][:, : case.T // 2] != b[name][:, : case.T // 2]), name
    np.testing.assert_array_equal(a["final_state"], b["final_state"])


@pytest.mark.parametrize(
    "gate, segments",
    [
        pytest.param("none", "packed", marks=pytest.mark.slow),
        ("none", "states"),
        ("head", "packed"),
        pytest.param("head", "states", marks=pytest.mark.slow),
        ("channel", "packed"),
        ("channel", "states"),
    ],
)
def test_padding_hides_any_garbage_in_its_tokens(gate, segments, interpret):
    """NaN, +-inf and huge numbers in padding: the results are those of clean padding, to the bit."""
    activation = {"none": "random", "head": "slow", "channel": "softplus"}[gate]
    case = Case(gate, T=70, K=64, V=64, HV=2, decay=activation, segments=segments)
    clean = cases.arrays(case, np.float32)
    clean["segment_ids"] = np.array([[0] * 5 + [1] * 30 + [0] * 3 + [2] * 20 + [0] * 12], np.int32)
    dirty = dict(clean)
    for name in ("q", "k", "v", "beta", "g", "do"):
        if name not in clean:
            continue
        dirty[name] = clean[name].copy()
        for at, value in ((2, np.nan), (36, -np.inf), (60, np.nan), (65, np.inf), (69, 3e38)):
            if name != "do":
                dirty[name][0, at] = value
        clean[name] = clean[name].copy()
        if name != "do":
            clean[name][0, clean["segment_ids"][0] == 0] = 0
    interpret(8)
    got, expected = (cases.outputs_and_gradients(case, x, "pallas") for x in (dirty, clean))
    for name, value in expected.items():
        assert np.isfinite(value).all(), name
        np.testing.assert_array_equal(got[name], value, name)
    for name in ("o", "dq", "dk", "dv", "dbeta"):
        assert not np.any(np.asarray(got[name])[0, clean["segment_ids"][0] == 0]), name


# Transformations


TRANSFORMED = Case("head", T=33, B=2, K=64, V=64, HV=2, decay="softplus", segments="packed")


def drawn(case: Case = TRANSFORMED) -> dict:
    return jax.tree.map(jnp.asarray, cases.arrays(case, np.float32))


def loss(x, case: Case = TRANSFORMED):
    o, state = cases.call(case, x, "pallas")
    return jnp.sum(o * x["do"]) + jnp.sum(state * x["dstate"])


def gradients(x, case: Case = TRANSFORMED, transform=lambda f: f):
    floats = {n: a for n, a in x.items() if n != "segment_ids"}
    return jax.grad(transform(lambda floats: loss({**x, **floats}, case)))(floats)


def assert_trees_close(a, b, tolerance=1e-6):
    for got, expected in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert cases.relative_error(got, expected) < tolerance


def test_jit_changes_nothing(interpret):
    interpret()
    x = drawn()
    assert_trees_close(jax.jit(gradients)(x), gradients(x))


@pytest.mark.parametrize("kept", ("nothing", "what the kernel saves"))
def test_remat_changes_no_gradient(kept, interpret):
    interpret()
    policy = jax.checkpoint_policies.nothing_saveable
    if kept != "nothing":
        policy = jax.checkpoint_policies.save_only_these_names(dispatch.SAVED)
    x = drawn()
    assert_trees_close(gradients(x, transform=partial(jax.checkpoint, policy=policy)), gradients(x))


@pytest.mark.parametrize(
    "case",
    [
        parameter(TRANSFORMED),
        parameter(dataclasses.replace(TRANSFORMED, gate="none", decay="random", segments="states")),
        parameter(dataclasses.replace(TRANSFORMED, gate="channel", segments="none"), slow=True),
    ],
)
def test_vmap_equals_a_loop_in_outputs_and_gradients(case, interpret):
    interpret()
    x = drawn(case)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), x)
    run = lambda x: (cases.call(case, x, "pallas"), gradients(x, case))  # noqa: E731
    mapped = jax.vmap(run)(stacked)
    for i in range(2):
        one = run(jax.tree.map(lambda a, i=i: a[i], stacked))
        assert_trees_close(jax.tree.map(lambda a, i=i: a[i], mapped), one)


def test_gradient_of_a_scan_over_layers_equals_the_unrolled_loop(interpret):
    """Three applications, each fed the last one's output and final state, recomputed in the backward pass."""
    case = dataclasses.replace(TRANSFORMED, decay="slow", segments="none")
    x = drawn(case)

    @jax.checkpoint
    def layer(carry, k):
        v, state = carry
        o, state = cases.call(case, {**x, "v": v, "k": k, "initial_state": state}, "pallas")
        return (o, state), None

    def loss(run, v, state, ks):
        v, state = run(v, state, ks)
        return jnp.sum(v * x["do"]) + jnp.sum(state * x["dstate"])

    def unrolled(v, state, ks):
        for k in ks:
            (v, state), _ = layer((v, state), k)
        return v, state

    scanned = lambda v, state, ks: jax.lax.scan(layer, (v, state), ks)[0]  # noqa: E731
    args = (x["v"], x["initial_state"], jnp.stack([x["k"], 2 * x["k"], x["k"][::-1]]))
    interpret()
    assert_trees_close(
        *(jax.grad(partial(loss, run), argnums=(0, 1, 2))(*args) for run in (scanned, unrolled))
    )


def test_segment_ids_take_float0_cotangents(interpret):
    interpret()
    x = drawn()
    assert jax.grad(loss, allow_int=True)(x)["segment_ids"].dtype == jax.dtypes.float0
    call = lambda ids: cases.call(TRANSFORMED, {**x, "segment_ids": ids}, "pallas")  # noqa: E731
    (cotangent,) = jax.vjp(call, x["segment_ids"])[1]((x["do"], x["dstate"]))
    assert cotangent.dtype == jax.dtypes.float0


@pytest.mark.parametrize(
    "case",
    [
        parameter(Case("none", T=70, B=4, K=64, V=64, HV=2)),
        parameter(Case("channel", T=70, B=2, K=64, V=64, H=16, HV=16, decay="slow"), slow=True),
    ],
)
def test_the_order_of_rows_and_heads_changes_no_bit(case, interpret):
    """Rows and blocks of heads may run on different cores in any order."""
    x = cases.arrays(case, jnp.bfloat16)
    results, orders = [], []
    for seed in (1, 2):
        order = []

        def record(token, point, core, order=order):
            order.append(tuple(map(int, point)))
            return token

        interpret(seed, grid_point_recorder=record)
        results.append(jax.device_get(cases.outputs_and_gradients(case, x, "pallas")))
        orders.append(order)
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    jax.tree.map(np.testing.assert_array_equal, *results)
