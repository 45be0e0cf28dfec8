"""Models whose parameters are drawn, every number its own: nothing is compiled for their initial values."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltajax.models import LanguageModel, ModelConfig, abstract_model


def drawn_model(config: ModelConfig) -> LanguageModel:
    graph, state = nnx.split(abstract_model(config))
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(state))
    rng = np.random.default_rng(5)
    drawn = [jnp.asarray(rng.normal(size=leaf.shape, scale=0.3), leaf.dtype) for leaf in leaves]
    nnx.replace_by_pure_dict(state, jax.tree.unflatten(tree, drawn))
    return nnx.merge(graph, state)


def params_of(model: LanguageModel):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))
