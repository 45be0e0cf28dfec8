"""Attention block by block equals one masked product, whatever the layout, and holds its blocks only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltajax.layers import Attention, LatentAttention, attention_blocks, blockwise
from deltajax.layers.attention_blocks import Source
from deltajax.layers.blockwise import attend, blockwise_attention
from deltajax.layers.layout import causal_mask, layout_of
from deltajax.models.remat import rematerialized
from tests import cases


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "MAX_LOGITS", 0)
    for name, value in dict(STEP_LOGITS=1, MAX_QUERIES=4, MIN_KEYS=3).items():
        monkeypatch.setattr(attention_blocks, name, value)


def draw(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def dense(q, key, value, mask):
    return jax.nn.dot_product_attention(q, key, value, mask=mask, scale=0.3)


def assert_close(got, want):
    """Each array within 1e-5 of its counterpart, relative by norm."""
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1)  # a window of one: q has no gradient
        assert error < 1e-5, f"{jax.tree_util.keystr(path)} is off by {error:.1e}"


@pytest.mark.parametrize(("window", "heads"), [(None, 1), (1, 4), (5, 2)])
def test_any_layout_equals_one_masked_product_in_outputs_and_gradients(small_blocks, window, heads):
    rng = np.random.default_rng(cases.SEED)
    q, weight = draw(rng, 2, 14, 4, 6) * 3, draw(rng, 2, 14, 4, 5)
    # A row that continues its cache, then two segments; a row of padding, whose cache is not seen.
    ids = jnp.array([[1] * 5 + [0] * 2 + [2] * 6 + [3], [0] * 14])
    queries = layout_of(2, 14, ids, jnp.array([11, 11]))
    cached = layout_of(2, 11, jnp.array([[1] * 11, [0] * 3 + [1] * 8]), None)
    layouts = cached, queries
    # Keys are made of 3 channels and a matrix, values are kept as they are.
    arrays = tuple((draw(rng, 2, n, heads, 3), draw(rng, 2, n, heads, 5)) for n in (11, 14))
    kernel = draw(rng, 3, 6)

    def make(key, value, kernel):
        return key @ kernel, value

    def by_blocks(q, arrays, kernel):
        sources = [Source(*pair) for pair in zip(arrays, layouts, strict=True)]
        options = dict(params=(kernel,), window=window, scale=0.3)
        return blockwise_attention(q, queries, sources, make, **options)

    def whole(q, arrays, kernel):
        key, value = make(*(jnp.concatenate(x, axis=1) for x in zip(*arrays, strict=True)), kernel)
        mask = causal_mask(queries, cached.then(queries), window)
        o = dense(q, key, jnp.pad(value, [(0, 0)] * 3 + [(0, 1)]), mask)[..., :5]
        return jnp.where((ids != 0)[..., None, None], o, 0)

    def both(attention):
        def loss(*inputs):
            o = attention(*inputs)
            return jnp.sum(o * weight), o

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, arrays, kernel)

    got = both(by_blocks)
    assert_close(got, both(whole))
    np.testing.assert_array_equal(jnp.where(ids[..., None, None] == 0, got[1], 0), 0)


@pytest.mark.parametrize("form", ["scanned", "mapped"])
def test_gradients_under_checkpoint_in_a_scan_or_a_vmap(small_blocks, form):
    rng = np.random.default_rng(cases.SEED)
    x, kernels, layout = draw(rng, 2, 10, 2, 4), draw(rng, 3, 4, 4), layout_of(2, 10, None, None)

    def by_blocks(x, kernel):  # the values are what a layer makes of its input, the keys are not
        make = lambda x, kernel: (x, x @ kernel)  # noqa: E731
        return blockwise_attention(x, layout, [Source((x,), layout)], make, params=(kernel,), scale=0.3)

    def whole(x, kernel):
        return dense(x, x, x @ kernel, causal_mask(layout, layout))

    def gradients(attention):
        block = jax.checkpoint(attention)

        def loss(x, kernels):
            if form == "mapped":
                return jnp.sum(jax.vmap(block, (None, 0))(x, kernels) ** 2)
            return jnp.sum(jax.lax.scan(lambda x, kernel: (block(x, kernel), None), x, kernels)[0] ** 2)

        return jax.jit(jax.grad(loss, (0, 1)))(x, kernels)

    assert_close(gradients(by_blocks), gradients(whole))


@pytest.mark.parametrize(("remat", "again"), [("save_dots", 0), ("save_delta_rule", 0), ("full", 1)])
def test_remat_policies_that_keep_outputs_do_not_run_the_loop_again(small_blocks, remat, again):
    layout = layout_of(1, 10, None, None)

    def block(x):
        make = lambda key, value: (key, value)  # noqa: E731
        return blockwise_attention(x, layout, [Source((x, x), layout)], make, scale=0.3)

    def loops(block):  # of dynamic length: one over a query block's keys, one over a key block's queries
        gradient = jax.grad(lambda x: jnp.sum(block(x) ** 2))
        return str(jax.make_jaxpr(gradient)(jnp.zeros((1, 10, 2, 4)))).count("while[")

    assert loops(block) == 2
    assert loops(rematerialized(block, remat, in_loop=True)) == 2 + again


LAYERS = {
    "full": lambda: Attention(hidden_size=16, num_heads=4, num_kv_heads=2, rngs=nnx.Rngs(0)),
    "window": lambda: Attention(hidden_size=16, num_heads=2, window_size=5, rngs=nnx.Rngs(0)),
    "latent": lambda: LatentAttention(
        hidden_size=16, num_heads=2, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3,
        rope_theta=100.0, rngs=nnx.Rngs(0),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "packed"), [("full", True), ("window", False), ("latent", True)])
def test_layers_train_block_by_block_where_logits_are_many(name, packed, request):
    graph, state = nnx.split(LAYERS[name]())
    rng = np.random.default_rng(cases.SEED)
    x, weight = draw(rng, 2, 23, 16), draw(rng, 2, 23, 16)
    ids = jnp.array([[0] * 2 + [4] * 9 + [0] * 2 + [1] * 10, [3] * 23]) if packed else None

    def gradients():
        def loss(state, x):
            y = nnx.merge(graph, state)(x, segment_ids=ids)
            return jnp.sum(y * weight), y

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(state, x)

    want = gradients()
    request.getfixturevalue("small_blocks")
    assert_close(gradients(), want)


@pytest.mark.parametrize("name", ["full", "latent"])
def test_the_memory_of_a_gradient_grows_linearly_with_the_length(name, monkeypatch):
    monkeypatch.setattr(blockwise, "MAX_LOGITS", 0)
    monkeypatch.setattr(attention_blocks, "STEP_LOGITS", 2**14)
    monkeypatch.setattr(attention_blocks, "MIN_KEYS", 64)
    graph, state = nnx.split(LAYERS[name]())

    def temporaries(length):
        gradient = jax.jit(jax.grad(lambda state, x: jnp.sum(nnx.merge(graph, state)(x)), (0, 1)))
        program = gradient.lower(state, jax.ShapeDtypeStruct((1, length, 16), jnp.float32))
        return program.compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(4096), temporaries(8192)
    assert long < 2.1 * short
    assert long < 8192 * 8192 / 8


@pytest.mark.parametrize(
    ("name", "tokens", "packed"),
    [
        ("full", 20, True),
        ("window", 20, False),
        ("latent", 20, True),
        ("latent", 2, False),
        ("full", 1, True),
    ],
)
def test_layers_go_block_by_block_where_logits_are_many(name, tokens, packed, request):
    graph, state = nnx.split(LAYERS[name]())
    rng = np.random.default_rng(cases.SEED)
    x, more = draw(rng, 3, 9, 16), draw(rng, 1 if packed else 3, tokens, 16)
    first = jnp.array([[1] * 9, [1] * 3 + [0] * 6, [0] * 9])
    ids, options = None, {}
    if packed:
        ids, options = jnp.array([([3] * 9 + [0] + [1] * 8 + [2] * 2)[:tokens]]), dict(num_segments=3)

    def run():
        layer = nnx.merge(graph, state)
        _, cache = layer(x, segment_ids=first, cache=layer.init_cache(3, 40))
        return layer(more, segment_ids=ids, cache=cache, **options)

    compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    want = compiled(lambda: run())()
    request.getfixturevalue("small_blocks")
    got = compiled(lambda: run())()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("name", ["full", "latent"])
def test_a_long_prefill_holds_no_product_of_tokens_and_slots(name, monkeypatch):
    monkeypatch.setattr(attention_blocks, "STEP_LOGITS", 2**18)
    layer, T, slots = LAYERS[name](), 4096, 2**18
    graph, state = nnx.split(layer)
    cache = jax.eval_shape(lambda: layer.init_cache(1, slots))

    def prefill(state, x, cache):
        return nnx.merge(graph, state)(x, cache=cache)

    program = jax.jit(prefill, donate_argnums=2).lower(
        state, jax.ShapeDtypeStruct((1, T, 16), jnp.float32), cache
    )
    stats = program.compile().memory_analysis()
    logits = T * slots * layer.num_heads * 4
    held = sum(x.size * 4 for x in jax.tree.leaves(cache))
    assert stats.temp_size_in_bytes < held + 2**25 < logits / 50


def test_few_logits_are_made_at_once():
    rng = np.random.default_rng(cases.SEED)
    q, layout = draw(rng, 1, 3, 2, 4), layout_of(1, 3, None, None)
    source = Source((draw(rng, 1, 3, 2, 4),) * 2, layout)
    calls = []

    def counted(*args):
        calls.append(args)
        return dense(*args)

    attend(q, layout, [source], lambda key, value: (key, value), counted, scale=0.3)
    assert len(calls) == 1
