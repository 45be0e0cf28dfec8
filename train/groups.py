"""Parameters by what they do, to tell where a gradient comes from."""

from typing import Any

import jax
import jax.numpy as jnp

# The first whose parts name any part of a parameter's path.
_GROUPS = {
    "embedding": ("embedding",),
    "lm_head": ("lm_head",),
    "router": ("router", "correction_bias", "shared_gate"),
    "experts": ("experts",),
    "mlp": ("mlp",),
    "norm": ("norm", "attn_norm", "mlp_norm", "o_norm", "q_norm", "k_norm", "q_a_norm", "kv_a_norm"),
    "decay": ("A_log", "dt_bias", "a_proj", "f_a_proj", "f_b_proj"),
    "beta": ("b_proj",),
    "output_gate": ("g_proj", "g_a_proj", "g_b_proj"),
    "conv": ("q_conv", "k_conv", "v_conv"),
    "projections": ("mixer",),
}


def parameter_group(path: Any) -> str:
    """The group of a parameter at a `jax.tree_util` path."""
    parts = {str(key.key) for key in path}
    for group, names in _GROUPS.items():
        if parts.intersection(names):
            return group
    raise ValueError(f"parameter {jax.tree_util.keystr(path)} is of no group")


def group_norms(grads: Any) -> dict[str, jax.Array]:
    """The norm of each group's gradients, float32 scalars."""
    squares: dict[str, jax.Array] = {}
    for path, x in jax.tree.leaves_with_path(grads):
        group = parameter_group(path)
        squares[group] = squares.get(group, jnp.float32(0)) + jnp.sum(jnp.square(x.astype(jnp.float32)))
    return {group: jnp.sqrt(total) for group, total in squares.items()}
