"""The Hopper step kernel on the CPU: the GPU interpreter against the recurrence, and lowering for CUDA."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

from deltajax.layers import KimiDeltaAttention, shard_ops
from deltajax.ops import step_kernels
from pallas_kernels.gpu import step as gpu_step
from tests.ops import step_cases
from tests.ops.step_cases import STEPS, arrays, call

KERNEL = step_kernels.STEP_KERNELS["cuda"]
QUICK = [STEPS[i] for i in (1, 5, 7, 8)]
cases = pytest.mark.parametrize(
    "case", [pytest.param(c, id=str(c), marks=[] if c in QUICK else [pytest.mark.slow]) for c in STEPS]
)


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel as the CPU's, on a chip so small that every block walks over several tiles."""
    monkeypatch.setattr(step_kernels, "STEP_KERNELS", {"cpu": KERNEL})
    monkeypatch.setattr(gpu_step, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(gpu_step, "MOST_BLOCKS", 2)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


@cases
def test_interpreted_step_agrees_with_the_recurrence(case, interpreted):
    x = arrays(case)
    got = call(case, x, "pallas")
    for name, error in step_cases.relative_errors(case, x, got).items():
        assert error < step_cases.tolerance(case, name), name


def test_interpreted_step_under_vmap_joins_the_rows(interpreted):
    case = STEPS[5]
    x, y = arrays(case), arrays(case, seed=5)
    got = jax.vmap(lambda x: call(case, x, "pallas"))({n: jnp.stack([x[n], y[n]]) for n in x})
    for i, one in enumerate((x, y)):
        errors = step_cases.relative_errors(case, one, jax.tree.map(lambda a, i=i: a[i], got))
        assert all(error < step_cases.tolerance(case, name) for name, error in errors.items()), errors


@cases
def test_lowers_for_cuda_in_place(case, monkeypatch):
    monkeypatch.setattr(step_kernels, "STEP_KERNELS", {"cuda": KERNEL})
    x = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays(case))
    state = x.pop("state")
    run = jax.jit(lambda state, x: call(case, x | dict(state=state), "pallas"), donate_argnums=0)
    text = run.trace(state, x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2(") == 1
    assert "operand_index = 0" in text  # of the result that is the state


def test_a_layers_step_lowers_with_the_kernel_on_a_mesh(monkeypatch):
    monkeypatch.setattr(step_kernels, "STEP_KERNELS", {"cuda": KERNEL})
    layer = KimiDeltaAttention(hidden_size=64, num_heads=4, head_dim=64, rngs=nnx.Rngs(0))
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def run(x, ids, cache):
        with shard_ops(mesh, "data", "tensor"):
            return layer(x, segment_ids=ids, cache=cache)

    x, ids, cache = jnp.zeros((4, 1, 64)), jnp.ones((4, 1), jnp.int32), layer.init_cache(4)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(run).trace(x, ids, cache).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2(") == 1
    assert "tensor<2x2x64x64xf32>" in text  # a device's rows and heads
    assert "all_gather" not in text


def test_inside_a_checked_shard_map_the_plain_form_runs(monkeypatch):
    monkeypatch.setattr(step_kernels, "STEP_KERNELS", {"cuda": KERNEL})
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    case = STEPS[0]
    x = arrays(case)

    def sharded(implementation, **options):
        return jax.shard_map(
            lambda x: call(case, x, implementation),
            mesh=mesh,
            in_specs=jax.P("data"),
            out_specs=jax.P("data"),
            **options,
        )

    def kernels(run):
        with jax.sharding.use_abstract_mesh(mesh):
            return (
                jax.jit(run).trace(x).lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2(")
            )

    assert kernels(sharded(None)) == 0
    assert kernels(sharded("pallas", check_vma=False)) == 1
    with pytest.raises(NotImplementedError, match=r"cuda: inside jax\.shard_map it needs check_vma=False"):
        kernels(sharded("pallas"))


def test_few_heads_are_cut_in_narrow_tiles():
    assert gpu_step.tile_width(B=256, HV=32, K=128, V=128) == 64
    assert gpu_step.tile_width(B=1, HV=32, K=128, V=128) == 32
    assert gpu_step.tile_width(B=256, HV=32, K=256, V=128) == 32  # registers
    assert gpu_step.tile_width(B=256, HV=32, K=64, V=96) == 32


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (step_cases.StepCase("none", K=32), "cuda: K must be a multiple of 64 up to 256, .* got K = 32"),
        (step_cases.StepCase("none", V=48), "V of 32, got K = 64, V = 48"),
        (step_cases.StepCase("none", dtype="float64"), "q must be float32, bfloat16 or float16, got float64"),
    ],
    ids=str,
)
def test_says_what_it_does_not_support(case, why, monkeypatch):
    monkeypatch.setattr(step_kernels, "STEP_KERNELS", {"cuda": KERNEL})
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match=why):
        call(case, arrays(case), "pallas")
