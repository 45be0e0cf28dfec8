"""The Hopper kernels on the CPU: the GPU interpreter against the recurrence, and lowering for CUDA.

The interpreter knows no wgmma with registers on its left and no inline code, so matrix products and rows
gathered from shared memory are replaced by their meaning here; `python -m benchmarks.hopper --check` runs the
real ones on a card. Everything else of the kernels runs: copies, barriers, indices, masks, decays.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from deltajax import ops
from deltajax.ops import context, dispatch, pallas_gpu
from pallas_kernels.gpu import delta_rule, rowwise, tiles, walks
from tests import cases

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

KERNEL = dispatch.PALLAS["cuda"]


def value(x):
    x = x() if callable(x) else x
    x = x if isinstance(x, jax.Array) else x[...]
    return x.astype(jnp.float32)


def add_up(pairs):
    return sum(jnp.dot(value(a), value(b), precision="highest") for a, b in pairs)


def interpreted_products(monkeypatch):
    monkeypatch.setattr(tiles, "product", lambda n, *pairs: add_up(pairs))
    monkeypatch.setattr(tiles, "products", lambda n, *sums: tuple(map(add_up, sums)))
    monkeypatch.setattr(
        tiles, "product_beside", lambda n, first, second, use: (use(add_up(first)), add_up(second))
    )
    monkeypatch.setattr(tiles, "add_products", lambda *sums: tuple(x + add_up(pairs) for x, pairs in sums))

    def looped_products(n, count, num, turn):
        def add(j, sums):
            pairs, done = turn(j)
            sums = [x + add_up(p) for x, p in zip(sums, pairs, strict=True)]
            done()
            return sums

        return jax.lax.fori_loop(0, count, add, [jnp.zeros((64, n), jnp.float32)] * num)

    monkeypatch.setattr(tiles, "looped_products", looped_products)
    monkeypatch.setattr(rowwise, "gather", lambda ref, index, n, together=False: ref[...][index])
    monkeypatch.setattr(rowwise, "corner", lambda near, far: near.at[32:, :32].set(far[32:]))
    monkeypatch.setattr(tiles, "meet", plgpu.commit_smem)

    def diagonal_inverse(a):
        place = jnp.arange(64) // 16
        block = jnp.where(place[:, None] == place, a, 0)
        eye = jnp.eye(64)
        # Powers of identical keys' blocks would overflow what is left of their differences.
        return jax.lax.fori_loop(0, 64, lambda i, x: x.at[i].set(eye[i] - block[i] @ x), jnp.zeros((64, 64)))

    monkeypatch.setattr(rowwise, "diagonal_inverse", diagonal_inverse)

    def scatter(ref, index, x):
        ref[...] = x  # every use has index = 0..63

    def keep_level(x, s):
        meet = jnp.arange(64)[:, None] ^ jnp.arange(64)
        return jnp.where(meet >> s == 1, x, 0)

    monkeypatch.setattr(rowwise, "scatter", scatter)
    monkeypatch.setattr(rowwise, "keep_level", keep_level)
    monkeypatch.setattr(rowwise, "pick_level", lambda xs, level: tuple(keep_level(x, level[0]) for x in xs))


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
    cases.Case("none", T=130, K=128, V=128, H=1, HV=2, beta_max=2.0),
    cases.Case("none", T=130, K=64, V=64, segments="packed"),  # resets are decays
    cases.Case("none", T=130, K=64, V=64, keys="identical", beta_max=2.0, decay="zero", normalize=False),
    cases.Case("head", T=130, K=64, V=64, keys="identical", beta_max=2.0, decay="zero", normalize=False),
    cases.Case("head", T=130, K=128, V=64, H=1, HV=2, decay="softplus"),
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        cases.Case("head", T=65, K=64, V=64, decay="slow", beta_max=2.0),
        cases.Case("channel", T=65, K=64, V=64, decay="softplus"),
        cases.Case("channel", T=70, K=200, V=64, decay="half50", beta_max=2.0),
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


@pytest.mark.parametrize("gated", (False, True))
def test_zeros_at_padding_need_no_masked_copies(gated):
    """A gradient's program for CUDA selects among q, k and v only where zeros were not promised."""
    x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    beta, ids = jax.ShapeDtypeStruct((1, 128, 2), jnp.float32), jax.ShapeDtypeStruct((1, 128), jnp.int32)

    def program(padding_is_zero):
        def total(q, k, v, g, beta, ids):
            options = dict(segment_ids=ids, padding_is_zero=padding_is_zero, implementation="pallas")
            op = partial(ops.gated_delta_rule, g=g) if gated else ops.delta_rule
            return op(q=q, k=k, v=v, beta=beta, **options)[0].astype(jnp.float32).sum()

        traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(x, x, x, beta, beta, ids)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        return sum("stablehlo.select" in line and "1x128x2x64xbf16" in line for line in text.splitlines())

    assert program(False) > 0
    assert program(True) == 0


