"""Multi-query associative recall: key-value pairs, then the keys again, each asking for its value.

As in Zoology (arXiv 2312.04927): keys and values have halves of the vocabulary of their own, each key occurs
in one pair, and how long after the pairs it is asked for follows a power law. Between the queries stand
random tokens.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from train.tasks.task import Sample, Task, distinct


@dataclass(frozen=True)
class MQAR(Task):
    """`k1 v1 k2 v2 .. | .. k2 .. k1 ..`: at each later key, say its value.

    Attributes:
        vocabulary: tokens in all: keys in [1, vocabulary / 2), values in the upper half.
        pairs: key-value pairs; None for an eighth of the length.
        power: exponent a of the gaps' law p(gap) ~ gap^(a - 1); 1 is uniform, near 0 most are short.
        fewest: if not None, a row has `fewest`, twice as many, and so on up to all pairs, equally often:
            models that see rows of all pairs alone stay at chance for thousands of steps.
    """

    vocabulary: int = 8192
    pairs: int | None = None
    power: float = 0.01
    fewest: int | None = None

    @property
    def vocab_size(self) -> int:
        """`vocabulary`."""
        return self.vocabulary

    def num_pairs(self, length: int) -> int:
        """Pairs of a row (the most of them), which are its answers too."""
        return length // 8 if self.pairs is None else self.pairs

    def hardest(self) -> "MQAR":
        """Rows of all pairs."""
        return dataclasses.replace(self, fewest=None)

    def max_answers(self, length: int) -> int:
        """Each pair is asked for once."""
        return self.num_pairs(length)

    def check(self, length: int) -> None:
        """Raises ValueError unless pairs and queries fit in the length, and keys in the vocabulary."""
        n = self.num_pairs(length)
        self._require(n >= 1, f"pairs={n}: expected at least 1 (length {length})")
        self._require(
            self.fewest is None or 1 <= self.fewest <= n, f"fewest={self.fewest}: expected 1 to the {n} pairs"
        )
        self._require(length % 2 == 0, f"length {length}: expected an even number")
        self._require(4 * n <= length, f"pairs={n}: expected at most a quarter of the length {length}")
        self._require(
            self.vocabulary % 2 == 0 and n < self.vocabulary // 2,
            f"vocabulary={self.vocabulary}: expected an even number above twice the {n} pairs",
        )

    def sample(self, key: jax.Array, length: int) -> Sample:
        """See the class."""
        n, half = self.num_pairs(length), self.vocabulary // 2
        for_keys, for_values, for_gaps, for_rest, for_number = jax.random.split(key, 5)
        keys = 1 + distinct(for_keys, half - 1, n)
        values = half + distinct(for_values, half, n)
        number = self._number(for_number, n)
        # Different places for queries, drawn one after another with the law's weights: the order of
        # log-weights with Gumbel noise does just that.
        place = jnp.arange(length // 2)
        gap = jnp.maximum(place - number + 1, 1)
        weights = jnp.where(place < number, -jnp.inf, (self.power - 1) * jnp.log(gap))
        places = jax.lax.top_k(weights + jax.random.gumbel(for_gaps, (length // 2,)), n)[1]
        tokens = jax.random.randint(for_rest, (length,), 0, self.vocabulary)
        there = jnp.arange(n) < number
        pair = 2 * jnp.arange(n)
        for where, what in ((pair, keys), (pair + 1, values), (2 * places, keys)):
            tokens = tokens.at[jnp.where(there, where, length)].set(what, mode="drop")
        queries = jnp.where(there, 2 * places, length)
        targets = jnp.zeros(length, jnp.int32).at[queries].set(values, mode="drop")
        return Sample(tokens, targets, jnp.zeros(length, bool).at[queries].set(True, mode="drop"))

    def _number(self, key: jax.Array, n: int) -> jax.Array | int:
        if self.fewest is None:
            return n
        numbers = [self.fewest * 2**i for i in range(n.bit_length()) if self.fewest * 2**i < n]
        return jax.random.choice(key, jnp.array([*numbers, n]))
