"""The ops under JAX's transformations, and how an implementation is chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax import ops
from deltajax.ops import chunked, dispatch
from tests import cases
from tests.cases import Case

CASE = Case("channel", T=33, B=2, K=16, V=8, decay="slow", segments="packed")
implementations = pytest.mark.parametrize("implementation", ("scan", "chunked", None))


@pytest.fixture
def x():
    return jax.tree.map(jnp.asarray, cases.arrays(CASE, np.float32))


def loss(x, implementation):
    o, state = cases.call(CASE, x, implementation)
    return jnp.sum(o * x["do"]) + jnp.sum(state * x["dstate"])


def gradients(x, implementation, transform=lambda f: f):
    floats = {n: a for n, a in x.items() if n != "segment_ids"}
    f = transform(lambda floats: loss({**x, **floats}, implementation))
    return jax.grad(f)(floats)


def assert_trees_close(a, b, tolerance=1e-5):
    for got, expected in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert cases.relative_error(got, expected) < tolerance


@implementations
def test_jit_changes_nothing(x, implementation):
    eager = cases.call(CASE, x, implementation)
    assert_trees_close(jax.jit(lambda x: cases.call(CASE, x, implementation))(x), eager)


@implementations
def test_remat_changes_no_gradient(x, implementation):
    assert_trees_close(
        gradients(x, implementation, jax.checkpoint), gradients(x, implementation), tolerance=1e-6
    )


@implementations
def test_vmap_equals_a_loop_in_outputs_and_gradients(x, implementation):
    stacked = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), x)
    mapped = jax.vmap(functools.partial(gradients, implementation=implementation))(stacked)
    for i in range(2):
        one = gradients(jax.tree.map(lambda a, i=i: a[i], stacked), implementation)
        assert_trees_close(jax.tree.map(lambda a, i=i: a[i], mapped), one)


@implementations
def test_gradient_of_a_scan_over_layers_equals_the_unrolled_loop(x, implementation):
    """Three applications, each fed the last one's output and final state."""

    def layer(carry, k):
        v, state = carry
        o, state = cases.call(CASE, {**x, "v": v, "k": k, "initial_state": state}, implementation)
        return (o, state), None

    ks = jnp.stack([x["k"], 2 * x["k"], x["k"][::-1]])

    def scanned(v, state, ks):
        (v, state), _ = jax.lax.scan(layer, (v, state), ks)
        return jnp.sum(v * x["do"]) + jnp.sum(state * x["dstate"])

    def unrolled(v, state, ks):
        for k in ks:
            (v, state), _ = layer((v, state), k)
        return jnp.sum(v * x["do"]) + jnp.sum(state * x["dstate"])

    args = (x["v"], x["initial_state"], ks)
    assert_trees_close(*(jax.grad(f, argnums=(0, 1, 2))(*args) for f in (scanned, unrolled)))


def test_second_derivatives_of_the_chunked_form_are_the_scans(x):
    def sizes(implementation):
        found = jax.grad(lambda q: jnp.sum(gradients({**x, "q": q}, implementation)["v"] ** 2))
        return jax.jit(found)(x["q"])

    assert cases.relative_error(sizes("chunked"), sizes("scan")) < 1e-5


@implementations
def test_segment_ids_take_float0_cotangents(x, implementation):
    grads = jax.grad(loss, allow_int=True)(x, implementation)
    assert grads["segment_ids"].dtype == jax.dtypes.float0
    _, pull = jax.vjp(
        lambda ids: cases.call(CASE, {**x, "segment_ids": ids}, implementation), x["segment_ids"]
    )
    (cotangent,) = pull((x["do"], x["dstate"]))
    assert cotangent.dtype == jax.dtypes.float0


def test_gate_is_a_pytree_whose_bound_is_static():
    gate = ops.Gate(jnp.zeros(2), jnp.zeros(2), lower_bound=-5.0)
    assert len(jax.tree.leaves(gate)) == 2
    assert jax.jit(lambda gate: gate.A_log + gate.lower_bound)(gate)[0] == -5


