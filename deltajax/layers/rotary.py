"""Rotary position embedding."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RotaryEmbedding:
    """Rotates channel pairs by position-dependent angles (arXiv 2104.09864).

    Channels d and d + size/2 form a pair, turned by `position * theta^(-2 d / size)`, so that the product
    of a query and a key depends on their distance only. A head's channels beyond `size` are left as they are.
    Holds no parameters; equal by value, so that layers of equal configuration have equal graph definitions.

    Args:
      size: channels that are rotated, even: a head's first ones, or all.
      theta: base of the wavelengths.

    Raises:
      ValueError: on an odd size or a non-positive theta.
    """

    size: int
    theta: float = dataclasses.field(default=10000.0, kw_only=True)

    def __post_init__(self) -> None:
        if self.size % 2:
            raise ValueError(f"size={self.size}: expected an even number of rotated channels")
        if not self.theta > 0:
            raise ValueError(f"theta={self.theta}: expected a positive number")

    def __call__(self, x: Float[Array, "B T H K"], positions: Int[Array, "B T"]) -> Float[Array, "B T H K"]:
        """Rotates `x` by the angles of `positions`, in float32; returns `x`'s dtype."""
        half = self.size // 2
        frequency = self.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)  # [K/2]
        angle = positions[..., None, None].astype(jnp.float32) * frequency  # [B, T, 1, K/2]
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        a, b = jnp.split(x[..., : self.size].astype(jnp.float32), 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
        return turned if x.shape[-1] == self.size else jnp.concatenate([turned, x[..., self.size :]], axis=-1)


def rotated_channels(head_dim: int, fraction: float) -> int:
    """How many of a head's channels that fraction is.

    Raises:
      ValueError: where it is not in (0, 1], or makes no whole number.
    """
    count = round(head_dim * fraction)
    if not 0 < fraction <= 1 or abs(count - head_dim * fraction) > 1e-6 * head_dim:
        raise ValueError(
            f"rope_fraction={fraction}: expected a share in (0, 1] that makes a whole number of "
            f"head_dim={head_dim} channels"
        )
    return count
