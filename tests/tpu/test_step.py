"""The TPU step kernel: Pallas' interpreter against the recurrence in float64, and compiled in place."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from deltajax.layers import KimiDeltaAttention, shard_ops
from deltajax.ops import step_kernels
from deltajax.ops.step_kernels import StepKernel
from tests.ops import step_cases
from tests.ops.step_cases import STEPS, StepCase, arrays, call
from tests.tpu.programs import exchanges
from train import tpu_aot

KERNEL = step_kernels.STEP_KERNELS["tpu"]
QUICK = [STEPS[i] for i in (1, 2, 5, 7, 8)]
SUPPORTED = [c for c in STEPS if c.dtype != "float16"]
MIB = 2**20


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=str(c), marks=[] if c in QUICK else [pytest.mark.slow]) for c in SUPPORTED]
)
def test_interpreted_step_agrees_with_the_recurrence(case, monkeypatch):
    run = partial(step_kernels.run_tpu, interpret=pltpu.InterpretParams())
    monkeypatch.setattr(step_kernels, "STEP_KERNELS", {"cpu": StepKernel(run, KERNEL.unsupported)})
    x = arrays(case)
    got = jax.jit(lambda x: call(case, x, "pallas"))(x)
    for name, error in step_cases.relative_errors(case, x, got).items():
        assert error < step_cases.tolerance(case, name), name


COMPILED = {
    "kda": StepCase("channel", K=128, V=128, B=32, H=32, HV=32, decay="softplus"),
    "kda bounded": StepCase("channel", K=128, V=128, B=2, H=16, HV=32, decay="bounded"),
    "odd heads": StepCase("head", B=2, HV=3, decay="softplus", dtype="float32"),
    "wide": StepCase("none", K=256, V=512, B=2, H=4, HV=8, state="bfloat16"),
}
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


needs_libtpu = pytest.mark.skipif(
    not tpu_aot.available(), reason="libtpu cannot be imported: uv run --with libtpu pytest"
)


@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_in_place(name, topology):
    case = COMPILED[name]
    rows = ("state", "q", "k", "v", "beta", "g")
    x = {
        n: jax.ShapeDtypeStruct((case.B, *a.shape[1:]) if n in rows else a.shape, a.dtype)
        for n, a in arrays(dataclasses.replace(case, B=1)).items()
    }
    state = x.pop("state")
    run = jax.jit(lambda state, x: call(case, x | dict(state=state), None), donate_argnums=0)
    compiled = tpu_aot.compile_for(run, (state, x), topology)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= state.size * state.dtype.itemsize
    assert memory.temp_size_in_bytes < MIB


@needs_libtpu
@pytest.mark.parametrize("bias", [True, False])
def test_compiles_inside_a_checked_shard_map(bias):
    case = dataclasses.replace(COMPILED["kda"], B=1)
    mesh = tpu_aot.mesh_for("v6e:2x2", (4,), ("heads",))
    by_head = {"A_log": jax.P("heads"), "dt_bias": jax.P("heads")}
    x = {n: a for n, a in arrays(case).items() if bias or n != "dt_bias"}
    specs = {n: by_head.get(n, jax.P(None, "heads")) for n in x}

    def run(x):
        return call(case, {"dt_bias": None} | x, None)

    out = jax.P(None, "heads")
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=(out, out))
    places = {n: jax.NamedSharding(mesh, spec) for n, spec in specs.items()}
    text = tpu_aot.compile_for(sharded, (x,), mesh=mesh, shardings=(places,)).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    assert not exchanges(text)


@needs_libtpu
def test_a_layers_step_compiles_with_the_kernel_on_a_mesh():
    layer = KimiDeltaAttention(hidden_size=64, num_heads=4, head_dim=64, rngs=nnx.Rngs(0))
    mesh = tpu_aot.mesh_for("v6e:2x2", (2, 2), ("data", "tensor"))

    def run(x, ids, cache):
        with shard_ops(mesh, "data", "tensor"):
            return layer(x, segment_ids=ids, cache=cache)

    args = jnp.zeros((4, 1, 64)), jnp.ones((4, 1), jnp.int32), layer.init_cache(4)
    text = tpu_aot.compile_for(run, args, mesh=mesh).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    assert "f32[2,2,64,64]" in text  # a device's rows and heads


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (StepCase("none", K=32), r"tpu: K must be a multiple of 64 up to 256, .* got K = 32"),
        (StepCase("none", dtype="float16"), "tpu: q must be float32 or bfloat16, got float16"),
        (StepCase("none", B=1, H=33, HV=33), "33 value heads of 64 x 64 on 33 key heads make blocks of 33"),
    ],
    ids=str,
)
def test_says_what_it_does_not_support(case, why, monkeypatch):
    monkeypatch.setattr(step_kernels, "STEP_KERNELS", {"tpu": KERNEL})
    with pytest.raises(NotImplementedError, match=why):
        call(case, arrays(case), "pallas")
