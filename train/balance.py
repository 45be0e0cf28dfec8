"""Experts used evenly without an auxiliary loss: biases of their choice follow the load (arXiv 2408.15664).

Where a router's correction bias has a gradient, it is the load: how many more tokens than the mean chose each
expert (`deltajax.layers.MixtureOfExperts`), summed over micro-batches and devices like any gradient. It is no
part of the loss's gradient, of its norm, or of what the optimizer sees.
"""

from typing import Any

import jax
import jax.numpy as jnp

_BIAS = "correction_bias"


def without_loads(grads: Any) -> Any:
    """The gradients of the loss: zeros for the biases."""
    return jax.tree.map_with_path(lambda path, g: jnp.zeros_like(g) if _is_bias(path) else g, grads)


def balanced(params: Any, grads: Any, rate: float) -> Any:
    """The parameters, with the bias of every expert chosen too often lowered by `rate`, of others raised."""
    return jax.tree.map_with_path(
        lambda path, p, g: p - rate * jnp.sign(g).astype(p.dtype) if _is_bias(path) else p, params, grads
    )


def _is_bias(path: Any) -> bool:
    return path[-1].key == _BIAS
