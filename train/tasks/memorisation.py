"""MAD's memorisation: a dictionary that is the same in all rows, and that nothing in a row tells."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from train.tasks.task import Sample, Task


@dataclass(frozen=True)
class Memorisation(Task):
    """`k ? k ? ..`: at each mark, say the key's value, which only training can have told.

    Attributes:
        symbols: keys (the lower half), values, and the mark (the last token).
        dictionary: seed of the values.
    """

    symbols: int = 256
    dictionary: int = 12345

    @property
    def vocab_size(self) -> int:
        """`symbols`."""
        return self.symbols

    @property
    def values(self) -> np.ndarray:
        """int32 [keys]: each key's value; different keys have different ones."""
        keys = (self.symbols - 1) // 2
        rng = np.random.default_rng(self.dictionary)
        return keys + rng.permutation(self.symbols - 1 - keys)[:keys].astype(np.int32)

    def max_answers(self, length: int) -> int:
        """A mark after each key."""
        return length // 2

    def check(self, length: int) -> None:
        """Raises ValueError unless the length is even and there are two keys."""
        self._require(length >= 2 and length % 2 == 0, f"length {length}: expected an even number")
        self._require(self.symbols >= 5, f"symbols={self.symbols}: expected at least 5")

    def sample(self, key: jax.Array, length: int) -> Sample:
        """See the class."""
        values = jnp.asarray(self.values)
        keys = jax.random.randint(key, (length // 2,), 0, len(values))
        marks = jnp.full_like(keys, self.symbols - 1)
        targets = jnp.repeat(values[keys], 2)
        return Sample(jnp.stack([keys, marks], axis=1).reshape(-1), targets, jnp.arange(length) % 2 == 1)
