"""The Hopper kernels of a mixture's experts on the CPU: the GPU interpreter, and lowering for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractMesh, AxisType

from deltajax.layers import expert_rows, shard_ops
from deltajax.layers.experts import Experts
from pallas_kernels.gpu import grouped
from tests.cases import relative_error

E, D, F, T, J = 3, 128, 256, 60, 4  # products with 256 columns are of two warpgroups, with 128 of one


def outputs_and_gradients(dtype, choice, implementation=None, seed=0):
    rng = np.random.default_rng(seed)
    x, dy = (jnp.asarray(rng.normal(size=(1, T, D)), jnp.bfloat16).astype(dtype) for _ in range(2))
    weight = jnp.asarray(rng.uniform(0.1, 1, size=choice.shape), jnp.float32)
    layer = Experts(
        hidden_size=D,
        intermediate_size=F,
        num_experts=E,
        initializer_range=0.1,
        dtype=dtype,
        implementation=implementation,
        rngs=nnx.Rngs(1),
    )
    graph, state = nnx.split(layer)
    state = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), state)

    @jax.jit
    def run(x, weight, state):
        y, pull = jax.vjp(
            lambda x, weight, state: nnx.merge(graph, state)(x, choice, weight), x, weight, state
        )
        return y, *jax.tree.leaves(pull(dy))

    names = ("y", "dx", "dweight", "down", "gate", "up")
    return dict(zip(names, run(x, weight, state), strict=True))


@pytest.mark.parametrize("dtype", (jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)))
def test_interpreted_kernels_are_the_experts(dtype, monkeypatch):
    """One expert has most rows, one none, and some tokens choose no expert."""
    rng = np.random.default_rng(3)
    choice = rng.choice([0, 0, 0, 2, E], size=(1, T, J))
    choice = jnp.asarray(choice, jnp.int32)
    exact = outputs_and_gradients(jnp.float32, choice)
    monkeypatch.setattr(expert_rows, "KERNEL_ROWS", {"cpu": expert_rows.Blocks})
    jax.clear_caches()
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = outputs_and_gradients(dtype, choice, "pallas")
    jax.clear_caches()
    for name, expected in exact.items():
        assert relative_error(got[name], expected) < 1e-2, name
        if name in ("gate", "up", "down"):
            assert not np.any(np.asarray(got[name][1]))  # nobody chose it
            assert relative_error(got[name][2], expected[2]) < 1e-2, name


def layer_of(implementation, dtype=jnp.bfloat16, hidden=D, width=F):
    return Experts(
        hidden_size=hidden,
        intermediate_size=width,
        num_experts=8,
        dtype=dtype,
        implementation=implementation,
        rngs=nnx.Rngs(1),
    )


def lowered(layer, sharded):
    """The text of the layer's forward and backward program for CUDA."""
    graph, state = nnx.split(layer)
    x = jax.ShapeDtypeStruct((4, 64, layer.gate_proj.shape[1]), layer.dtype)
    choice, weight = (jax.ShapeDtypeStruct((4, 64, J), t) for t in (jnp.int32, jnp.float32))

    def loss(x, weight, state, choice):
        return nnx.merge(graph, state)(x, choice, weight).astype(jnp.float32).sum()

    mesh = AbstractMesh((2, 2), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    with shard_ops(mesh, ("data", "expert") if sharded else None, experts="expert" if sharded else None):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x, weight, state, choice)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_it_lowers_for_cuda_on_a_mesh_with_a_kernel_for_every_product():
    text = lowered(layer_of("pallas"), sharded=True)
    assert text.count("grouped_product") >= 5 and text.count("grouped_outer") >= 3
    assert "ragged_dot" not in text


def test_they_are_the_default_where_they_support_the_layer():
    text = lowered(layer_of(None), sharded=True)
    assert "grouped_product" in text and "ragged_dot" not in text
    text = lowered(layer_of(None, dtype=jnp.float32), sharded=False)
    assert "grouped_" not in text and "ragged_dot" in text


def test_few_rows_take_no_kernels_unasked():
    graph, state = nnx.split(layer_of(None))
    x, choice, weight = (
        jax.ShapeDtypeStruct((4, 1, n), t) for n, t in ((D, jnp.bfloat16), (2, jnp.int32), (2, jnp.float32))
    )
    traced = jax.jit(lambda *args: nnx.merge(graph, state)(*args)).trace(x, choice, weight)
    assert "grouped_" not in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("tiling", (grouped.Tiling(1, 3), grouped.Tiling(2, 2)))
def test_other_tilings_lower_for_cuda(tiling, monkeypatch):
    monkeypatch.setattr(grouped, "PRODUCT", tiling)
    monkeypatch.setattr(grouped, "OUTER", tiling)
    f16, i32 = jnp.bfloat16, jnp.int32
    x, y, matrices = (jax.ShapeDtypeStruct(s, f16) for s in ((256, 384), (256, 256), (3, 384, 256)))
    group, used, starts = (jax.ShapeDtypeStruct((n,), i32) for n in (2, 1, 3))

    def both(x, y, matrices, group, used, starts):
        return grouped.grouped_product(x, matrices, group, used), grouped.grouped_outer(x, y, starts, starts)

    traced = jax.jit(both).trace(x, y, matrices, group, used, starts)
    assert "grouped_outer" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("options", "platform", "why"),
    [
        (dict(dtype=jnp.float32), "cuda", "x must be bfloat16 or float16, got float32"),
        (dict(hidden=96), "cuda", "hidden_size is a multiple of 128, got 96"),
        (dict(width=64), "cuda", "intermediate_size is a multiple of 128, got 64"),
        (dict(), "cpu", "on cuda only; this program is lowered for cpu"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(options, platform, why):
    layer = layer_of("pallas", **options)
    x = jnp.ones((1, 4, layer.gate_proj.shape[1]), layer.dtype)
    traced = jax.jit(layer).trace
    choice = jnp.zeros((1, 4, J), jnp.int32)
    with pytest.raises(NotImplementedError, match=why):
        traced(x, choice, choice.astype(jnp.float32)).lower(lowering_platforms=(platform,))


def test_another_implementation_is_an_error():
    with pytest.raises(ValueError, match="implementation='ragged': expected 'pallas' or None"):
        layer_of("ragged")
