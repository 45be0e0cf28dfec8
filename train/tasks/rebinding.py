"""Rebinding: keys get new values again and again; a query asks for the latest.

What the delta rule is for: a memory that only adds returns the sum of all values a key ever had.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from train.tasks.task import Sample, Task

PAD, SET, GET = 0, 1, 2
FIRST_KEY = 3


@dataclass(frozen=True)
class Rebinding(Task):
    """`set k v`, `get k v`, ...: after `get k`, say the value that k was set to last.

    A key that was never set is set instead of asked for.

    Attributes:
        keys: names.
        values: values.
    """

    keys: int = 16
    values: int = 64

    @property
    def vocab_size(self) -> int:
        """Padding, the two operations, keys, values."""
        return FIRST_KEY + self.keys + self.values

    def max_answers(self, length: int) -> int:
        """All operations but the first."""
        return length // 3 - 1

    def check(self, length: int) -> None:
        """Raises ValueError unless a set and a get fit in the length."""
        self._require(length >= 6, f"length {length}: expected at least 6")
        self._require(self.keys >= 1, f"keys={self.keys}: expected at least 1")
        self._require(self.values >= 2, f"values={self.values}: expected at least 2")

    def sample(self, key: jax.Array, length: int) -> Sample:
        """See the class; what three do not divide of the length is padding."""
        n = length // 3
        for_key, for_kind, for_value = jax.random.split(key, 3)
        k = jax.random.randint(for_key, (n,), 0, self.keys)
        new = jax.random.randint(for_value, (n,), 0, self.values)
        wants_get = jax.random.bernoulli(for_kind, 0.5, (n,))
        # The latest set of each operation's key, up to the operation itself.
        order = jnp.arange(n)
        earlier = (k[:, None] == k[None]) & (order[:, None] > order[None])
        get = wants_get & jnp.any(earlier, axis=1)  # the first of a key always is a set
        sets = (earlier & ~get[None]) | ((order[:, None] == order[None]) & ~get[:, None])
        latest = jnp.max(jnp.where(sets, order[None], -1), axis=1)
        value = FIRST_KEY + self.keys + new[latest]
        rows = jnp.stack([jnp.where(get, GET, SET), FIRST_KEY + k, value], axis=1).reshape(-1)
        asked = jnp.stack([jnp.zeros(n, bool), get, jnp.zeros(n, bool)], axis=1).reshape(-1)
        rest = (0, length - 3 * n)
        tokens = jnp.pad(rows, rest, constant_values=PAD)
        return Sample(tokens, jnp.roll(tokens, -1), jnp.pad(asked, rest))
