"""Tiny models: wide initial values, so that a wrong path shows in the logits."""

import functools

import jax
import pytest
from flax import nnx

from deltajax.models import LanguageModel, ModelConfig

TINY = ModelConfig(
    vocab_size=17,
    hidden_size=16,
    num_layers=2,
    layer_pattern=("delta_net",),
    num_heads=2,
    head_dim=8,
    intermediate_size=24,
    window_size=4,
    initializer_range=0.3,
    implementation="scan",  # compiles fastest; the ops' own tests compare the others to it
)
HYBRID = TINY.replace(
    layer_pattern=("delta_net", "full_attention", "gated_delta_net", "kda", "sliding_window", "kda"),
    num_layers=7,
)


@functools.cache
def tiny_model(config: ModelConfig) -> LanguageModel:
    return LanguageModel(config, rngs=nnx.Rngs(0))


@functools.partial(jax.jit, static_argnums=0)
def _run(graph, state, tokens, segment_ids, cache):
    return nnx.merge(graph, state)(tokens, segment_ids=segment_ids, cache=cache)


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    return TINY


@pytest.fixture(scope="session")
def build():
    return tiny_model


@pytest.fixture(scope="session")
def run():
    """`run(model, tokens, segment_ids=None, cache=None)`, compiled once per shape."""

    def call(model, tokens, segment_ids=None, cache=None):
        graph, state = nnx.split(model)
        return _run(graph, state, tokens, segment_ids, cache)

    return call


@pytest.fixture(scope="session")
def hybrid() -> LanguageModel:
    return tiny_model(HYBRID)


@pytest.fixture(scope="session")
def short() -> LanguageModel:
    """Layers of each kind of cache, in a loop and alone, for what is the same in all layers."""
    return tiny_model(TINY.replace(layer_pattern=("kda", "kda", "full_attention"), num_layers=3))
