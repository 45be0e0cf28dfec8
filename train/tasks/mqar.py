"""Multi-query associative recall: key-value pairs, then the keys again, each asking for its value.

As in Zoology (arXiv 2312.04927): keys and values have halves of the vocabulary of their own, each key occurs
in one pair, and how long after the pairs it is asked for follows a power law. Between the queries stand
random tokens.
"""

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
    """

    vocabulary: int = 8192
    pairs: int | None = None
    power: float = 0.01

    @property
    def vocab_size(self) -> int:
        """`vocabulary`."""
        return self.vocabulary

    def num_pairs(self, length: int) -> int:
        """Pairs of a row, which are its answers too."""
        return length // 8 if self.pairs is None else self.pairs

    def max_answers(self, length: int) -> int:
        """Each pair is asked for once."""
        return self.num_pairs(length)

    def check(self, length: int) -> None:
        """Raises ValueError unless pairs and queries fit in the length, and keys in the vocabulary."""
        n = self.num_pairs(length)
        self._require(n >= 1, f"pairs={n}: expected at least 1 (length {length})")
        self._require(length % 2 == 0, f"length {length}: expected an even number")
        self._require(4 * n <= length, f"pairs={n}: expected at most a quarter of the length {length}")
        self._require(
            self.vocabulary % 2 == 0 and n < self.vocabulary // 2,
            f"vocabulary={self.vocabulary}: expected an even number above twice the {n} pairs",
        )

    def sample(self, key: jax.Array, length: int) -> Sample:
        """See the class."""
        n, half = self.num_pairs(length), self.vocabulary // 2
        for_keys, for_values, for_gaps, for_rest = jax.random.split(key, 4)
        keys = 1 + distinct(for_keys, half - 1, n)
        values = half + distinct(for_values, half, n)
        # n different places for queries, drawn one after another with the law's weights: the order of
        # log-weights with Gumbel noise does just that.
        space = (length - 2 * n) // 2
        weights = (self.power - 1) * jnp.log(jnp.arange(1.0, space + 1))
        places = jax.lax.top_k(weights + jax.random.gumbel(for_gaps, (space,)), n)[1]
        tokens = jax.random.randint(for_rest, (length,), 0, self.vocabulary)
        tokens = tokens.at[0 : 2 * n : 2].set(keys).at[1 : 2 * n : 2].set(values)
        queries = 2 * n + 2 * places
        tokens = tokens.at[queries].set(keys)
        targets = jnp.zeros(length, jnp.int32).at[queries].set(values)
        return Sample(tokens, targets, jnp.zeros(length, bool).at[queries].set(True))
