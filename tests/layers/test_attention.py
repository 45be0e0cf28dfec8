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


PACKINGS = {
    "whole": None,
    "segments": [[5] * 3 + [2] * 11 + [9] * 9, [1] * 23],
    "trailing": [[1] * 17 + [0] * 6, [1] * 2 + [0] * 21],
    "leading": [[0] * 9 + [1] * 14, [0] * 22 + [1]],
    "between": [[0] * 2 + [4] * 6 + [0] * 8 + [6] + [3] * 5 + [0], [0] * 23],
}


@pytest.mark.parametrize("window", [1, 4, 5])
@pytest.mark.parametrize("packing", PACKINGS)
@jax.enable_x64(True)  # in float32 the two orders of sums differ by more than the bound on some CPUs
def test_windows_by_blocks_equal_one_masked_product_in_outputs_and_gradients(window, packing):
    layer = Attention(
        hidden_size=D,
        num_heads=4,
        num_kv_heads=2,
        window_size=window,
        initializer_range=0.5,
        dtype=jnp.float64,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    graph, state = nnx.split(layer)
    x, weight = jax.random.normal(jax.random.key(0), (2, 2, 23, D))  # no multiple of the windows
    ids = None if PACKINGS[packing] is None else jnp.array(PACKINGS[packing])

    def run(with_cache):
        def loss(state, x):
            layer = nnx.merge(graph, state)
            if with_cache:  # a prefill multiplies all queries by all keys, under one mask
                y, _ = layer(x, segment_ids=ids, cache=layer.init_cache(2, 23))
            else:
                y = layer(x, segment_ids=ids)
            return jnp.sum(weight * y), y

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, x)

    blocks, dense = run(False), run(True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), blocks, dense)
    if ids is not None:
        (_, gradient), y = blocks
        np.testing.assert_array_equal(jnp.where(ids[..., None] == 0, y, 0), 0)
        np.testing.assert_array_equal(jnp.where(ids[..., None] == 0, gradient, 0), 0)


@pytest.mark.parametrize("packed", [False, True])
def test_the_memory_of_a_windows_gradient_grows_linearly_with_the_length(packed):
    layer = Attention(hidden_size=D, num_heads=4, window_size=16, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)

    def temporaries(length):
        def loss(state, x, ids):
            return jnp.sum(nnx.merge(graph, state)(x, segment_ids=ids if packed else None))

        x, ids = jnp.zeros((1, length, D)), jnp.ones((1, length), jnp.int32)
        compiled = jax.jit(jax.grad(loss)).lower(state, x, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(4096) < 2.2 * temporaries(2048)
    assert temporaries(4096) < 4096 * 4096  # one byte for each pair of tokens


def test_equal_layers_have_equal_definitions_and_compile_once():
    def build(seed, theta=10000.0):
        return Attention(hidden_size=D, num_heads=2, rope_theta=theta, rngs=nnx.Rngs(seed))

    a, b = build(0), build(1)
    assert nnx.graphdef(a) == nnx.graphdef(b) != nnx.graphdef(build(0, theta=100.0))
    mean = jax.tree.map(lambda p, q: (p + q) / 2, a, b)
    want = (a.q_proj.kernel[...] + b.q_proj.kernel[...]) / 2
    np.testing.assert_array_equal(mean.q_proj.kernel[...], want)
    traces = []

    @nnx.jit
    def call(layer, x):
        traces.append(None)
        return layer(x)

    call(a, jnp.zeros((1, 3, D)))
    call(b, jnp.zeros((1, 3, D)))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (jnp.ones((2, T)), TypeError, "segment_ids must have an integer dtype, got float32"),
        ([[1] * T] * 2, TypeError, "segment_ids must be an array, got list"),
        (jnp.ones((1, T), jnp.int32), ValueError, r"segment_ids must have shape \[B, T\] = \(2, 7\)"),
        (jnp.ones((2, T + 1), jnp.int32), ValueError, r"segment_ids must have shape .* got \(2, 8\)"),
        (jnp.ones((T,), jnp.int32), ValueError, r"segment_ids must have shape .* got \(7,\)"),
    ],
)
def test_attention_refuses_segment_ids_of_another_type_or_shape(ids, error, message):
    layer = Attention(hidden_size=D, num_heads=2, rngs=nnx.Rngs(0))
    with pytest.raises(error, match=message):
        layer(jnp.zeros((2, T, D)), segment_ids=ids)


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
        (dict(num_heads=0), r"num_heads=0: expected a positive integer"),
        (dict(num_heads=4, num_kv_heads=0), r"num_kv_heads=0: expected a positive integer"),
        (dict(num_heads=4, head_dim=0), r"head_dim=0: expected a positive integer"),
        (
            dict(num_heads=4, implementation="flash"),
            r"implementation='flash': expected 'xla', 'cudnn' or None",
        ),
        (dict(num_heads=3), r"hidden_size=16: expected a multiple of num_heads=3"),
        (dict(num_heads=4, window_size=0), r"window_size=0: expected at least 1"),
        (dict(num_heads=4, head_dim=3), r"size=3: expected an even"),
        (dict(num_heads=4, rope_theta=-1.0), r"theta=-1.0: expected a positive"),
    ],
)
def test_attention_refuses_sizes_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        Attention(hidden_size=D, rngs=nnx.Rngs(0), **options)
