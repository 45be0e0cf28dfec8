"""A model's structure without its arrays."""

import jax
from flax import nnx

from deltajax.models.config import ModelConfig
from deltajax.models.language_model import LanguageModel


def abstract_model(config: ModelConfig) -> LanguageModel:
    """The model with `jax.ShapeDtypeStruct` parameters, which lie nowhere yet."""
    # `nnx.eval_shape` would, under `jax.set_mesh`, take the parameters' logical axes for axes of that mesh.
    graph, state = jax.eval_shape(lambda: nnx.split(LanguageModel(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, state)
