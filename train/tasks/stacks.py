"""Several stacks at once: pushes and pops of random ones; a pop asks for the element it takes."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from train.tasks.task import Sample, Task

PAD, PUSH, POP = 0, 1, 2
FIRST_STACK = 3


@dataclass(frozen=True)
class Stacks(Task):
    """`push s x`, `pop s x`, ...: after `pop s`, say the x that lies on top of stack s.

    Attributes:
        stacks: independent stacks.
        symbols: elements.
        depth: elements a stack holds at most: one that is full is popped, one that is empty pushed to.
    """

    stacks: int = 64
    symbols: int = 64
    depth: int = 16

    @property
    def vocab_size(self) -> int:
        """Padding, the two operations, the stacks' names, the elements."""
        return FIRST_STACK + self.stacks + self.symbols

    def max_answers(self, length: int) -> int:
        """Every other operation at most is a pop."""
        return length // 6

    def check(self, length: int) -> None:
        """Raises ValueError unless a push and a pop fit in the length."""
        self._require(length >= 6, f"length {length}: expected at least 6")
        for name in ("stacks", "depth"):
            value = getattr(self, name)
            self._require(value >= 1, f"{name}={value}: expected at least 1")
        self._require(self.symbols >= 2, f"symbols={self.symbols}: expected at least 2")

    def sample(self, key: jax.Array, length: int) -> Sample:
        """See the class; what three do not divide of the length is padding."""
        n = length // 3
        for_stack, for_kind, for_element = jax.random.split(key, 3)
        stack = jax.random.randint(for_stack, (n,), 0, self.stacks)
        wants_pop = jax.random.bernoulli(for_kind, 0.5, (n,))
        element = jax.random.randint(for_element, (n,), 0, self.symbols)

        def operate(state, operation):
            depths, contents = state
            s, wants_pop, new = operation
            at = depths[s]
            pop = (at > 0) & (wants_pop | (at == self.depth))
            top = contents[s, jnp.maximum(at - 1, 0)]
            # A pop writes what it takes back to where it was, above the new top: nothing changes.
            place = jnp.where(pop, at - 1, at)
            x = jnp.where(pop, top, new)
            contents = contents.at[s, place].set(x)
            return (depths.at[s].add(jnp.where(pop, -1, 1)), contents), (pop, x)

        start = (jnp.zeros(self.stacks, jnp.int32), jnp.zeros((self.stacks, self.depth), element.dtype))
        _, (pop, x) = jax.lax.scan(operate, start, (stack, wants_pop, element))
        x = FIRST_STACK + self.stacks + x
        rows = jnp.stack([jnp.where(pop, POP, PUSH), FIRST_STACK + stack, x], axis=1)
        asked = jnp.stack([jnp.zeros(n, bool), pop, jnp.zeros(n, bool)], axis=1).reshape(-1)
        rest = (0, length - 3 * n)
        tokens = jnp.pad(rows.reshape(-1), rest, constant_values=PAD)
        return Sample(tokens, jnp.roll(tokens, -1), jnp.pad(asked, rest))
