"""Parity: after every bit, whether the number of ones so far is odd."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from train.tasks.task import Sample, Task


@dataclass(frozen=True)
class Parity(Task):
    """Random bits; every position asks for the sum modulo 2 of the bits up to it."""

    @property
    def vocab_size(self) -> int:
        """0 and 1."""
        return 2

    def check(self, length: int) -> None:
        """Raises ValueError on an empty row."""
        self._require(length >= 1, f"length {length}: expected at least 1")

    def sample(self, key: jax.Array, length: int) -> Sample:
        """See the class."""
        bits = jax.random.bernoulli(key, 0.5, (length,)).astype(jnp.int32)
        return Sample(bits, jnp.cumsum(bits) % 2, jnp.ones(length, bool))
