"""Attention with everything that Qwen3-Next's has, against float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltajax.layers import Attention

B, T, D, N, KV, K = 2, 12, 16, 4, 2, 8
IDS = np.array([[0, 3, 3, 3, 3, 1, 1, 1, 1, 1, 1, 0], [5] * 7 + [0, 0] + [2] * 3])
FORMS = {
    "qwen3-next": dict(rope_fraction=0.25, qk_norm=True, output_gate=True, zero_centered_norm=True),
    "half rotated": dict(rope_fraction=0.5),
    "norm by w": dict(qk_norm=True, rope_theta=None),
    "gate, window 3": dict(output_gate=True, window_size=3),
}


def build(form, **options):
    options = dict(rope_theta=100.0) | FORMS[form] | options
    layer = Attention(
        hidden_size=D,
        num_heads=N,
        num_kv_heads=KV,
        head_dim=K,
        initializer_range=0.5,
        rngs=nnx.Rngs(0),
        **options,
    )
    if layer.qk_norm:
        for norm, by in ((layer.q_norm, 2.0), (layer.k_norm, 0.5)):
            norm.scale[...] = norm.scale[...] + by * jnp.linspace(-1, 1, K)
    return layer


def definition(layer, form, x):
    """One unpadded sequence [T, D] in float64, head by head and query by query."""
    options = dict(rope_theta=100.0) | FORMS[form]
    rotated = int(K * options.get("rope_fraction", 1)) if options["rope_theta"] else 0

    def times(x, name):
        return x @ np.asarray(getattr(layer, name).kernel[...], np.float64)

    def normed(x, norm):
        if not options.get("qk_norm"):
            return x
        scale = np.asarray(norm().scale[...], np.float64) + bool(options.get("zero_centered_norm"))
        return x / np.sqrt((x**2).mean() + 1e-6) * scale

    def turned(x, t):
        out = x.copy()
        for d in range(rotated // 2):
            z = complex(x[d], x[d + rotated // 2]) * np.exp(1j * t * 100.0 ** (-2 * d / rotated))
            out[d], out[d + rotated // 2] = z.real, z.imag
        return out

    x = np.asarray(x, np.float64)
    size = 2 * K if options.get("output_gate") else K
    q, k, v = times(x, "q_proj"), times(x, "k_proj"), times(x, "v_proj")
    out = np.zeros((len(x), N * K))
    for h in range(N):
        kv = slice(h // (N // KV) * K, (h // (N // KV) + 1) * K)
        keys = np.stack([turned(normed(k[t, kv], lambda: layer.k_norm), t) for t in range(len(x))])
        for t in range(len(x)):
            query = q[t, h * size : h * size + K]
            query = turned(normed(query, lambda: layer.q_norm), t)
            seen = slice(max(0, t + 1 - options.get("window_size", T)), t + 1)
            score = keys[seen] @ query / np.sqrt(K)
            weight = np.exp(score - score.max())
            o = weight / weight.sum() @ v[seen, kv]
            if size > K:
                o = o / (1 + np.exp(-q[t, h * size + K : (h + 1) * size]))
            out[t, h * K : (h + 1) * K] = o
    return times(out, "o_proj")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_the_definition_whole_by_steps_and_packed(form):
    layer = build(form)
    x = np.random.default_rng(0).standard_normal((B, T, D), np.float32)
    want = np.stack([definition(layer, form, row) for row in x])
    call = nnx.jit(lambda layer, x, ids, cache: layer(x, segment_ids=ids, cache=cache))
    np.testing.assert_allclose(call(layer, x, None, None), want, rtol=1e-4, atol=1e-5)
    cache = layer.init_cache(B, T)
    for t in range(T):
        y, cache = call(layer, x[:, t : t + 1], None, cache)
        np.testing.assert_allclose(y[:, 0], want[:, t], rtol=1e-4, atol=1e-5)
    packed = np.asarray(call(layer, x, jnp.asarray(IDS), None))
    np.testing.assert_array_equal(packed[IDS == 0], 0)
    for row, start, stop in ((0, 1, 5), (0, 5, 11), (1, 0, 7), (1, 9, 12)):
        piece = definition(layer, form, x[row, start:stop])
        np.testing.assert_allclose(packed[row, start:stop], piece, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fraction", [0.0, 1.5, 0.3])
def test_a_fraction_that_is_no_share_of_the_channels_is_refused(fraction):
    with pytest.raises(ValueError, match=f"rope_fraction={fraction}: expected a share"):
        build("half rotated", rope_fraction=fraction)


def test_an_odd_number_of_rotated_channels_is_refused():
    with pytest.raises(ValueError, match="size=3: expected an even number of rotated channels"):
        build("half rotated", rope_fraction=0.375)