def check_interpreted_backward(case, monkeypatch, dtype=jnp.bfloat16):
    interpreted_products(monkeypatch)
    x = cases.arrays(case, dtype)
    x["do"] = x["do"].astype(dtype)
    do, dstate = jnp.asarray(x["do"]), jnp.asarray(x["dstate"])
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        inputs, options = captured(case, x, monkeypatch)
        _, _, saved = pallas_gpu.saving(inputs, options)
        got = pallas_gpu.backward(inputs, options, do, dstate, *saved)
    assert saved
    expected = cases.reference(case, x)
    for name, gradient in got._asdict().items():
        if gradient is not None:
            limit = 2e-2 if name in ("beta", "g", "A_log", "dt_bias") else 8e-3
            assert cases.relative_error(gradient, expected[f"d{name}"]) < limit, name


def captured(case, x, monkeypatch):
    """The `Inputs` and `Options` of a call of the public op."""
    seen = []

    def run(inputs, options, implementation):
        seen.append((inputs, options))
        return inputs.v, None

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "run", run)
        cases.call(case, {n: jnp.asarray(a) for n, a in x.items()}, "pallas")
    return seen[0]


LOWERED = [
    cases.Case("none", T=1, K=16, V=16, B=4, H=2, HV=4),
    cases.Case("none", T=4100, K=128, V=128),  # in runs
    cases.Case("head", T=130, K=64, V=256, decay="slow"),
    cases.Case("head", T=130, B=2, HV=2, segments="packed", decay="slow", V=16),
    cases.Case("channel", T=128, K=128, V=128, B=80, HV=2, decay="softplus"),  # two warpgroups a block
    cases.Case("channel", T=65, K=100, V=100, decay="reset"),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", LOWERED, ids=str)
def test_lowers_for_cuda(case, dtype, monkeypatch):
    monkeypatch.setattr(dispatch, "PALLAS", {"cuda": KERNEL})
    x = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), cases.arrays(case, jnp.dtype(dtype)))
    lowered = jax.jit(lambda x: cases.call(case, x, "pallas")).trace(x).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(
    ("case", "runs"),
    [
        (cases.Case("none", T=4100, K=128, V=128), True),
        (cases.Case("none", T=130, K=64, V=256, HV=2, segments="packed"), False),
        (cases.Case("head", T=130, K=256, V=512), False),
        (cases.Case("channel", T=65, K=256, V=64, decay="softplus"), False),
    ],
    ids=str,
)
def test_backward_lowers_for_cuda(case, runs, monkeypatch):
    monkeypatch.setattr(dispatch, "PALLAS", {"cuda": KERNEL})
    arrays = cases.arrays(case, jnp.dtype(jnp.bfloat16))
    x = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)
    traced = jax.jit(lambda x: cases.outputs_and_gradients(case, x, "pallas")).trace(x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "delta_walk_back" in text
    assert ("channel_gradients" if case.gate == "channel" else "head_gradients") in text
    assert ("delta_runs_back" in text) == runs


@pytest.mark.parametrize("gate", cases.GATES)
def test_lowers_inside_shard_map(gate, monkeypatch):
    monkeypatch.setattr(dispatch, "PALLAS", {"cuda": KERNEL})
    decay = "random" if gate == "none" else "softplus"
    case = cases.Case(gate, T=2100, K=64, V=64, B=2, HV=2, decay=decay)  # in runs, from an initial state
    arrays = cases.arrays(case, jnp.dtype(jnp.bfloat16))
    x = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in arrays.items() if n not in ("do", "dstate")}
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.P("data")
    specs = {n: jax.P() if n in ("A_log", "dt_bias") else rows for n in x}
    op = jax.shard_map(
        lambda x: cases.call(case, x, "pallas"), mesh=mesh, in_specs=(specs,), out_specs=(rows, rows)
    )
    with jax.sharding.use_abstract_mesh(mesh):
        loss = lambda x: sum(jnp.sum(jnp.square(y.astype(jnp.float32))) for y in op(x))  # noqa: E731
        lowered = jax.jit(jax.grad(loss)).trace(x).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert ("channel_gradients" if gate == "channel" else "head_gradients") in text
    assert "all_gather" not in text


