"""MAD's in-context recall (arXiv 2403.17844), with or without noise between the pairs."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from train.tasks.task import Sample, Task, seen_before


@dataclass(frozen=True)
class InContextRecall(Task):
    """`k1 v1 k2 v2 k1 v1 ..`: a key's value is drawn anew for each row; at a key seen before, say its value.

    The last pair's key always was seen before.

    Attributes:
        symbols: keys (the lower half) and values (the upper half).
        noise_symbols: tokens of noise, after these.
        noise: share of the pairs replaced by two tokens of noise.
    """

    symbols: int = 16
    noise_symbols: int = 0
    noise: float = 0.0

    @property
    def vocab_size(self) -> int:
        """Keys, values, noise."""
        return self.symbols + self.noise_symbols

    def max_answers(self, length: int) -> int:
        """All keys but the first."""
        return length // 2 - 1

    def check(self, length: int) -> None:
        """Raises ValueError unless two pairs fit, and noise has tokens."""
        self._require(length >= 4 and length % 2 == 0, f"length {length}: expected an even number from 4")
        self._require(
            self.symbols >= 4 and self.symbols % 2 == 0,
            f"symbols={self.symbols}: expected an even number from 4",
        )
        self._require(0 <= self.noise < 1, f"noise={self.noise}: expected a share in [0, 1)")
        self._require(
            self.noise == 0 or self.noise_symbols > 0,
            f"noise_symbols={self.noise_symbols}: expected at least 1 with noise={self.noise}",
        )

    def sample(self, key: jax.Array, length: int) -> Sample:
        """See the class."""
        n, half = length // 2, self.symbols // 2
        for_keys, for_values, for_noise, for_tokens, for_one, for_last = jax.random.split(key, 6)
        keys = jax.random.randint(for_keys, (n,), 0, half)
        value_of = half + jax.random.randint(for_values, (half,), 0, half)
        # One pair before the last is never noise, so that there is something to ask for.
        noisy = jax.random.bernoulli(for_noise, self.noise, (n,))
        noisy = noisy.at[jax.random.randint(for_one, (), 0, n - 1)].set(False).at[n - 1].set(False)
        before = jnp.where(noisy, -jnp.inf, 0.0).at[n - 1].set(-jnp.inf)
        keys = keys.at[n - 1].set(keys[jax.random.categorical(for_last, before)])
        pairs = jnp.stack([keys, value_of[keys]], axis=1)
        noise = jax.random.randint(
            for_tokens, (n, 2), self.symbols, self.symbols + max(self.noise_symbols, 1)
        )
        tokens = jnp.where(noisy[:, None], noise, pairs).reshape(-1)
        asked = jnp.stack([seen_before(keys, ~noisy), jnp.zeros(n, bool)], axis=1).reshape(-1)
        return Sample(tokens, jnp.roll(tokens, -1), asked)
