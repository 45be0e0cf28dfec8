"""MAD's compression: the state after the last token must hold the whole row."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from train.tasks.task import Sample, Task


@dataclass(frozen=True)
class Compression(Task):
    """Random letters and a mark; from the hidden state at the mark alone, say the letter of every position.

    Attributes:
        symbols: letters and the mark (the last token).
    """

    reads_last: ClassVar[bool] = True

    symbols: int = 16

    @property
    def vocab_size(self) -> int:
        """`symbols`."""
        return self.symbols

    def max_answers(self, length: int) -> int:
        """The letters."""
        return length - 1

    def check(self, length: int) -> None:
        """Raises ValueError unless there is a letter, of two."""
        self._require(length >= 2, f"length {length}: expected at least 2")
        self._require(self.symbols >= 3, f"symbols={self.symbols}: expected at least 3")

    def sample(self, key: jax.Array, length: int) -> Sample:
        """See the class; the target of a position is the token there."""
        letters = jax.random.randint(key, (length - 1,), 0, self.symbols - 1)
        tokens = jnp.append(letters, self.symbols - 1)
        return Sample(tokens, tokens, jnp.arange(length) < length - 1)
