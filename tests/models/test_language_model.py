"""Properties of the language model: scan, caches, packing, axis names, interfaces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltajax.models import LanguageModel, abstract_model, get_preset

TOLERANCE = dict(rtol=2e-4, atol=2e-4)  # float32 sums in another order, through seven layers
T = 9


def tokens_of(batch, length=T, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 17)


def gradient_program(config) -> str:
    """The jaxpr of the gradient of a sum of logits."""
    graph, state = nnx.split(abstract_model(config))

    def loss(state, tokens):
        return jnp.sum(nnx.merge(graph, state)(tokens))

    return str(jax.make_jaxpr(jax.grad(loss))(state, tokens_of(1)))


@pytest.mark.parametrize("prefix", [0, 3])
def test_cached_decode_equals_the_full_forward_of_a_hybrid(hybrid, run, prefix):
    tokens = tokens_of(2)
    cache, outputs = hybrid.init_cache(2, T), []
    if prefix:
        y, cache = run(hybrid, tokens[:, :prefix], None, cache)
        outputs.append(y)
    for t in range(prefix, T):
        y, cache = run(hybrid, tokens[:, t : t + 1], None, cache)
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), run(hybrid, tokens), **TOLERANCE)


def test_packed_sequences_equal_sequences_alone_in_a_hybrid(hybrid, run):
    tokens = tokens_of(1)
    y = run(hybrid, tokens, jnp.array([[1, 1, 1, 0, 3, 3, 3, 2, 0]]))
    for a, b in ((0, 3), (4, 7), (7, 8)):
        np.testing.assert_allclose(y[:, a:b], run(hybrid, tokens[:, a:b]), **TOLERANCE)


def test_the_scanned_model_equals_its_layers_applied_one_by_one(hybrid, run):
    tokens = tokens_of(2)
    assert [(len(g.blocks), g.repeats) for g in hybrid.groups] != [(1, 7)]
    x = hybrid.embedding[...][tokens]
    kinds = []
    for group in hybrid.groups:
        for repeat in range(group.repeats):
            for block in group.layer(repeat):
                x, _ = block(x, segment_ids=None, cache=None)
                kinds.append(type(block.mixer).__name__)
    assert len(kinds) == 7 and kinds[0] == kinds[6] == "DeltaNet" and kinds[3] == "KimiDeltaAttention"
    np.testing.assert_allclose(hybrid.logits(hybrid.norm(x)), run(hybrid, tokens), **TOLERANCE)


def test_stacked_layers_draw_their_own_initial_values(tiny, build):
    model = build(tiny.replace(layer_pattern=("kda",), num_layers=3))
    for path, param in nnx.to_flat_state(nnx.state(model.groups)):
        if "scale" in path or "bias" in path:
            continue
        assert param.shape[0] == 3 and not jnp.array_equal(param[0], param[1]), path


@pytest.mark.parametrize("kind", ["delta_net", "full_attention"])
def test_the_program_does_not_grow_with_depth(tiny, kind):
    def equations(depth):
        config = tiny.replace(layer_pattern=(kind, "kda"), num_layers=depth)
        return gradient_program(config).count(" = ")

    assert equations(24) == equations(4) > 100


@pytest.mark.parametrize(
    "name", ["tiny_hybrid", "kda_1p3b", "kda_mla_1p3b", "kimi_linear_48b_a3b", "qwen3_next_80b_a3b"]
)
def test_every_parameter_has_one_logical_axis_name_per_dimension(name):
    known = {"embed", "heads", "kv_heads", "head_dim", "latent", "conv", "mlp", "vocab", "layers"}
    known |= {"experts", "router"}
    model = abstract_model(get_preset(name))
    for path, param in nnx.to_flat_state(nnx.state(model)):
        axes = param.get_metadata("out_sharding")
        assert len(axes) == len(param.shape) and set(axes) <= known and len(set(axes)) == len(axes), path
        assert (axes[0] == "layers") == (path[0] == "groups"), path
    specs = nnx.get_partition_spec(nnx.state(model))
    assert specs["lm_head"].get_value() == jax.P("embed", "vocab")
    assert specs["embedding"].get_value() == jax.P("vocab", "embed")


def test_hidden_states_then_logits_is_the_model(hybrid, run):
    tokens = tokens_of(2)
    hidden = hybrid.hidden_states(tokens)
    assert hidden.shape == (2, T, 16) and hybrid.head_kernel().shape == (16, 17)
    np.testing.assert_allclose(hidden @ hybrid.head_kernel(), run(hybrid, tokens), **TOLERANCE)


def test_two_models_of_one_configuration_have_one_definition_and_average_leaf_by_leaf(hybrid, run):
    other = LanguageModel(hybrid.config, rngs=nnx.Rngs(1))
    assert nnx.graphdef(other) == nnx.graphdef(hybrid)
    average = jax.tree.map(lambda a, b: (a + b) / 2, hybrid, other)
    want = (hybrid.embedding[...] + other.embedding[...]) / 2
    np.testing.assert_array_equal(average.embedding[...], want)
    assert jnp.isfinite(run(average, tokens_of(2))).all()


def test_a_cache_does_not_grow_to_fewer_slots(short):
    cache = short.init_cache(1, 8)
    assert jax.tree.map(jnp.shape, short.grow_cache(cache, 9)) == jax.tree.map(
        jnp.shape, short.init_cache(1, 9)
    )
    with pytest.raises(ValueError, match="max_length=4: expected at least 8, the cache's slots"):
        short.grow_cache(cache, 4)


def test_tied_embeddings_are_the_head(tiny, build):
    model = build(tiny.replace(tie_embeddings=True))
    np.testing.assert_array_equal(model.head_kernel(), model.embedding[...].T)
    assert model(tokens_of(1)).shape == (1, T, 17)


def test_bfloat16_compute_gives_float32_logits_and_finite_float32_gradients(tiny):
    config = tiny.replace(layer_pattern=("gated_delta_net", "sliding_window"), dtype="bfloat16")
    model = LanguageModel(config, rngs=nnx.Rngs(0))

    @nnx.jit
    def step(model):
        def loss(model):
            logits = model(tokens_of(2))
            return jnp.mean(logits**2), logits

        return nnx.grad(loss, has_aux=True)(model)

    grads, logits = step(model)
    assert logits.dtype == jnp.float32 and model.hidden_states(tokens_of(1)).dtype == jnp.bfloat16
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert grad.dtype == jnp.float32 and jnp.isfinite(grad).all() and jnp.abs(grad).max() > 0, path
