"""The Hopper kernels lowered for CUDA on the CPU: which kernels a program holds, and what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax import ops
from deltajax.ops import dispatch, pallas_gpu
from pallas_kernels.gpu import delta_rule, walks
from tests import cases
from tests.gpu.interpreted import captured

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

KERNEL = dispatch.PALLAS["cuda"]


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
