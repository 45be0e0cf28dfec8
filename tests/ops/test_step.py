"""`delta_rule_step`: the choice of a kernel, its derivative, vmap, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax import ops
from deltajax.ops import step_kernels
from deltajax.ops.step_kernels import StepKernel
from tests import cases
from tests.ops.step_cases import StepCase, arrays, call

CASE = StepCase("channel", K=8, V=4, H=1, HV=2, decay="softplus", dtype="float32")
OTHERS = [
    StepCase("none", K=8, V=4, B=3, H=2, HV=4, dtype="float32", beta_max=2.0),
    StepCase("head", K=8, V=4, HV=2, dtype="float32", decay="bounded", scale=0.5),
]


def marked(inputs, options):
    """A kernel whose results tell that it ran."""
    return jnp.full_like(inputs.v, 7.0), inputs.state + 1


ANY = StepKernel(marked, lambda inputs: None)
NONE = StepKernel(marked, lambda inputs: "never")


def install(monkeypatch, **kernels):
    monkeypatch.setattr(step_kernels, "STEP_KERNELS", kernels)


@pytest.mark.parametrize("case", [CASE, *OTHERS], ids=str)
def test_one_step_is_the_ops_first_token(case):
    x = arrays(case)
    o, state = call(case, x, None)
    sequence = {n: a[:, None] if n in ("q", "k", "v", "g", "beta") else a for n, a in x.items()}
    sequence["initial_state"] = sequence.pop("state")
    whole = cases.Case(case.gate, 1, case.K, case.V, case.B, case.H, case.HV, case.decay)
    expected, final = cases.call(whole, sequence, "scan")
    expected *= 1 if case.scale is None else case.scale * case.K**0.5
    assert cases.relative_error(o, expected[:, 0]) < 1e-6
    assert cases.relative_error(state, final) < 1e-6


def test_a_kernel_runs_where_it_takes_the_call_and_the_program_is_lowered_for_its_platform(monkeypatch):
    x = arrays(CASE)
    plain = call(CASE, x, "scan")
    for kernels, kernel_runs in [(dict(cpu=ANY), True), (dict(cpu=NONE), False), (dict(tpu=ANY), False)]:
        install(monkeypatch, **kernels)
        o, state = call(CASE, x, None)
        assert bool((o == 7).all()) == kernel_runs
        np.testing.assert_array_equal(state, x["state"] + 1 if kernel_runs else plain[1])
        np.testing.assert_array_equal(call(CASE, x, "scan")[0], plain[0])


def test_an_explicit_kernel_is_refused_with_the_reason_and_elsewhere_than_its_platform(monkeypatch):
    x = arrays(CASE)
    install(monkeypatch, tpu=NONE, cuda=NONE)
    with pytest.raises(NotImplementedError, match=r"no kernel for this step \(tpu: never; cuda: never\)"):
        call(CASE, x, "pallas")
    install(monkeypatch, tpu=ANY, cuda=NONE)
    with pytest.raises(NotImplementedError, match=r"kernel for this step on tpu only; .* lowered for cpu"):
        call(CASE, x, "pallas")
    with pytest.raises(ValueError, match="implementation must be 'pallas', 'scan' or None, got 'chunked'"):
        call(CASE, x, "chunked")


def test_a_kernels_derivative_is_that_of_the_definition(monkeypatch):
    x = arrays(CASE)

    cotangents = jax.tree.map(jnp.cos, call(CASE, x, "scan"))

    def gradients(implementation):
        @jax.jit
        def both(x):
            out, pull = jax.vjp(lambda x: call(CASE, x, implementation), x)
            return out, pull(cotangents)[0]

        return both(x)

    expected = gradients("scan")[1]
    install(monkeypatch, cpu=ANY)
    (o, _), got = gradients("pallas")
    assert (o == 7).all()
    for name, gradient in expected.items():
        assert np.abs(gradient).max() > 0, name
        assert cases.relative_error(got[name], gradient) < 1e-6, name


@pytest.mark.parametrize(("case", "own_gate"), [(OTHERS[0], False), (CASE, False), (CASE, True)], ids=str)
def test_vmap_is_one_step_of_more_rows_or_heads(case, own_gate):
    x, y = arrays(case), arrays(case, seed=5)
    shared = ("k",) if own_gate else ("A_log", "dt_bias")  # k: an array that is not mapped
    both = {n: x[n] if n in shared else jnp.stack([x[n], y[n]]) for n in x}
    axes = {n: None if n in shared else 0 for n in x}
    total = lambda results: sum(jnp.sum(jnp.sin(a)) for a in results)  # noqa: E731

    @jax.jit
    def mapped(x):
        run = jax.vmap(lambda x: call(case, x, None), in_axes=(axes,))
        return run(x), jax.grad(lambda x: total(run(x)))(x)

    @jax.jit
    def alone(x):
        return call(case, x, "scan"), jax.grad(lambda x: total(call(case, x, "scan")))(x)

    got, gradients = mapped(both)
    for i, one in enumerate((x, y)):
        expected, own = alone(one | {n: x[n] for n in shared if n in x})
        for a, b in zip(got, expected, strict=True):
            assert cases.relative_error(a[i], b) < 1e-6
        for name in set(one) - set(shared):
            assert cases.relative_error(gradients[name][i], own[name]) < 1e-5, name


def test_results_keep_their_dtypes_and_a_donated_state_is_overwritten():
    case = StepCase("head", K=8, V=4, decay="softplus", state="bfloat16")
    x = arrays(case)
    state = x.pop("state")
    step = jax.jit(lambda state, x: call(case, x | dict(state=state), None), donate_argnums=0)
    o, after = step(state, x)
    assert (o.dtype, after.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert state.is_deleted()


def test_the_steps_scale_is_named_where_it_is_no_number():
    x = arrays(CASE)
    with pytest.raises((TypeError, ValueError), match="scale"):
        ops.delta_rule_step(x["state"], x["q"], x["k"], x["v"], x["beta"], scale="0.1")
