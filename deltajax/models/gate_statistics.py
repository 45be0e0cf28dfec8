"""What the gates of a model's delta-rule layers do to a batch, and its routers: where to look first when
training diverges.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from deltajax.layers import MixtureOfExperts
from deltajax.layers.delta_base import DeltaLayer
from deltajax.layers.embedding import embed_tokens
from deltajax.models.groups import layer_groups
from deltajax.models.language_model import LanguageModel

Statistics = dict[str, Float[Array, ""]]


def gate_statistics(
    model: LanguageModel, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> Statistics:
    """Mean, smallest and largest write strength and log decay of every delta-rule layer, padding left out.

    And of every layer with experts, how much the least and the most used one is chosen: 1 where all are used
    alike.

    A forward pass of its own, so that no training step pays for it; layers are scanned as in training.

    Args:
      model: the language model.
      tokens: int32 [B, T].
      segment_ids: int32 [B, T], 0 is padding.

    Returns:
      Scalars "<layer>/beta_mean", "..._min", "..._max", and the same of "log_decay" where a layer decays;
      "<layer>/expert_load_min", "..._max".
    """
    config, found = model.config, {}
    x = embed_tokens(model.embedding[...], tokens, config.dtype)
    for layers, group in zip(layer_groups(config), model.groups, strict=True):
        graph, state = nnx.split(group.blocks)

        def unit(x, params, graph=graph):
            statistics = []
            for block in nnx.merge(graph, params):
                found = _of_mixer(block.mixer, block.attn_norm(x), segment_ids)
                x, _ = block.mix(x, segment_ids=segment_ids, cache=None)
                statistics.append(found | _of_mlp(block.mlp, block.mlp_norm(x), segment_ids))
                x = block.feed(x, segment_ids=segment_ids)
            return x, statistics

        x, stacked = jax.lax.scan(unit, x, state)
        for place, statistics in enumerate(stacked):
            for name, values in statistics.items():
                for repeat in range(layers.repeats):
                    layer = layers.start + repeat * len(layers.unit) + place
                    found[f"{layer}/{name}"] = values[repeat]
    return found


def _of_mixer(mixer: Any, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"]) -> Statistics:
    if not isinstance(mixer, DeltaLayer):
        return {}
    gates = {"beta": mixer.write_strength(x), "log_decay": mixer.log_decay(x)}
    found = {}
    for name, values in gates.items():
        if values is None:
            continue
        real = (segment_ids > 0).reshape(*segment_ids.shape, *(1,) * (values.ndim - 2))
        count = jnp.maximum(jnp.sum(real) * (values.size // real.size), 1)
        found[f"{name}_mean"] = jnp.sum(jnp.where(real, values, 0)) / count
        found[f"{name}_min"] = jnp.min(jnp.where(real, values, jnp.inf))
        found[f"{name}_max"] = jnp.max(jnp.where(real, values, -jnp.inf))
    return found


def _of_mlp(mlp: Any, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"]) -> Statistics:
    if not isinstance(mlp, MixtureOfExperts):
        return {}
    load = mlp.load(x, segment_ids) * mlp.num_experts
    return {"expert_load_min": jnp.min(load), "expert_load_max": jnp.max(load)}
