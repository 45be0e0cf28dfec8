"""Loss on held-out text."""

import math
from functools import cached_property
from typing import Any

import jax
import numpy as np

from train.baseline import bigram_loss
from train.data import Batch, eval_batches
from train.mesh import ShardingRules, data_group, global_batch
from train.mixture import Mixture
from train.model_state import ModelState
from train.step import Params, make_eval_step

# What the bigram baseline counts of data that is not in memory.
_BIGRAM_TOKENS = 4_000_000


class Evaluation:
    """Evaluates one model's parameters, as often as asked, on the same batches.

    Args:
        model: the model and its mesh.
        rules: how the mesh splits it.
        held_out: the text.
        seq_len: tokens per row.
        batch_size: rows per batch, over all devices.
        max_batches: how many batches at most.
    """

    def __init__(
        self,
        model: ModelState,
        rules: ShardingRules,
        held_out: Mixture,
        *,
        seq_len: int,
        batch_size: int,
        max_batches: int,
    ):
        self._model, self._rules, self._held_out = model, rules, held_out
        self._sizes: dict[str, int] = dict(seq_len=seq_len, batch_size=batch_size, max_batches=max_batches)

    @cached_property
    def batches(self) -> list[Batch]:
        """The held-out batches every evaluation uses."""
        return eval_batches(self._held_out, **self._sizes)

    @property
    def num_targets(self) -> int:
        """Tokens they predict."""
        return int(sum((batch["segment_ids"] > 0).sum() for batch in self.batches))

    @cached_property
    def _step(self) -> Any:
        return make_eval_step(self._model.model, self._model.shardings, self._model.mesh, self._rules)

    def loss(self, params: Params) -> float:
        """Mean loss on the batches, nats per token."""
        sums = []
        group, groups = data_group(self._model.mesh, self._rules)
        rows = self._sizes["batch_size"] // groups
        mine = slice(group * rows, (group + 1) * rows)
        for batch in self.batches:
            local = {name: x[mine] for name, x in batch.items()}
            sums.append(self._step(params, global_batch(local, self._model.mesh, self._rules)))
        losses, counts = np.array(jax.device_get(sums), np.float64).T
        return float(losses.sum() / counts.sum())

    def bigram(self, train: Mixture, vocab_size: int) -> float:
        """A bigram model's loss on those batches, nats per token.

        Args:
            train: what it counts.
            vocab_size: number of token ids.
        """
        return bigram_loss(train.sample(_BIGRAM_TOKENS), self.batches, vocab_size)

    def units(self, nats: float) -> str:
        """A loss in nats per token, and in bits per byte of text."""
        return f"{nats:.4f} nats/token ({nats / math.log(2) / self._held_out.bytes_per_target:.3f} bits/byte)"
