"""A task with a checkable score: follow the arrows of a table, as text (`BaAcCb>a` is answered by `cbac`).

A row lists n arrows from keys (upper case) to symbols (lower case), which make one cycle, and a first symbol;
every element of the answer is where the arrow of the one before it points. Text of a given quality has errors
of two kinds in the answers: the alphabet's next symbol or the one before instead of the right one. They are
more frequent after the hard symbols, the first quarter of the alphabet.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Prompts(NamedTuple):
    """Questions, and what their answers are checked by."""

    tokens: Int[Array, "B P"]  # their text, its last token the first symbol
    table: Int[Array, "B n"]  # where each symbol's arrow points


@dataclass(frozen=True)
class Arrows:
    """Sizes of the task.

    Attributes:
        symbols: n, at least 4.
        steps: elements of an answer.
        hard: what the log-odds of a right element are less by after a hard symbol.
    """

    symbols: int
    steps: int
    hard: float

    @property
    def vocabulary(self) -> int:
        """Symbols, keys, what opens a row, what ends its table."""
        return 2 * self.symbols + 2

    def draw(self, key: Array, count: int) -> Prompts:
        """That many prompts."""

        def one(key: Array) -> Prompts:
            n, keys = self.symbols, jax.random.split(key, 3)
            cycle, order = (jax.random.permutation(k, n) for k in keys[:2])
            table = jnp.zeros(n, jnp.int32).at[cycle].set(jnp.roll(cycle, -1))
            arrows = jnp.stack([n + order, table[order]], axis=1).reshape(-1)
            first = jax.random.randint(keys[2], (1,), 0, n)
            tokens = jnp.concatenate([jnp.array([2 * n]), arrows, jnp.array([2 * n + 1]), first])
            return Prompts(tokens.astype(jnp.int32), table)

        return jax.vmap(one)(jax.random.split(key, count))

    def is_hard(self, symbols: Int[Array, "*B"]) -> Bool[Array, "*B"]:
        """Whether errors are more frequent after them."""
        return symbols < self.symbols // 4

    def answers(self, key: Array, prompts: Prompts, errors: Float[Array, ""]) -> Int[Array, "B L"]:
        """Answers as in text with that share of errors after symbols that are not hard."""

        def step(symbol: Array, key: Array) -> tuple[Array, Array]:
            right = jnp.take_along_axis(prompts.table, symbol[:, None], axis=1)[:, 0]
            odds = jnp.log((1 - errors) / errors) - self.hard * self.is_hard(symbol)
            kind, wrong = jax.random.split(key)
            is_right = jax.random.uniform(kind, symbol.shape) < jax.nn.sigmoid(odds)
            beside = jnp.where(jax.random.bernoulli(wrong, 0.5, symbol.shape), 1, -1)
            following = jnp.where(is_right, right, (right + beside) % self.symbols)
            return following, following

        _, found = jax.lax.scan(step, prompts.tokens[:, -1], jax.random.split(key, self.steps))
        return found.T

    def scores(self, prompts: Prompts, answers: Int[Array, "B L"]) -> dict[str, Float[Array, ""]]:
        """Shares that are right: of elements, of those after easy and hard symbols, of whole answers.

        And "other", the share of elements that are errors of no kind that text has.
        """
        before = jnp.concatenate([prompts.tokens[:, -1:], answers[:, :-1]], axis=1)
        before = jnp.minimum(before, self.symbols - 1)  # what is no symbol counts as an error once
        right = jnp.take_along_axis(prompts.table, before, axis=1)
        hit, hard = answers == right, self.is_hard(before)
        other = ~hit & (answers != (right + 1) % self.symbols) & (answers != (right - 1) % self.symbols)
        return {
            "right": jnp.mean(hit),
            "easy": jnp.sum(hit & ~hard) / jnp.maximum(jnp.sum(~hard), 1),
            "hard": jnp.sum(hit & hard) / jnp.maximum(jnp.sum(hard), 1),
            "whole": jnp.mean(jnp.all(hit, axis=1)),
            "other": jnp.mean(other),
        }
