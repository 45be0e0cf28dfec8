"""The Hopper kernels of the short convolution on the CPU: the GPU interpreter, and lowering for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from deltajax.ops import short_convolution, taps
from tests import cases

KERNEL = taps.KERNELS["cuda"]


def arrays(T, D, W, dtype, biased, packed):
    rng = np.random.default_rng(cases.SEED)
    x, dy = (jnp.asarray(rng.normal(size=(2, T, D)), dtype) for _ in range(2))
    weight, bias = jnp.asarray(rng.normal(size=(D, W)), jnp.float32), jnp.asarray(rng.normal(size=D))
    ids = np.sort(rng.integers(0, 6, (2, T)), axis=1)
    ids[0, T // 3 : T // 3 + 2] = 0  # padding between segments
    if packed:
        x = jnp.where((ids == 0)[..., None], jnp.nan, x)
    return x, weight, bias if biased else None, jnp.asarray(ids, jnp.int32) if packed else None, dy


def outputs_and_gradients(x, weight, bias, ids, dy, **options):
    def run(x, weight, bias):
        return short_convolution(x, weight, bias=bias, segment_ids=ids, **options)[0]

    y, pull = jax.vjp(run, x, weight, bias)
    return dict(zip(("y", "dx", "dweight", "dbias"), (y, *pull(dy.astype(y.dtype))), strict=True))


@pytest.mark.parametrize(
    ("T", "D", "W", "dtype", "biased", "packed", "activation"),
    [
        (150, 128, 4, jnp.bfloat16, False, True, "silu"),
        (64, 64, 2, jnp.float16, True, False, None),
        (70, 64, 9, jnp.bfloat16, True, True, "silu"),
    ],
)
def test_interpreted_kernels_are_the_convolution(T, D, W, dtype, biased, packed, activation, monkeypatch):
    x, weight, bias, ids, dy = arrays(T, D, W, dtype, biased, packed)
    exact = outputs_and_gradients(
        x.astype(jnp.float32), weight, bias, ids, dy.astype(jnp.float32), activation=activation
    )
    monkeypatch.setattr(taps, "KERNELS", {"cpu": KERNEL})
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = outputs_and_gradients(x, weight, bias, ids, dy, activation=activation, implementation="pallas")
    for name, expected in exact.items():
        if expected is not None:
            limit = 4e-3 if name in ("y", "dx") else 1e-5  # rounded to x's dtype, or sums in float32
            assert cases.relative_error(got[name], expected) < limit, name


def test_it_lowers_for_cuda_alone_under_scan_and_vmap():
    x = jax.ShapeDtypeStruct((3, 2, 131, 64), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((64, 4), jnp.float32)

    def loss(x, weight):
        run = lambda x: short_convolution(x, weight, implementation="pallas")[0]  # noqa: E731
        total = jax.lax.scan(lambda c, x: (c + run(x).astype(jnp.float32).sum(), None), 0.0, x)[0]
        return total + jax.vmap(run)(x).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(x, weight)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("short_convolution_back") >= 1
    with pytest.raises(NotImplementedError, match="on cuda only; this program is lowered for cpu"):
        traced.lower(lowering_platforms=("cpu",))


@pytest.mark.parametrize(
    ("shape", "dtype", "why"),
    [
        ((1, 128, 64), jnp.float32, "x must be bfloat16 or float16, got float32"),
        ((1, 128, 96), jnp.bfloat16, "multiple of 64, got 96"),
        ((1, 63, 64), jnp.bfloat16, "64 tokens or more, got 63"),
    ],
)
def test_what_the_kernel_does_not_take_is_named_and_falls_back(shape, dtype, why):
    x, weight = jnp.ones(shape, dtype), jnp.ones((shape[2], 4))
    with pytest.raises(NotImplementedError, match=why):
        short_convolution(x, weight, implementation="pallas")
    assert short_convolution(x, weight)[0].shape == shape
    with pytest.raises(ValueError, match="implementation must be"):
        short_convolution(x, weight, implementation="cuda")
