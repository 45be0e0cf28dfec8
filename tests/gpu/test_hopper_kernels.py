"""The Hopper kernels on the CPU: the GPU interpreter against the recurrence.

Matrix products and rows gathered from shared memory are replaced by their meaning (`tests.gpu.interpreted`);
`python -m benchmarks.hopper --check` runs the real ones on a card. Everything else of the kernels runs:
copies, barriers, indices, masks, decays.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from deltajax import ops
from deltajax.ops import context, dispatch, pallas_gpu
from pallas_kernels.gpu import delta_rule
from tests import cases
from tests.gpu.interpreted import captured, interpreted_products

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

KERNEL = dispatch.PALLAS["cuda"]

INTERPRETED = [
    cases.Case("none", T=130, K=64, V=64, H=1, HV=2, beta_max=2.0),
    cases.Case("head", T=130, K=64, V=64, decay="softplus", segments="packed"),
    cases.Case("channel", T=130, K=64, V=64, decay="bounded"),
    cases.Case("channel", T=128, K=128, V=64, decay="bounded", beta_max=2.0),  # every token there
    cases.Case("head", T=130, K=64, V=64, keys="identical", beta_max=2.0, decay="zero", normalize=False),
    cases.Case("channel", T=130, K=64, V=64, keys="identical", beta_max=2.0, decay="zero", normalize=False),
    cases.Case("channel", T=65, K=256, V=64, decay="slow"),
    pytest.param(cases.Case("none", T=65, K=256, V=64, beta_max=2.0), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_interpreted_kernels_agree_with_the_recurrence(case, monkeypatch):
    check_interpreted_forward(case, monkeypatch)


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_interpreted_runs_agree_with_the_recurrence(gate, monkeypatch):
    monkeypatch.setattr(delta_rule, "LEAST_CHUNKS", 1)
    case = cases.Case(gate, T=300, K=64, V=64, decay="slow", beta_max=2.0)
    check_interpreted_forward(case, monkeypatch)


def check_interpreted_forward(case, monkeypatch):
    interpreted_products(monkeypatch)
    x = cases.arrays(case, jnp.bfloat16)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        inputs, options = captured(case, x, monkeypatch)
        got = pallas_gpu.forward(inputs, options)
    with jax.enable_x64(True):
        wide = {n: a if n == "segment_ids" else np.asarray(a, np.float64) for n, a in x.items()}
        expected = cases.call(case, wide, "scan")
    for a, b in zip(got, expected, strict=True):
        assert cases.relative_error(a, b) < 5e-3


GRADIENTS = [
    # Rows and groups of heads.
    cases.Case("none", T=65, K=128, V=128, B=2, H=2, HV=4, beta_max=2.0),
    cases.Case("head", T=65, K=128, V=64, B=2, H=2, HV=4, decay="softplus"),
    cases.Case("channel", T=65, K=64, V=64, B=2, H=2, HV=4, decay="bounded"),
    cases.Case("none", T=130, K=64, V=64, segments="packed"),  # resets are decays
    cases.Case("none", T=130, K=64, V=64, keys="identical", beta_max=2.0, decay="zero", normalize=False),
    cases.Case("head", T=130, K=64, V=64, keys="identical", beta_max=2.0, decay="zero", normalize=False),
    cases.Case("head", T=65, K=64, V=64, decay="strong"),
    cases.Case("channel", T=130, K=128, V=64, H=1, HV=2, decay="softplus", segments="packed"),
    cases.Case("channel", T=130, K=64, V=128, H=1, HV=2, decay="bounded"),
    cases.Case("channel", T=130, K=64, V=64, keys="identical", beta_max=2.0, decay="zero", normalize=False),
    cases.Case("channel", T=65, K=64, V=64, decay="slow"),
    cases.Case("channel", T=130, K=64, V=64, decay="half50", beta_max=2.0, initial=False),
    cases.Case("channel", T=65, K=256, V=64, decay="softplus"),
    pytest.param(
        cases.Case("head", T=65, K=256, V=64, decay="softplus", segments="packed"), marks=pytest.mark.slow
    ),
    pytest.param(
        cases.Case("channel", T=130, K=256, V=128, H=1, HV=2, decay="bounded", segments="packed"),
        marks=pytest.mark.slow,
    ),
    pytest.param(
        cases.Case("channel", T=130, K=256, V=64, decay="bounded", segments="states"), marks=pytest.mark.slow
    ),
    pytest.param(cases.Case("none", T=130, K=64, V=64, H=1, HV=2, segments="states"), marks=pytest.mark.slow),
    cases.Case("head", T=130, K=64, V=64, decay="slow", segments="states"),
    pytest.param(
        cases.Case("channel", T=130, K=64, V=64, decay="bounded", segments="states"), marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_interpreted_backward_agrees_with_the_recurrence(case, monkeypatch):
    check_interpreted_backward(case, monkeypatch)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            cases.Case("head", T=65, K=64, V=64, decay="slow", beta_max=2.0), marks=pytest.mark.slow
        ),
        cases.Case("channel", T=65, K=64, V=64, decay="softplus"),
        pytest.param(
            cases.Case("channel", T=70, K=200, V=64, decay="half50", beta_max=2.0), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_interpreted_backward_of_float16(case, monkeypatch):
    check_interpreted_backward(case, monkeypatch, jnp.float16)


@pytest.mark.parametrize(
    "case",
    [
        # Also in halves of rows, below.
        pytest.param(
            cases.Case("head", T=300, K=64, V=64, H=1, HV=2, decay="slow", beta_max=2.0),
            marks=pytest.mark.slow,
        ),
        cases.Case("channel", T=300, K=64, V=64, decay="slow"),
        pytest.param(
            cases.Case("none", T=300, K=256, V=64, beta_max=2.0, normalize=False), marks=pytest.mark.slow
        ),
        pytest.param(
            cases.Case("channel", T=300, K=256, V=64, decay="slow", normalize=False), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_interpreted_backward_in_runs(case, monkeypatch):
    monkeypatch.setattr(delta_rule, "LEAST_CHUNKS", 1)
    monkeypatch.setattr(delta_rule, "MOST_RUNS", 3)  # of 2, 2 and 1 chunks
    check_interpreted_backward(case, monkeypatch)


@pytest.mark.parametrize(
    ("case", "runs"),
    [
        (cases.Case("head", T=260, K=64, V=64, H=1, HV=2, decay="slow", beta_max=2.0), 2),
        # The walks and what they tell are the same code for every gate.
        pytest.param(cases.Case("channel", T=130, K=64, V=64, decay="softplus"), 1, marks=pytest.mark.slow),
        pytest.param(
            cases.Case("none", T=260, K=80, V=80, decay="zero", beta_max=2.0), 2, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_interpreted_halves_of_rows_on_an_axis(case, runs, monkeypatch):
    """What a device does to the state and to its gradient is what it tells the others."""
    monkeypatch.setattr(delta_rule, "LEAST_CHUNKS", 1)
    monkeypatch.setattr(delta_rule, "MOST_RUNS", 3 if runs > 1 else 1)
    interpreted_products(monkeypatch)
    x = cases.arrays(case, jnp.bfloat16)
    x["do"] = x["do"].astype(jnp.bfloat16)
    whole, options = captured(case, x, monkeypatch)
    options = dataclasses.replace(options, axis_name="context")
    half, told = case.T // 2, []

    def of_half(tree, i):
        return jax.tree.map(lambda a: a[:, i * half : (i + 1) * half], tree)

    def tell(given):
        def between(added, moved, *rest):
            told.append(added + moved @ given)
            return given

        return between

    tokens = dict(q=whole.q, k=whole.k, v=whole.v, g=whole.g, beta=whole.beta)
    parts = [whole._replace(**of_half(tokens, i)) for i in range(2)]
    state, got, kept = whole.initial_state, {"o": []}, []
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        for part in parts:
            monkeypatch.setattr(context, "enter", tell(state))
            o, state, saved = pallas_gpu.saving(part, options)
            assert cases.relative_error(told[-1], state) < 1e-3
            got["o"].append(o)
            kept.append(saved)
        got["final_state"], dstate, gradients = state, jnp.asarray(x["dstate"]), []
        monkeypatch.setattr(context, "of_initial_state", lambda gradient, options: gradient)
        for i in (1, 0):
            monkeypatch.setattr(context, "leave", tell(dstate))
            do = of_half(jnp.asarray(x["do"]), i)
            found = pallas_gpu.backward(parts[i], options, do, jnp.zeros_like(dstate), *kept[i])
            dstate = found.initial_state
            assert cases.relative_error(told[-1], dstate) < 2e-3
            gradients.insert(0, found)
    expected = cases.reference(case, x)
    got |= {f"d{n}": [getattr(f, n) for f in gradients] for n in tokens if tokens[n] is not None}
    got = {n: jnp.concatenate(a, axis=1) if isinstance(a, list) else a for n, a in got.items()}
    got["dinitial_state"] = dstate
    for name, value in got.items():
        limit = 5e-3 if name in ("o", "final_state") else 2e-2 if name in ("dbeta", "dg") else 8e-3
        assert cases.relative_error(value, expected[name]) < limit, name


@pytest.mark.parametrize("packed", (False, True))
def test_interpreted_kernels_at_a_gates_bound(packed, monkeypatch):
    """Channels that all tokens decay by e^-5, others that they hardly do: the widest range of decays."""
    rng = np.random.default_rng(cases.SEED)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 192, 1, 64)), jnp.bfloat16) for _ in range(3))
    q, k = q * 30, k / 1000
    g = jnp.asarray(rng.choice([-40.0, 0.0, 40.0], size=64), jnp.float32) + jnp.zeros((1, 192, 1, 64))
    beta = jnp.ones((1, 192, 1))
    gate = ops.Gate(jnp.zeros(1), None, lower_bound=-5.0)
    # The second of three chunks has a reset and padding.
    ids = jnp.repeat(jnp.array([[1, 0, 2]]), jnp.array([70, 3, 119]), axis=1) if packed else None
    call = dict(q=q, k=k, v=v, g=g, beta=beta)
    if ids is not None:
        call = jax.tree.map(lambda x: jnp.where((ids == 0).reshape(1, 192, *[1] * (x.ndim - 2)), 0, x), call)
    exact = ops.kimi_delta_attention(
        **jax.tree.map(lambda x: x.astype(jnp.float32), call),
        gate=gate,
        normalize_qk=True,
        segment_ids=ids,
        implementation="scan",
    )
    interpreted_products(monkeypatch)
    monkeypatch.setattr(dispatch, "PALLAS", {"cpu": KERNEL})
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = ops.kimi_delta_attention(
            **call,
            gate=gate,
            normalize_qk=True,
            segment_ids=ids,
            padding_is_zero=packed,
            implementation="pallas",
        )
    for a, b in zip(got, exact, strict=True):
        assert cases.relative_error(a, b) < 5e-3


LIMITS = dict.fromkeys(("o", "final_state"), 5e-3) | dict.fromkeys(
    ("dbeta", "dg", "dA_log", "ddt_bias"), 2e-2
)


def check_interpreted_backward(case, monkeypatch, dtype=jnp.bfloat16, zero_padding=False):
    """What a differentiated call returns, and its gradients: with zero padding, at real tokens."""
    interpreted_products(monkeypatch)
    x = cases.arrays(case, dtype)
    x["do"] = x["do"].astype(dtype)
    there = {n: x["segment_ids"] != 0 for n in ("q", "k", "v", "g", "beta")} if zero_padding else {}
    for name in set(there) & {"q", "k", "v"}:
        x[name] = np.where(there[name][:, :, None, None], x[name], 0).astype(dtype)
    do, dstate = jnp.asarray(x["do"]), jnp.asarray(x["dstate"])
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        inputs, options = captured(case, x, monkeypatch, padding_is_zero=zero_padding)
        o, final_state, saved = pallas_gpu.saving(inputs, options)
        gradients = pallas_gpu.backward(inputs, options, do, dstate, *saved)
    assert saved
    got = {"o": o, "final_state": final_state}
    got |= {f"d{n}": gradient for n, gradient in gradients._asdict().items() if gradient is not None}
    expected = cases.reference(case, x)
    assert set(got) == set(expected)
    for name, value in got.items():
        value, wanted = np.asarray(value, np.float64), expected[name]
        if name[1:] in there:  # a gradient at padding may be anything
            value, wanted = value[there[name[1:]]], wanted[there[name[1:]]]
        assert cases.relative_error(value, wanted) < LIMITS.get(name, 8e-3), name


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_interpreted_backward_of_packed_rows_that_are_zero_at_padding(gate, monkeypatch):
    """As the layers call it: the kernels need not mask q, k and v."""
    case = cases.Case(gate, T=65, K=64, V=64, decay="softplus", segments="packed")
    check_interpreted_backward(case, monkeypatch, zero_padding=True)
