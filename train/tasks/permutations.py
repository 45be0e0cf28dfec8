"""The word problem of the permutation groups: after every permutation, the product of all so far."""

import functools
import itertools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from train.tasks.task import Sample, Task


@functools.cache
def elements(degree: int) -> tuple[tuple[int, ...], ...]:
    """All permutations of `degree` objects; token i is the i-th. p sends x to p[x]."""
    return tuple(itertools.permutations(range(degree)))


@functools.cache
def _products(degree: int) -> np.ndarray:
    """[G, G]: the index of "first row's, then column's"."""
    table = np.array(elements(degree))
    index = {p: i for i, p in enumerate(elements(degree))}
    return np.array([[index[tuple(second[first])] for second in table] for first in table], np.int32)


def moved(permutation: tuple[int, ...]) -> int:
    """How many objects it moves."""
    return sum(x != i for i, x in enumerate(permutation))


@dataclass(frozen=True)
class PermutationGroup(Task):
    """Random permutations; every position asks for the composition of those up to it.

    Attributes:
        degree: objects permuted: 3 for S3 (6 elements), 5 for S5 (120).
        moves: which permutations occur: "all", or "swaps" (the identity and those of two objects), one
            reflection each.
    """

    degree: int = 3
    moves: str = "all"

    @property
    def vocab_size(self) -> int:
        """The group's elements."""
        return math.factorial(self.degree)

    def check(self, length: int) -> None:
        """Raises ValueError on an empty row or a group that is not offered."""
        self._require(length >= 1, f"length {length}: expected at least 1")
        self._require(2 <= self.degree <= 5, f"degree={self.degree}: expected 2 to 5")
        self._require(self.moves in ("all", "swaps"), f"moves={self.moves!r}: expected 'all' or 'swaps'")

    def sample(self, key: jax.Array, length: int) -> Sample:
        """See the class."""
        most = 2 if self.moves == "swaps" else self.degree
        allowed = [i for i, p in enumerate(elements(self.degree)) if moved(p) <= most]
        table = jnp.asarray(_products(self.degree))
        tokens = jax.random.choice(key, jnp.array(allowed, jnp.int32), (length,))
        so_far = jax.lax.associative_scan(lambda a, b: table[a, b], tokens)
        return Sample(tokens, so_far, jnp.ones(length, bool))
