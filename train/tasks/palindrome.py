"""Palindrome: a string, a separator, and the string backwards, of which every token is asked for."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from train.tasks.task import Sample, Task


@dataclass(frozen=True)
class Palindrome(Task):
    """`a b c | c b a`: from the separator on, say the next token of the mirror image.

    Attributes:
        symbols: letters, tokens 1 to `symbols`; token 0 separates.
    """

    symbols: int = 63

    @property
    def vocab_size(self) -> int:
        """Letters and the separator."""
        return self.symbols + 1

    def max_answers(self, length: int) -> int:
        """The second half."""
        return length // 2

    def check(self, length: int) -> None:
        """Raises ValueError unless the length is even and there are two letters."""
        self._require(length >= 2 and length % 2 == 0, f"length {length}: expected an even number")
        self._require(self.symbols >= 2, f"symbols={self.symbols}: expected at least 2")

    def sample(self, key: jax.Array, length: int) -> Sample:
        """See the class; the mirror image's last token is a target only."""
        n = length // 2
        word = jax.random.randint(key, (n,), 1, self.symbols + 1)
        row = jnp.concatenate([word, jnp.zeros(1, word.dtype), word[::-1]])
        return Sample(row[:-1], row[1:], jnp.arange(length) >= n)
