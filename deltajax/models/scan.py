"""A run of identical units of blocks, their parameters stacked and applied by one `jax.lax.scan`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from deltajax.models.block import Block, LayerCache
from deltajax.models.config import ModelConfig
from deltajax.models.groups import LayerGroup
from deltajax.models.remat import rematerialized

GroupCache = tuple[LayerCache, ...]  # one per block of the unit, each leaf with a leading "layers" axis


class ScannedBlocks(nnx.Module):
    """`unit` (a tuple of mixer kinds) applied `repeats` times; parameters carry a leading "layers" axis.

    Compile time depends on the unit, not on `repeats`, unless the layers are written out.

    Args:
      group: unit and repeats.
      config: the model's configuration; `config.remat` says what the backward pass recomputes,
        `config.scan_layers` whether one loop runs over the layers.
      rngs: parameter randomness; each layer draws its own.
    """

    def __init__(self, group: LayerGroup, config: ModelConfig, *, rngs: nnx.Rngs):
        self.repeats = group.repeats
        self.remat = config.remat
        self.loop = config.scan_layers and group.repeats > 1

        @nnx.split_rngs(splits=group.repeats)
        @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stacked(rngs: nnx.Rngs) -> nnx.List:
            return nnx.List([Block(kind, config, rngs=rngs) for kind in group.unit])

        self.blocks: Any = stacked(rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None,
        cache: GroupCache | None,
        **options: Any,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Applies every layer in order, with the mixers' options; the cache is None when none is given."""
        graph, state = nnx.split(self.blocks)

        def unit(x, layer):
            params, caches = layer
            new_caches = []
            for i, block in enumerate(nnx.merge(graph, params)):
                own = None if caches is None else caches[i]
                x, new = block(x, segment_ids=segment_ids, cache=own, **options)
                new_caches.append(new)
            return x, None if caches is None else tuple(new_caches)

        unit = rematerialized(unit, self.remat, in_loop=self.loop)
        if cache is None or self.repeats > 1:
            return jax.lax.scan(unit, x, (state, cache), unroll=not self.loop)
        # Without a loop, a donated cache is updated where it lies.
        x, new = unit(x, jax.tree.map(lambda leaf: leaf[0], (state, cache)))
        return x, jax.tree.map(lambda leaf: leaf[None], new)

    def init_cache(self, batch: int, max_length: int) -> GroupCache:
        """Empty caches of all layers, stacked."""
        one = tuple(block.init_cache(batch, max_length) for block in self.blocks)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.repeats, *leaf.shape)), one)

    def layer(self, repeat: int) -> nnx.List:
        """The unit's blocks of one repeat, with that repeat's slice of the parameters."""
        graph, state = nnx.split(self.blocks)
        return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[repeat], state))
