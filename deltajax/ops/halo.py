"""The tokens just before a device's own, where a mesh axis spreads a sequence; inside `jax.shard_map`."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from deltajax.ops.problem import vary_alike


def left_halo(x: Shaped[Array, "B T ..."], size: int, axis_name: str) -> Shaped[Array, "B size ..."]:
    """The ``size`` tokens before this device's first, from as many devices before it as have them.

    Zeros stand before the sequence's first token.
    """
    devices, T = lax.axis_size(axis_name), x.shape[1]
    parts, missing = [], size
    for hop in range(1, devices):
        if not missing:
            break
        count = min(missing, T)
        steps = [(i, i + hop) for i in range(devices - hop)]  # devices that nothing is sent to receive zeros
        parts.append(lax.ppermute(x[:, T - count :], axis_name, steps))
        missing -= count
    if missing:
        parts.append(vary_alike(jnp.zeros((x.shape[0], missing, *x.shape[2:]), x.dtype), x)[0])
    return jnp.concatenate(parts[::-1], axis=1) if parts else x[:, :0]
