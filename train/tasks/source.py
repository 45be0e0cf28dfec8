"""Rows of a task by index: for Grain on a host, and in bulk inside a jitted program."""

import functools
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np

from train.tasks.task import Sample, Task

_SPLITS = {"train": 0, "eval": 1}


def split_key(seed: int | jax.Array, split: str) -> jax.Array:
    """The random key of all rows of a split ("train" or "eval"); different splits share no stream of rows."""
    if split not in _SPLITS:
        raise ValueError(f"split: expected one of {tuple(_SPLITS)}, got {split!r}")
    return jax.random.fold_in(jax.random.key(seed), _SPLITS[split])


def sample_rows(task: Task, length: int, key: jax.Array, indices: jax.Array) -> Sample:
    """Rows `indices` (uint32 [N]) of the stream of `key`, each [N, T]; for use inside `jit`."""
    return jax.vmap(lambda i: task.sample(jax.random.fold_in(key, i), length))(indices)


@functools.cache
def _row(task: Task, length: int) -> Any:
    return jax.jit(lambda key, index: task.sample(jax.random.fold_in(key, index), length))


@dataclass(frozen=True)
class TaskSource:
    """An endless Grain random-access source: row i depends on the seed, the split and i alone.

    Attributes:
        task: the task.
        length: T.
        seed: of the rows.
        split: "train" or "eval".

    Raises:
        ValueError: a length that the task has no rows of, or another split.
    """

    task: Task
    length: int
    seed: int = 0
    split: str = "train"

    def __post_init__(self) -> None:
        self.task.check(self.length)
        split_key(self.seed, self.split)

    def __len__(self) -> int:
        return 2**32  # indices are folded into the key as 32 bits

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        """`{"tokens": int32 [T], "targets": int32 [T], "answers": bool [T]}`."""
        # Rows are small: made on the host, they need no trip to an accelerator.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            row = _row(self.task, self.length)(split_key(self.seed, self.split), np.uint32(index))
            return {name: np.asarray(x) for name, x in row._asdict().items()}


def task_batches(source: TaskSource, batch_size: int) -> grain.MapDataset:
    """Batches of a source's rows in order, random access too; `iter` of it is checkpointable."""
    return grain.MapDataset.source(source).batch(batch_size)
