import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltajax.layers import Attention, RotaryEmbedding

T, D = 7, 16


def definition(layer, x, window):
    """Attention written out with loops over heads and queries, for one unpadded sequence [T, D]."""
    n, m, size = layer.num_heads, layer.num_kv_heads, layer.head_dim
    q, k, v = (p(x).reshape(T, -1, size) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = (layer.rotary(a[None], jnp.arange(T)[None])[0] for a in (q, k))
    out = np.zeros((T, n, size))
    for h in range(n):
        for t in range(T):
            seen = slice(max(0, t + 1 - window), t + 1)
            score = np.asarray(k[seen, h * m // n] @ q[t, h]) / np.sqrt(size)
            weight = np.exp(score - score.max())
            out[t, h] = weight / weight.sum() @ np.asarray(v[seen, h * m // n])
    return layer.o_proj(jnp.asarray(out.reshape(T, -1), jnp.float32))


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_attention_is_the_definition(window):
    layer = Attention(
        hidden_size=D,
        num_heads=4,
        num_kv_heads=2,
        window_size=window,
        initializer_range=0.5,
        rngs=nnx.Rngs(0),
    )
    x = jax.random.normal(jax.random.key(0), (1, T, D))
    np.testing.assert_allclose(layer(x)[0], definition(layer, x[0], window or T), rtol=1e-4, atol=1e-5)


def test_a_ring_of_window_slots_decodes_far_beyond_the_window():
    layer = Attention(hidden_size=D, num_heads=2, window_size=3, initializer_range=0.5, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 20, D))
    cache = layer.init_cache(2, max_length=1000)
    assert cache.key.shape[1] == 3
    _, cache = layer(x[:, :8], cache=cache)
    step = nnx.jit(lambda layer, x, cache: layer(x, cache=cache))
    for t in range(8, 20):
        y, cache = step(layer, x[:, t : t + 1], cache)
        np.testing.assert_allclose(y[:, 0], layer(x)[:, t], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(cache.length, 20)


def test_rotary_products_depend_on_distance_only():
    rotary = RotaryEmbedding(8, theta=100.0)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def product(i, j):
        return jnp.sum(rotary(q, jnp.array([[i]])) * rotary(k, jnp.array([[j]])))

    np.testing.assert_allclose(product(9, 4), product(25, 20), rtol=1e-5)
    np.testing.assert_allclose(rotary(q, jnp.zeros((1, 1), jnp.int32)), q)
    assert abs(product(9, 4) - product(9, 5)) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_heads=4, num_kv_heads=3), r"num_kv_heads=3: expected a divisor of num_heads=4"),
        (dict(num_heads=3), r"hidden_size=16: expected a multiple of num_heads=3"),
        (dict(num_heads=4, window_size=0), r"window_size=0: expected at least 1"),
        (dict(num_heads=4, head_dim=3), r"size=3: expected an even"),
        (dict(num_heads=4, rope_theta=-1.0), r"theta=-1.0: expected a positive"),
    ],
)
def test_attention_refuses_sizes_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        Attention(hidden_size=D, rngs=nnx.Rngs(0), **options)
