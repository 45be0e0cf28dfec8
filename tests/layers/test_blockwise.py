"""Attention block by block equals one masked product, whatever the layout, and holds its blocks only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltajax.layers import Attention, LatentAttention, blockwise
from deltajax.layers.blockwise import Source, attend, blockwise_attention
from deltajax.layers.layout import layout_of
from tests import cases


@pytest.fixture
def small_blocks(monkeypatch):
    for name, value in dict(MAX_LOGITS=0, STEP_LOGITS=1, MAX_QUERIES=4, MIN_KEYS=3).items():
        monkeypatch.setattr(blockwise, name, value)


def draw(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def dense(q, key, value, mask):
    return jax.nn.dot_product_attention(q, key, value, mask=mask, scale=0.3)


@pytest.mark.parametrize(("window", "heads"), [(None, 1), (1, 4), (5, 2)])
def test_any_layout_equals_one_masked_product(small_blocks, window, heads):
    rng = np.random.default_rng(cases.SEED)
    q = draw(rng, 2, 14, 4, 6) * 3
    # A row that continues its cache, then two segments; a row of padding, whose cache is not seen.
    ids = jnp.array([[1] * 5 + [0] * 2 + [2] * 6 + [3], [0] * 14])
    queries = layout_of(2, 14, ids, jnp.array([11, 11]))
    cached = layout_of(2, 11, jnp.array([[1] * 11, [0] * 3 + [1] * 8]), None)
    sources = [
        Source((draw(rng, 2, n, heads, 6), draw(rng, 2, n, heads, 5)), layout)
        for n, layout in ((11, cached), (14, queries))
    ]
    both = lambda key, value: (key, value)  # noqa: E731
    got = jax.jit(lambda: blockwise_attention(q, queries, sources, both, window=window, scale=0.3))()
    key, value = (jnp.concatenate(x, axis=1) for x in zip(*(s.arrays for s in sources), strict=True))
    mask = blockwise.causal_mask(queries, cached.then(queries), window)
    want = dense(q, key, jnp.pad(value, [(0, 0)] * 3 + [(0, 1)]), mask)[..., :5]
    want = jnp.where((ids != 0)[..., None, None], want, 0)
    assert got.shape == (2, 14, 4, 5)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


LAYERS = {
    "full": lambda: Attention(hidden_size=16, num_heads=4, num_kv_heads=2, rngs=nnx.Rngs(0)),
    "window": lambda: Attention(hidden_size=16, num_heads=2, window_size=5, rngs=nnx.Rngs(0)),
    "latent": lambda: LatentAttention(
        hidden_size=16, num_heads=2, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3,
        rope_theta=100.0, rngs=nnx.Rngs(0),
    ),
}  # fmt: skip


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
    monkeypatch.setattr(blockwise, "STEP_LOGITS", 2**18)
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