def test_the_backward_pass_keeps_only_the_inputs(x):
    """No state, no chunk matrix, nothing of length T x K x V lives from forward to backward."""
    _, pull = jax.vjp(lambda q: cases.call(CASE, {**x, "q": q}, "chunked"), x["q"])
    kept = sum(a.size for a in jax.tree.leaves(pull) if hasattr(a, "size"))
    inputs = sum(a.size for n, a in x.items() if n not in ("do", "dstate"))
    assert kept <= inputs + 16


@pytest.fixture
def fake_kernel(monkeypatch):
    """A "tpu" kernel that returns the chunked results times 3."""
    triple = functools.partial(jax.tree.map, lambda a: 3 * a)
    kernel = dispatch.Kernel(
        forward=lambda inputs, options: triple(chunked.forward(inputs, options)),
        backward=lambda inputs, options, *cts: triple(chunked.backward(inputs, options, *cts)),
        unsupported=lambda inputs, options: "K = 8 is too small" if inputs.q.shape[-1] == 8 else None,
    )
    monkeypatch.setattr(dispatch, "PALLAS", {"tpu": kernel})


def lowered_text(x, implementation, platform):
    f = jax.jit(lambda x: gradients(x, implementation))
    return f.trace(x).lower(lowering_platforms=(platform,)).as_text()


def test_the_kernel_is_chosen_by_the_platform_a_program_is_lowered_for(x, fake_kernel):
    with_kernel, without = (lowered_text(x, None, p) for p in ("tpu", "cpu"))
    assert "dense<3.000000e+00>" in with_kernel
    assert "dense<3.000000e+00>" not in without
    assert_trees_close(cases.call(CASE, x, None), cases.call(CASE, x, "chunked"), 1e-7)  # runs on the CPU


def test_pallas_without_a_kernel_for_the_call_says_why(x, fake_kernel):
    small = Case("none", T=4, K=8, V=8)
    with pytest.raises(NotImplementedError, match="K = 8 is too small"):
        cases.call(small, cases.arrays(small, np.float32), "pallas")
    assert "dense<3.000000e+00>" in lowered_text(x, "pallas", "tpu")


def test_pallas_on_a_platform_without_kernels_refuses_to_lower(x, fake_kernel):
    with pytest.raises(NotImplementedError, match=r"on tpu only; this program is lowered for cpu"):
        lowered_text(x, "pallas", "cpu")


def test_ops_lower_for_tpu_and_cuda_on_this_machine(x):
    for platform in ("tpu", "cuda", "cpu"):
        assert "stablehlo.dot_general" in lowered_text(x, None, platform)


def test_kernels_lower_under_x64_too():
    """Indices are then of 64 bits where nobody says otherwise, and so are ids."""
    case = Case("channel", T=70, K=64, V=64, decay="bounded", segments="packed", bias=False)
    with jax.enable_x64(True):
        x = {n: jnp.asarray(a) for n, a in cases.arrays(case, jnp.bfloat16).items()}
        x["segment_ids"] = x["segment_ids"].astype(np.int64)
        both = jax.jit(lambda x: cases.with_gradients(lambda x: cases.call(case, x, None), x))
        text = both.trace(x).lower(lowering_platforms=("cuda",)).as_text()
        assert "channel_gradients" in text and "delta_walk_back" in text
        # Kernels refuse numbers of 64 bits: then the chunked form runs everywhere, with a state as wide.
        x["beta"] = x["beta"].astype(np.float64)
        assert jax.eval_shape(both, x)["final_state"].dtype == np.float64

        q, k, v = (x[n][:, 0] for n in "qkv")
        state, beta = jnp.zeros((1, 1, 64, 64), jnp.float32), jnp.ones((1, 1), jnp.float32)
        step = jax.jit(lambda *args: ops.delta_rule_step(*args))
        step.trace(state, q, k, v, beta).lower(lowering_platforms=("cuda",))
        taps = jax.jit(lambda x, w: ops.short_convolution(x, w)[0])
        taps.trace(x["q"][:, :, 0], jnp.ones((64, 4), jnp.float32)).lower(lowering_platforms=("cuda",))


def test_importing_the_ops_starts_no_backend():
    import subprocess
    import sys

    code = (
        "import deltajax.ops, deltajax.layers, deltajax.models\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, xla_bridge._backends"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
