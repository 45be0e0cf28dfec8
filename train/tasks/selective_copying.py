"""MAD's selective copying: letters scattered among blanks, to be said in order at the end."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from train.tasks.task import Sample, Task, distinct


@dataclass(frozen=True)
class SelectiveCopying(Task):
    """`_ a _ _ b | _ _`: after the mark, at each blank, say the next letter.

    Attributes:
        symbols: letters, a blank (the last but one token) and the mark (the last).
        copied: letters of a row.
    """

    symbols: int = 16
    copied: int = 16

    @property
    def vocab_size(self) -> int:
        """`symbols`."""
        return self.symbols

    def max_answers(self, length: int) -> int:
        """The letters."""
        return self.copied

    def check(self, length: int) -> None:
        """Raises ValueError unless letters, mark and answers fit in the length."""
        self._require(self.symbols >= 4, f"symbols={self.symbols}: expected at least 4")
        self._require(self.copied >= 1, f"copied={self.copied}: expected at least 1")
        least = 2 * self.copied + 1
        self._require(length >= least, f"length {length}: expected at least {least} for copied={self.copied}")

    def sample(self, key: jax.Array, length: int) -> Sample:
        """See the class."""
        for_letters, for_places = jax.random.split(key)
        blank, mark = self.symbols - 2, self.symbols - 1
        letters = jax.random.randint(for_letters, (self.copied,), 0, blank)
        room = length - self.copied - 1
        places = jnp.sort(distinct(for_places, room, self.copied))
        tokens = jnp.full(length, blank, jnp.int32).at[places].set(letters).at[room].set(mark)
        targets = jnp.zeros(length, jnp.int32).at[room + 1 :].set(letters)
        return Sample(tokens, targets, jnp.arange(length) > room)
