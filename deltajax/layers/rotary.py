"""Rotary position embedding."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RotaryEmbedding:
    """Rotates channel pairs by position-dependent angles (arXiv 2104.09864).

    Channels d and d + size/2 form a pair, turned by `position * theta^(-2 d / size)`, so that the product
    of a query and a key depends on their distance only. Holds no parameters; equal by value, so that layers
    of equal configuration have equal graph definitions.

    Args:
      size: head size, even.
      theta: base of the wavelengths.

    Raises:
      ValueError: on an odd size or a non-positive theta.
    """

    size: int
    theta: float = dataclasses.field(default=10000.0, kw_only=True)

    def __post_init__(self) -> None:
        if self.size % 2:
            raise ValueError(f"size={self.size}: expected an even head size")
        if not self.theta > 0:
            raise ValueError(f"theta={self.theta}: expected a positive number")

    def __call__(self, x: Float[Array, "B T H K"], positions: Int[Array, "B T"]) -> Float[Array, "B T H K"]:
        """Rotates `x` by the angles of `positions`, in float32; returns `x`'s dtype."""
        half = self.size // 2
        frequency = self.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)  # [K/2]
        angle = positions[..., None, None].astype(jnp.float32) * frequency  # [B, T, 1, K/2]
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
