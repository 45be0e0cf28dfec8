import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltajax.layers import GatedRMSNorm, RMSNorm, SwiGLU

X = jax.random.normal(jax.random.key(0), (3, 5, 8))
GATE = jax.random.normal(jax.random.key(1), (3, 5, 8))


def test_rms_norm_is_the_formula():
    norm = RMSNorm(8, eps=1e-3, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.arange(8.0)
    want = X / jnp.sqrt(jnp.mean(X**2, -1, keepdims=True) + 1e-3) * jnp.arange(8.0)
    np.testing.assert_allclose(norm(X), want, rtol=1e-6)


def test_a_zero_centred_norm_multiplies_by_one_more_than_its_scale():
    norm = RMSNorm(8, zero_centered=True, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(norm.scale[...], 0)
    np.testing.assert_array_equal(norm(X), RMSNorm(8, rngs=nnx.Rngs(0))(X))
    norm.scale[...] = jnp.arange(8.0)
    want = X / jnp.sqrt(jnp.mean(X**2, -1, keepdims=True) + 1e-5) * (1 + jnp.arange(8.0))
    np.testing.assert_allclose(norm(X), want, rtol=1e-6)


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_gated_rms_norm_multiplies_by_the_activated_gate(activation):
    norm = GatedRMSNorm(8, activation=activation, rngs=nnx.Rngs(0))
    want = RMSNorm(8, rngs=nnx.Rngs(0))(X) * getattr(jax.nn, activation)(GATE)
    np.testing.assert_allclose(norm(X, GATE), want, rtol=1e-6)


def test_norms_start_at_one_and_compute_in_float32():
    norm = RMSNorm(8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(norm.scale[...], 1)
    large = (300 * X).astype(jnp.float16)  # its squares overflow float16
    assert norm(large).dtype == jnp.bfloat16 and jnp.isfinite(norm(large)).all()


def test_gated_rms_norm_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match=r"activation='relu'.*'silu' or 'sigmoid'"):
        GatedRMSNorm(8, activation="relu", rngs=nnx.Rngs(0))


def test_swiglu_is_the_formula():
    mlp = SwiGLU(hidden_size=8, intermediate_size=12, rngs=nnx.Rngs(0))
    gate, up, down = (p.kernel[...] for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    np.testing.assert_allclose(mlp(X), (jax.nn.silu(X @ gate) * (X @ up)) @ down, rtol=1e-5, atol=1e-8)
