"""The Hopper kernel of attention to latents on the CPU: the GPU interpreter, and lowering for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

from deltajax.layers import LatentAttention
from deltajax.layers import latent_decode as layers_latent_decode
from deltajax.layers.sharding import shard_ops
from pallas_kernels.gpu import latent_decode
from tests import cases
from tests.gpu.interpreted import interpreted_products


def draw(B: int, H: int, slots: int, rank: int):
    rng = np.random.default_rng(cases.SEED)
    shapes = (B, H, rank + 64), (B, slots, rank + 64)
    return (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)


def softmax(q, latent, length, rank: int, scale: float):
    q, latent = (x.astype(jnp.float32) for x in (q, latent))
    held = jnp.arange(latent.shape[1]) < length[:, None]
    logits = jnp.where(held[:, None], jnp.einsum("bhc,bsc->bhs", q, latent) * scale, -jnp.inf)
    p = jnp.where(held[:, None], jnp.exp(logits - jnp.max(logits, axis=2, keepdims=True)), 0)
    p = p / jnp.maximum(p.sum(axis=2, keepdims=True), 1e-30)
    return jnp.einsum("bhs,bsc->bhc", p, latent[..., :rank])


@pytest.mark.parametrize(
    ("H", "slots", "rank", "lengths"),
    [
        (3, 300, 128, (300, 65, 0)),  # 300: a last block that overlaps the one before
        (70, 64, 128, (64, 1, 1000)),  # two groups of heads; more tokens than slots
        (2, 700, 256, (700, 512, 3)),  # shares of a sequence, not all with work
    ],
)
def test_the_interpreted_kernel_is_softmax_attention(H, slots, rank, lengths, monkeypatch):
    interpreted_products(monkeypatch)
    q, latent = draw(len(lengths), H, slots, rank)
    length = jnp.array(lengths, jnp.int32)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = jax.jit(lambda *x: latent_decode.attend(*x, rank=rank, scale=0.2))(q, latent, length)
    want = softmax(q, latent, length, rank, 0.2)
    assert got.shape == (len(lengths), H, rank) and got.dtype == jnp.bfloat16
    seen = np.array(lengths) > 0
    np.testing.assert_array_equal(got[~seen], 0)
    assert cases.relative_error(got[seen], want[seen]) < 5e-3


def layer(**options):
    sizes = dict(hidden_size=32, num_heads=2, kv_lora_rank=128, qk_nope_head_dim=16, v_head_dim=16)
    sizes |= dict(dtype=jnp.bfloat16, initializer_range=0.2) | options
    return LatentAttention(**sizes, rngs=nnx.Rngs(0))


def test_a_layers_step_with_the_interpreted_kernel(monkeypatch):
    """Rows of different lengths, one of them padding; also mapped, and its gradient."""
    graph, state = nnx.split(layer(rope_theta=100.0))
    rng = np.random.default_rng(cases.SEED)
    x, token = (jnp.asarray(rng.normal(size=(3, T, 32)), jnp.bfloat16) for T in (70, 1))
    ids = (jnp.arange(70) < jnp.array([[70], [3], [40]])).astype(jnp.int32)
    active = jnp.array([[1], [1], [0]])

    @jax.jit
    def read(state):
        module = nnx.merge(graph, state)
        return module(x, segment_ids=ids, cache=module.init_cache(3, 80))[1]

    cache = read(state)

    def step(x, cache, active):
        return nnx.merge(graph, state)(x, segment_ids=active, cache=cache)[0].astype(jnp.float32)

    def run():
        def mapped(x, cache, active):
            return jax.vmap(step)(*jax.tree.map(lambda a: a[:, None], (x, cache, active)))[:, 0]

        def energy(x):
            return jnp.sum(jnp.square(step(x, cache, active)))

        return jax.jit(lambda: (step(token, cache, active), mapped(token, cache, active)))(), (
            jax.jit(jax.grad(energy))(token)
        )

    (plain, plain_mapped), gradient = run()
    interpreted_products(monkeypatch)
    calls = []
    attend = latent_decode.attend
    monkeypatch.setattr(latent_decode, "attend", lambda *a, **k: calls.append(a) or attend(*a, **k))
    monkeypatch.setattr(layers_latent_decode, "PLATFORMS", ("cpu",))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        (got, got_mapped), got_gradient = run()
    assert len(calls) >= 3
    np.testing.assert_array_equal(got[2], 0)
    for a, b in ((got, plain), (got_mapped, plain_mapped), (got_gradient, gradient)):
        assert cases.relative_error(a, b) < 1e-2
        assert jnp.max(jnp.abs(b)) > 0


def lowered(module, mesh=None) -> str:
    cache = jax.eval_shape(lambda: module.init_cache(4, 128))

    def run(x, cache):
        if mesh is None:
            return module(x, cache=cache)
        with shard_ops(mesh, "data", "tensor"):
            return module(x, cache=cache)

    x = jax.ShapeDtypeStruct((4, 1, 32), jnp.bfloat16)
    return jax.jit(run).trace(x, cache).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("options", "kernels"),
    [({}, 1), (dict(dtype=jnp.float32), 0), (dict(kv_lora_rank=96), 0), (dict(qk_rope_head_dim=32), 0)],
)
def test_a_layers_step_lowers_with_the_kernel_where_it_takes_the_call(options, kernels):
    assert lowered(layer(**options)).count("@mosaic_gpu_v2(") == kernels


def test_on_a_mesh_each_device_has_its_rows_and_heads():
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.sharding.use_abstract_mesh(mesh):
        text = lowered(layer(), mesh)
    assert text.count("@mosaic_gpu_v2(") == 1
    assert "tensor<2x1x64x192xbf16>" in text and "tensor<2x128x192xbf16>" in text
    assert "all_gather" not in text


def test_shares_fill_the_chip():
    assert latent_decode.share_count(1, 16384) == 132
    assert latent_decode.share_count(132, 16384) == 1
    assert latent_decode.share_count(28, 16384) == 33  # 7 whole rounds
    assert latent_decode.share_count(1, 3) == 3
