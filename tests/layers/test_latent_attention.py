import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltajax.layers import LatentAttention

B, T, D = 2, 12, 16
SIZES = dict(num_heads=3, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3)
FORMS = {
    "nope": dict(rope_theta=None),
    "rope": dict(rope_theta=100.0),
    "query rank": dict(rope_theta=100.0, q_lora_rank=5),
    "wide values": dict(rope_theta=None, qk_nope_head_dim=2, v_head_dim=6),
}
IDS = np.array([[0, 3, 3, 3, 3, 1, 1, 1, 1, 1, 1, 0], [5] * 7 + [0, 0] + [2] * 3])


def build(form="rope", **options):
    options = dict(hidden_size=D, initializer_range=0.5) | SIZES | FORMS[form] | options
    return LatentAttention(rngs=nnx.Rngs(0), **options)


def inputs(seed=0, rows=B):
    return np.random.default_rng(seed).standard_normal((rows, T, D), np.float32)


def definition(layer, x):
    """One unpadded sequence [T, D] in float64 NumPy, head by head and query by query."""
    N, R, C, V = layer.qk_nope_head_dim, layer.qk_rope_head_dim, layer.kv_lora_rank, layer.v_head_dim

    def times(x, name):
        return x @ np.asarray(getattr(layer, name).kernel[...], np.float64)

    def normed(x, norm):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(norm.scale[...], np.float64)

    def turned(x, t):
        if layer.rotary is None:
            return x
        out = np.empty(R)
        for d in range(R // 2):
            z = complex(x[d], x[d + R // 2]) * np.exp(1j * t * layer.rotary.theta ** (-2 * d / R))
            out[d], out[d + R // 2] = z.real, z.imag
        return out

    x = np.asarray(x, np.float64)
    q = times(normed(times(x, "q_a_proj"), layer.q_a_norm), "q_b_proj") if layer.low_rank_queries else None
    q = times(x, "q_proj") if q is None else q
    a = times(x, "kv_a_proj")
    kv = times(normed(a[:, :C], layer.kv_a_norm), "kv_b_proj")
    shared = np.stack([turned(a[t, C:], t) for t in range(len(x))])
    out = np.zeros((len(x), layer.num_heads * V))
    for h in range(layer.num_heads):
        key, value = np.split(kv[:, h * (N + V) : (h + 1) * (N + V)], [N], axis=1)
        for t in range(len(x)):
            query = q[t, h * (N + R) : (h + 1) * (N + R)]
            score = key[: t + 1] @ query[:N] + shared[: t + 1] @ turned(query[N:], t)
            weight = np.exp((score - score.max()) / np.sqrt(N + R))
            out[t, h * V : (h + 1) * V] = weight / weight.sum() @ value[: t + 1]
    return times(out, "o_proj")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_the_definition_whole_by_steps_and_packed(form):
    layer = build(form)
    for norm in ("kv_a_norm", "q_a_norm") if layer.low_rank_queries else ("kv_a_norm",):
        scale = getattr(layer, norm).scale
        scale[...] = scale[...] * jnp.linspace(0.5, 2.0, scale.shape[0])
    x = inputs()
    want = np.stack([definition(layer, row) for row in x])
    np.testing.assert_allclose(layer(x), want, rtol=1e-5, atol=1e-5)

    assert layer._absorbs(1) and not layer._absorbs(T)
    prefill, _ = layer(x, cache=layer.init_cache(B, T))
    np.testing.assert_allclose(prefill, want, rtol=1e-5, atol=1e-5)
    step = nnx.jit(lambda layer, x, cache: layer(x, cache=cache))
    cache = layer.init_cache(B, T)
    for t in range(T):
        y, cache = step(layer, x[:, t : t + 1], cache)
        np.testing.assert_allclose(y[:, 0], want[:, t], rtol=1e-5, atol=1e-5)

    packed = np.asarray(layer(x, segment_ids=jnp.asarray(IDS)))
    np.testing.assert_array_equal(packed[IDS == 0], 0)
    for row, start, stop in ((0, 1, 5), (0, 5, 11), (1, 0, 7), (1, 9, 12)):
        piece = definition(layer, x[row, start:stop])
        np.testing.assert_allclose(packed[row, start:stop], piece, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", ["nope", "rope"])
def test_both_forms_are_equal_on_the_same_tokens_and_so_are_their_gradients(form, packed, monkeypatch):
    graph, state = nnx.split(build(form))
    x, weight = inputs(), inputs(1)
    ids = jnp.asarray(IDS) if packed else None
    before = inputs(2)[:, :4]

    def run(absorbed):
        monkeypatch.setattr(LatentAttention, "_absorbs", lambda self, queries: absorbed)

        def loss(state, x):
            layer = nnx.merge(graph, state)
            _, cache = layer(before, cache=layer.init_cache(B, T + 4))
            y, cache = layer(x, segment_ids=ids, cache=cache)
            return jnp.sum(weight * y), (y, cache)

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, x)

    (gradients, (y, cache)), other = run(True), run(False)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), (gradients, (y, cache)), other
    )


def test_only_the_latent_is_cached_and_a_step_makes_no_keys_or_values_of_it():
    layer = build()
    slots = 50
    cache = layer.init_cache(B, slots)
    assert [leaf.shape for leaf in jax.tree.leaves(cache)] == [(B, slots, 6 + 2), (B,)]

    def shapes(length):
        program = jax.make_jaxpr(lambda x, cache: layer(x, cache=cache))(jnp.zeros((B, length, D)), cache)
        return re.findall(r"\[([\d,]+)\]", str(program))

    heads, made = layer.num_heads, layer.qk_nope_head_dim + layer.v_head_dim
    assert f"{B},{slots},{heads},{made}" not in shapes(1)
    assert f"{B},{slots + T},{heads},{made}" in shapes(T)


def test_few_tokens_are_absorbed_and_many_expanded_at_the_published_sizes():
    layer = nnx.eval_shape(lambda: LatentAttention(rngs=nnx.Rngs(0)))
    assert layer.kv_b_proj.kernel.shape == (512, 32 * 256) and layer.kv_a_proj.kernel.shape == (2304, 576)
    assert [layer._absorbs(n) for n in (1, 16, 128, 256, 4096)] == [True, True, True, False, False]


def test_rotation_depends_on_distance_only_and_is_absent_without_a_base():
    x = inputs()
    x[:, 1:] = x[:, :1]  # equal tokens: without positions all outputs are equal
    np.testing.assert_allclose(build("nope")(x)[:, 1:], build("nope")(x)[:, :-1], atol=1e-5)
    other = inputs()
    other[:, ::2] = 0
    rope, nope = build("rope"), build("nope")
    assert np.abs(rope(other) - nope(other)).max() > 1e-2
    ids = np.r_[[1] * 4, [2] * (T - 4)][None].repeat(B, 0)
    shifted = rope(np.roll(other, 4, axis=1), segment_ids=jnp.asarray(ids))[:, 4:]
    np.testing.assert_allclose(shifted, rope(other)[:, : T - 4], atol=1e-5)


def test_bfloat16_stays_near_float32_in_both_forms():
    x = inputs()
    want = build()(x)
    layer = build(dtype=jnp.bfloat16)
    y, cache = layer(x, cache=layer.init_cache(B, T))
    assert y.dtype == cache.latent.dtype == jnp.bfloat16
    stepped, cache = [], layer.init_cache(B, T)
    for t in range(T):
        y_t, cache = layer(x[:, t : t + 1], cache=cache)
        stepped.append(y_t)
    for got in (layer(x), y, jnp.concatenate(stepped, axis=1)):
        error = np.abs(np.asarray(got, np.float32) - want)
        assert error.max() < 0.05 * np.abs(want).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kv_lora_rank=0), "kv_lora_rank=0: expected a positive integer"),
        (dict(q_lora_rank=-1), "q_lora_rank=-1: expected a positive integer"),
        (dict(num_heads=2.0), "num_heads=2.0: expected a positive integer"),
        (dict(qk_nope_head_dim=None), "qk_nope_head_dim=None: expected a positive integer"),
        (dict(v_head_dim=True), "v_head_dim=True: expected a positive integer"),
        (dict(implementation="flash"), "implementation='flash': expected 'xla', 'cudnn' or None"),
        (dict(qk_rope_head_dim=3), "qk_rope_head_dim=3: expected an even size"),
        (dict(rope_theta=-1.0), "theta=-1.0: expected a positive"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_segment_ids_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"segment_ids must have shape \[B, T\] = \(2, 12\)"):
        build()(inputs(), segment_ids=jnp.ones((B, T + 1), jnp.int32))
