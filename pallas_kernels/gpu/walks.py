"""What the walks over the chunks share, forward and back: their arrays, layout, and runs of a sequence."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu.relations import NUM_FACTORS

WIDTH = 64  # state columns of a warpgroup
SMALLEST = 1e-30


class Chunks(NamedTuple):
    """What the walk reads of q, k, g and beta; every half-precision array of one dtype.

    No gate or a per-head gate (`relations.head_relations`): ``queries`` and ``reads`` are q and k as they
    are, [B, T, H, K]; ``keys`` and ``decay`` are None; factors are [B, HV, NC, 8, 64].
    Per-channel gate (`channel_relations`): queries, reads, keys [B, HV, NC, 64, K], decay [B, HV, NC, K]
    float32, factors [B, HV, NC, 1 or more, 64], of which beta, the first, counts.
    """

    queries: jax.Array
    reads: jax.Array
    keys: jax.Array | None
    solve: jax.Array  # [B, HV, NC, 64, 64]
    p: jax.Array  # [B, HV, NC, 64, 64]
    factors: jax.Array  # float32
    decay: jax.Array | None

    @property
    def num_factors(self) -> int:
        """Factors of a token that the walk reads."""
        return NUM_FACTORS if self.keys is None else 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the walk is laid out on the chip.

    Attributes:
      warpgroups: of a block, with K > 128 pairs of them (one); a block owns 64 state columns for each.
      stages: chunks in flight.
      runs: into how many runs of chunks the sequence is split, to occupy a chip that has few heads to walk;
        or segments that have states of their own.
    """

    warpgroups: int
    stages: int
    runs: int = 1


class Kept(NamedTuple):
    """What the walk may write out for the backward pass."""

    states: jax.Array  # [B, HV, NC, V, K] bf16, the transposed states that enter the chunks
    written: jax.Array  # [2, B, T, HV, V] bf16, U as the sum of two terms
    moved: jax.Array  # [B, runs, HV, K, K] float32, M^T of each run; no runs where nobody needs them


# (N^T, M^T) of all of a row's tokens -> the transposed state that enters them.
Enter = Callable[[jax.Array, jax.Array], jax.Array]


def joined(added: jax.Array, moved: jax.Array) -> tuple[jax.Array, jax.Array]:
    """N^T [B, HV, V, K] and M^T [B, HV, K, K] of all runs, one after the other; see `run_states`."""
    N, M = added[:, 0], moved[:, 0]
    for i in range(1, added.shape[1]):
        N = added[:, i] + jnp.matmul(N, moved[:, i], precision=lax.Precision.HIGHEST)
        M = jnp.matmul(M, moved[:, i], precision=lax.Precision.HIGHEST)
    return N, M


def run_states(added: jax.Array, moved: jax.Array, state: jax.Array | None, runs: int) -> jax.Array:
    """The states [B, runs, HV, V, K] that enter the runs of a sequence.

    Args:
      added: [B, >= runs - 1, HV, V, K] and
      moved: [B, >= runs - 1, HV, K, K], N^T and M^T of each run, that take S^T to S^T M^T + N^T.
      state: [B, HV, V, K], that enters the first, or None for zeros.
      runs: their number.
    """
    states = [jnp.zeros_like(added[:, 0]) if state is None else state]
    for i in range(runs - 1):
        before = jnp.matmul(states[i], moved[:, i], precision=lax.Precision.HIGHEST)
        states.append(added[:, i] + before if i or state is not None else added[:, i])
    return jnp.stack(states, axis=1)
