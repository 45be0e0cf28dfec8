"""What a task is: rows of tokens, the answers they determine, and where these are asked for."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Sample(NamedTuple):
    """A row, or (with leading axes) a batch of rows, of a task.

    Attributes:
        tokens: int32 [T], what the model reads.
        targets: int32 [T], what it should say at each position; means nothing where `answers` is False.
        answers: bool [T], where an answer is asked for: loss and accuracy count these positions alone.
    """

    tokens: Int[Array, " T"]
    targets: Int[Array, " T"]
    answers: Bool[Array, " T"]


@dataclass(frozen=True)
class Task:
    """Base of the tasks. Their fields are their difficulty; equal tasks make equal rows of equal keys."""

    # Whether all answers are read from the state after the last token (an auto-encoder's task) instead of at
    # their own positions.
    reads_last: ClassVar[bool] = False

    @property
    def vocab_size(self) -> int:
        """Tokens and targets are in [0, vocab_size)."""
        raise NotImplementedError

    def max_answers(self, length: int) -> int:
        """No row of this length has more answers; a static bound, for shapes."""
        return length

    def check(self, length: int) -> None:
        """Raises ValueError, naming what does not fit, where there are no rows of this length."""
        raise NotImplementedError

    def sample(self, key: jax.Array, length: int) -> Sample:
        """One row; works under `jit` and `vmap`.

        Args:
            key: a JAX random key, which alone decides the row.
            length: T, static.
        """
        raise NotImplementedError

    def _require(self, holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}: {message}")


def distinct(key: jax.Array, count: int, n: int) -> Int[Array, " n"]:
    """`n` different numbers of [0, count), in random order, all such choices equally likely."""
    return jax.lax.top_k(jax.random.uniform(key, (count,)), n)[1]


def seen_before(ids: Int[Array, " N"], valid: Bool[Array, " N"]) -> Bool[Array, " N"]:
    """Whether an earlier valid entry has the same id; False where this one is not valid."""
    same = (ids[:, None] == ids[None, :]) & valid[None, :]
    return jnp.any(jnp.tril(same, -1), axis=1) & valid
