"""MAD's fuzzy in-context recall: keys and values are words of one to three letters."""

import functools
import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from train.tasks.task import Sample, Task, seen_before


@functools.cache
def _words(letters: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """All words of different letters: [N, longest] filled up with 0, and their lengths [N]."""
    words = [w for size in range(1, longest + 1) for w in itertools.permutations(range(letters), size)]
    filled = np.array([w + (0,) * (longest - len(w)) for w in words], np.int32)
    return filled, np.array([len(w) for w in words], np.int32)


@dataclass(frozen=True)
class FuzzyRecall(Task):
    """As `InContextRecall`, but a key is a word of `longest` letters at most, and so is a value.

    A word has no letter twice; its length is drawn first. Keys and values have letters of their own, so a key
    ends where its value begins. Every letter of a value whose key was seen before is asked for. The last
    pair's key always was seen before; what is left of the row after it is padding.

    Attributes:
        symbols: letters of keys (the lower half), of values, and one token of padding.
        longest: letters of a word at most.
    """

    symbols: int = 16
    longest: int = 3

    @property
    def _key_letters(self) -> int:
        return (self.symbols - 1) // 2

    @property
    def _value_letters(self) -> int:
        return self.symbols - 1 - self._key_letters

    @property
    def vocab_size(self) -> int:
        """`symbols`."""
        return self.symbols

    def check(self, length: int) -> None:
        """Raises ValueError unless two of the longest pairs fit, and words have different letters enough."""
        self._require(self.longest >= 1, f"longest={self.longest}: expected at least 1")
        self._require(
            self._key_letters >= max(self.longest, 2),
            f"symbols={self.symbols}: expected at least {2 * max(self.longest, 2) + 1}",
        )
        shortest = 4 * self.longest
        self._require(length >= shortest, f"length {length}: expected at least {shortest}")

    def sample(self, key: jax.Array, length: int) -> Sample:
        """See the class."""
        for_size, for_word, for_values, for_sizes, for_last = jax.random.split(key, 5)
        words, sizes = (jnp.asarray(x) for x in _words(self._key_letters, self.longest))
        n = length // 2  # pairs at most
        # Each pair's key: first a size, then any word of that size.
        size = jax.random.randint(for_size, (n,), 1, self.longest + 1)
        of_size = jnp.where(sizes[None] == size[:, None], 0.0, -jnp.inf)
        ids = jax.random.categorical(for_word, of_size)
        # Every key's value in this row, whether it occurs or not.
        ranks = jax.random.uniform(for_values, (len(words), self._value_letters))
        value_of = self._key_letters + jax.lax.top_k(ranks, self.longest)[1]
        value_sizes = jax.random.randint(for_sizes, (len(words),), 1, self.longest + 1)

        most = 2 * self.longest
        ends = jnp.cumsum(size + value_sizes[ids])
        fits = ends <= length - most  # room for the last pair
        last = jnp.sum(fits)  # at least one fits
        ids = ids.at[last].set(ids[jax.random.categorical(for_last, jnp.where(fits, 0.0, -jnp.inf))])
        used = jnp.arange(n) <= last
        size, value_size = sizes[ids], value_sizes[ids]
        starts = jnp.cumsum(size + value_size) - size - value_size

        pad = self.symbols - 1
        tokens, asked = jnp.full(length, pad, jnp.int32), jnp.zeros(length, bool)
        again = seen_before(ids, used)
        for i in range(self.longest):
            place = jnp.where(used & (i < size), starts + i, length)  # beyond the end: dropped
            tokens = tokens.at[place].set(words[ids, i], mode="drop")
            place = jnp.where(used & (i < value_size), starts + size + i, length)
            tokens = tokens.at[place].set(value_of[ids, i], mode="drop")
            ask = jnp.where(again & (i < value_size), place - 1, length)
            asked = asked.at[ask].set(True, mode="drop")
        return Sample(tokens, jnp.roll(tokens, -1), asked)
