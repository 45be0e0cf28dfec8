"""Grouping a layer pattern into runs of a repeated unit, so that each run is one scan."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from deltajax.models.config import ModelConfig


class LayerGroup(NamedTuple):
    """`unit` (a tuple of layer kinds) applied `repeats` times, in order; `start` is its first layer."""

    start: int
    unit: tuple[Any, ...]
    repeats: int


def layer_groups(config: ModelConfig) -> tuple[LayerGroup, ...]:
    """How a model's layers are grouped: by `group_layers`, or each by itself without `stack_layers`."""
    if config.stack_layers:
        return group_layers(config.blocks)
    return tuple(LayerGroup(i, (kind,), 1) for i, kind in enumerate(config.blocks))


def group_layers(layers: Sequence[Any]) -> tuple[LayerGroup, ...]:
    """Splits `layers` into groups so that the fewest blocks are traced, then the fewest groups are used.

    What a compiler sees is the sum of the units' lengths, whatever the depth. Dynamic programming over
    the suffixes: `best[i]` is the cheapest grouping of `layers[i:]`.

    Args:
      layers: the kind of every layer, in order; kinds are only compared.

    Returns:
      Groups whose units, repeated and concatenated, spell `layers`.
    """
    layers = tuple(layers)
    n = len(layers)
    best: list[tuple[int, int, tuple[LayerGroup, ...]]] = [(0, 0, ())] * (n + 1)
    for i in reversed(range(n)):
        options = []
        for size in range(1, n - i + 1):
            unit = layers[i : i + size]
            repeats = 1
            while layers[i + size * repeats : i + size * (repeats + 1)] == unit:
                repeats += 1
            for r in {1, repeats}:
                traced, groups, rest = best[i + size * r]
                options.append((size + traced, 1 + groups, (LayerGroup(i, unit, r), *rest)))
        best[i] = min(options, key=lambda option: option[:2])
    return best[0][2]