def test_tokens_on_an_axis_lower_to_runs_and_one_walk(monkeypatch):
    monkeypatch.setattr(dispatch, "PALLAS", {"cuda": KERNEL})
    case = cases.Case("head", T=512, K=64, V=64, HV=2, decay="softplus")
    x = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in cases.arrays(case, jnp.bfloat16).items()}
    mesh = jax.sharding.AbstractMesh((2,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
    tokens = jax.P(None, "context")
    specs = {n: tokens if n in ("q", "k", "v", "g", "beta", "do") else jax.P() for n in x}
    op = jax.shard_map(
        lambda x: cases.call(case, x, "pallas", axis_name="context"),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(tokens, jax.P()),
    )
    with jax.sharding.use_abstract_mesh(mesh):
        loss = lambda x: sum(jnp.sum(jnp.square(y.astype(jnp.float32))) for y in op(x))  # noqa: E731
        text = jax.jit(jax.grad(loss)).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert all(name in text for name in ("delta_runs", "delta_walk", "delta_runs_back", "delta_walk_back"))
    assert "all_gather" in text
    assert "256x2x128" not in text  # values [v | 0] of this device


def test_few_heads_walk_in_runs():
    def plan(B, T, HV, V=128, K=128):
        return delta_rule.plan(jax.ShapeDtypeStruct((B, T, HV, V), jnp.bfloat16), K, channel=False)

    assert plan(16, 2048, 16) == walks.Plan(warpgroups=2, stages=3)
    assert plan(1, 32768, 16) == walks.Plan(warpgroups=1, stages=3, runs=4)
    assert plan(1, 2048, 16).runs == 1  # too short
    assert plan(4, 8192, 16).runs == 1  # heads enough
    assert plan(16, 2048, 16, K=256) == walks.Plan(warpgroups=1, stages=2)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (dict(dtype="float32"), "must be all bfloat16 or all float16"),
        (dict(chunk_size=32), "chunk_size is 64"),
    ],
)
def test_says_what_it_does_not_support(change, why, monkeypatch):
    monkeypatch.setattr(dispatch, "PALLAS", {"cuda": KERNEL})
    case = cases.Case(
        change.get("gate", "none"), T=64, K=change.get("K", 64), V=64, segments=change.get("segments", "none")
    )
    x = cases.arrays(case, jnp.dtype(change.get("dtype", "bfloat16")))
    with pytest.raises(NotImplementedError, match=why):
        cases.call(case, x, "pallas", change.get("chunk_size"))


@pytest.mark.parametrize(
    "case",
    [
        cases.Case("head", T=64, K=256, V=64),
        cases.Case("channel", T=64, K=256, V=64),
        cases.Case("head", T=64, K=64, V=64, segments="states"),
    ],
    ids=str,
)
def test_kernels_are_the_default_where_they_support_the_call(case, monkeypatch):
    monkeypatch.setattr(dispatch, "PALLAS", {"cuda": KERNEL})
    x = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), cases.arrays(case, jnp.dtype("bfloat16"))
    )
    traced = jax.jit(lambda x: cases.call(case, x, None)).trace(x)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("segments", ["packed", "states"])
def test_nan_in_a_padded_tokens_gate_reaches_no_gradient(segments, monkeypatch):
    case = cases.Case("head", T=130, K=64, V=64, decay="softplus", segments=segments)
    x = cases.arrays(case, jnp.bfloat16)
    x["g"] = np.where(x["segment_ids"][..., None] == 0, np.nan, x["g"]).astype(x["g"].dtype)
    inputs, options = captured(case, x, monkeypatch)

    def total(A_log, g):
        return pallas_gpu._call(inputs._replace(A_log=A_log, g=g), options)[4].sum()

    for gradient in jax.grad(total, argnums=(0, 1))(inputs.A_log, inputs.g):
        assert jnp.all(jnp.isfinite(gradient.astype(jnp.float32)))
