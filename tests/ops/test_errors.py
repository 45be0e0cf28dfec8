"""Bad input to the ops: each message names the argument, what was seen and what fits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax import ops

B, T, H, HV, K, V, N = 2, 5, 2, 4, 8, 6, 3
ones = lambda *shape: np.ones(shape, np.float32)  # noqa: E731


def good():
    return dict(q=ones(B, T, H, K), k=ones(B, T, H, K), v=ones(B, T, HV, V), beta=ones(B, T, HV))


COMMON = {
    r"q must have 4 axes \[B, T, H, K\], got shape \(2, 5, 8\)": dict(q=ones(B, T, K)),
    r"k must have shape \[B, T, H, K\] = \(2, 5, 2, 8\), got \(2, 5, 2, 7\)": dict(k=ones(B, T, H, K - 1)),
    r"v must have 4 axes": dict(v=ones(B, T, V)),
    r"v must have shape .* got \(2, 4, 4, 6\)": dict(v=ones(B, T - 1, HV, V)),
    r"multiple of q's H = 2 heads .* got HV = 3": dict(v=ones(B, T, 3, V)),
    r"beta must have shape \[B, T, HV\] = \(2, 5, 4\), got \(2, 5, 2\)": dict(beta=ones(B, T, H)),
    r"q must have a floating dtype \(.*\), got int32": dict(q=np.ones((B, T, H, K), np.int32)),
    r"k must be an array, got list": dict(k=[1.0]),
    r"at least one token": dict(
        q=ones(B, 0, H, K), k=ones(B, 0, H, K), v=ones(B, 0, HV, V), beta=ones(B, 0, HV)
    ),
    r"head size K in 1\.\.256, got K = 300": dict(q=ones(B, T, H, 300), k=ones(B, T, H, 300)),
    r"head size V in 1\.\.512, got V = 600": dict(v=ones(B, T, HV, 600)),
    r"initial_state must have shape \[B, HV, K, V\]": dict(initial_state=ones(B, H, K, V)),
    r"initial_state must have shape \[B, N, HV, K, V\]": dict(
        initial_state=ones(B, HV, K, V), segment_ids=np.ones((B, T), np.int32), num_segments=N
    ),
    r"segment_ids must have shape \[B, T\] = \(2, 5\), got \(5,\)": dict(segment_ids=np.ones(T, np.int32)),
    r"segment_ids must have an integer dtype, got float32": dict(segment_ids=ones(B, T)),
    r"segment_ids must lie in 0\.\.3, got values from 1 to 4": dict(
        segment_ids=np.array([[1, 2, 2, 4, 4], [1] * 5], np.int32), num_segments=N
    ),
    r"segment_ids must lie in 0\.\.\d+, got values from -1": dict(
        segment_ids=np.array([[1, 2, 2, -1, 4], [1] * 5], np.int32)
    ),
    r"row 1 returns to an earlier id": dict(
        segment_ids=np.array([[1, 2, 2, 3, 3], [1, 2, 0, 1, 1]], np.int32), num_segments=N
    ),
    r"num_segments must be a static int >= 1 or None, got 0": dict(
        segment_ids=np.ones((B, T), np.int32), num_segments=0
    ),
    r"num_segments needs segment_ids": dict(num_segments=2),
    r"chunk_size must be a power of two >= 16 or None, got 48": dict(chunk_size=48),
    r"chunk_size must be a power of two >= 16 or None, got 8": dict(chunk_size=8),
    r"scale must be a static number or None, got ndarray": dict(scale=np.ones(1, np.float32)),
    r"implementation must be .* got 'triton'": dict(implementation="triton"),
}


def call(arguments):
    return positional(ops.delta_rule, arguments, "q", "k", "v", "beta")


def positional(op, arguments, *names):
    options = {n: a for n, a in arguments.items() if n not in names}
    return op(*(arguments[n] for n in names), **options)


@pytest.mark.parametrize("message", COMMON)
def test_bad_input_is_named(message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(good() | COMMON[message])


def test_pallas_is_refused_where_no_platform_has_a_kernel(monkeypatch):
    monkeypatch.setattr(ops.dispatch, "PALLAS", {})
    with pytest.raises(NotImplementedError, match="implementation='pallas' has no kernel"):
        call(good() | dict(implementation="pallas"))


GATE = ops.Gate(ones(HV), ones(HV))
GATED = {
    r"g must have shape \[B, T, HV\] = \(2, 5, 4\), got \(2, 5, 4, 8\)": dict(g=-ones(B, T, HV, K)),
    r"g must have a floating dtype \(.*\), got int32": dict(g=-np.ones((B, T, HV), np.int32)),
    r"g is a log decay and must be <= 0, got a maximum of 0.5": dict(g=0.5 * ones(B, T, HV)),
    r"gate must be a deltajax.ops.Gate, got tuple": dict(gate=(ones(HV), ones(HV))),
    r"gate.A_log must have shape \[HV\] = \(4,\), got \(2,\)": dict(gate=ops.Gate(ones(H))),
    r"gate.dt_bias must have shape \[HV\] = \(4,\)": dict(gate=ops.Gate(ones(HV), ones(HV, K))),
    r"gate.lower_bound must be a number < 0 or None, got 5.0": dict(gate=ops.Gate(ones(HV), None, 5.0)),
}


@pytest.mark.parametrize("message", GATED)
def test_bad_gates_are_named(message):
    x = good() | dict(g=-ones(B, T, HV)) | GATED[message]
    with pytest.raises((ValueError, TypeError), match=message):
        positional(ops.gated_delta_rule, x, "q", "k", "v", "g", "beta")


def test_a_per_channel_gate_needs_per_channel_shapes():
    x = good()
    with pytest.raises(ValueError, match=r"g must have shape \[B, T, HV, K\]"):
        ops.kimi_delta_attention(x["q"], x["k"], x["v"], -ones(B, T, HV), x["beta"])
    with pytest.raises(ValueError, match=r"gate.dt_bias must have shape \[HV, K\]"):
        ops.kimi_delta_attention(x["q"], x["k"], x["v"], -ones(B, T, HV, K), x["beta"], gate=GATE)


def test_positive_log_decay_is_refused_where_visible_and_the_callers_promise_under_jit():
    x = good()
    args = x["q"], x["k"], x["v"], 1e-3 * ones(B, T, HV), x["beta"]
    with pytest.raises(ValueError, match="g is a log decay and must be <= 0"):
        ops.gated_delta_rule(*args)
    assert np.isfinite(jax.jit(ops.gated_delta_rule)(*args)[0]).all()
    captured = args[3]  # closed over by a traced function: still visible
    with pytest.raises(ValueError, match="g is a log decay"):
        jax.jit(lambda q: ops.gated_delta_rule(q, x["k"], x["v"], captured, x["beta"]))(x["q"])
    with pytest.raises(ValueError, match="g is a log decay"):
        ops.delta_rule_step(
            ones(B, HV, K, V), *(a[:, 0] for a in (x["q"], x["k"], x["v"], x["beta"])), args[3][:, 0]
        )


def test_a_log_decay_at_padding_may_be_anything():
    x = good()
    g = np.where(np.arange(T)[:, None] < 2, 1.0, -1.0) * ones(B, T, HV)
    ids = np.array([[0, 0, 1, 1, 2]] * B)
    o, _ = ops.gated_delta_rule(x["q"], x["k"], x["v"], g, x["beta"], segment_ids=ids)
    assert np.isfinite(o).all()
    with pytest.raises(ValueError, match="g is a log decay"):
        ops.gated_delta_rule(x["q"], x["k"], x["v"], -g, x["beta"], segment_ids=ids)


def test_arrays_split_over_explicit_axes_are_named():
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    rows = jax.NamedSharding(mesh, jax.P("rows"))
    x = {name: jax.device_put(a, rows) for name, a in good().items()}
    for run in (call, jax.jit(call)):
        with pytest.raises(ValueError, match=r"q is split over explicit axes of a mesh, .*'rows'"):
            run(x)
    with pytest.raises(ValueError, match="x is split over explicit axes"):
        ops.short_convolution(jax.device_put(ones(B, T, K), rows), ones(K, 4))
    inside = jax.shard_map(call, mesh=mesh, in_specs=(jax.P("rows"),), out_specs=jax.P("rows"))
    np.testing.assert_allclose(inside(x)[0], call(good())[0], atol=1e-6)


STEP = {
    r"state must have shape \[B, HV, K, V\] = \(2, 4, 8, 6\), got \(2, 4, 6, 8\)": dict(
        state=ones(B, HV, V, K)
    ),
    r"q must have 3 axes \[B, H, K\]": dict(q=ones(B, 1, H, K)),
    r"beta must have shape \[B, HV\]": dict(beta=ones(B, H)),
    r"g must have shape \[B, HV\]": dict(g=-ones(B, H)),
    r"g must have shape \[B, HV, K\]": dict(g=-ones(B, HV, V)),
    r"gate needs the raw gate projection g": dict(gate=GATE),
    r"multiple of q's H = 2": dict(v=ones(B, 3, V)),
}


@pytest.mark.parametrize("message", STEP)
def test_bad_steps_are_named(message):
    x = dict(state=ones(B, HV, K, V), q=ones(B, H, K), k=ones(B, H, K), v=ones(B, HV, V), beta=ones(B, HV))
    x |= STEP[message]
    with pytest.raises((ValueError, TypeError), match=message):
        positional(ops.delta_rule_step, x, "state", "q", "k", "v", "beta")


def test_outputs_keep_the_values_dtype_and_states_are_float32():
    x = {n: jnp.asarray(a, jnp.bfloat16) for n, a in good().items()}
    for implementation in ("scan", "chunked"):
        o, state = call(x | dict(implementation=implementation))
        assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
