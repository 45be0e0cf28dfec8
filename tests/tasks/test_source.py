"""Tasks as Grain sources: random access, the same rows everywhere, checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.tasks import MQAR, Stacks, TaskSource, sample_rows, task_batches
from train.tasks.source import split_key

TASK = Stacks(stacks=3, symbols=4)


def test_a_row_depends_on_seed_split_and_index_alone():
    source = TaskSource(TASK, 24, seed=3)
    bulk = jax.jit(lambda i: sample_rows(TASK, 24, split_key(3, "train"), i))
    indices = np.array([7, 0, 2**31 + 5, 7], np.uint32)
    want = bulk(jnp.asarray(indices))
    for i, index in enumerate(indices):
        for name, x in source[index].items():
            np.testing.assert_array_equal(x, getattr(want, name)[i])
    other = TaskSource(TASK, 24, seed=3, split="eval")
    assert not np.array_equal(source[7]["tokens"], other[7]["tokens"])


def test_batches_are_endless_and_resume_from_their_state():
    batches = iter(task_batches(TaskSource(TASK, 24), 4).to_iter_dataset())
    first = [next(batches) for _ in range(2)]
    assert first[0]["tokens"].shape == (4, 24) and len(task_batches(TaskSource(TASK, 24), 4)) == 2**30
    state = batches.get_state()
    want = next(batches)
    again = iter(task_batches(TaskSource(TASK, 24), 4).to_iter_dataset())
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["tokens"], want["tokens"])


def test_sources_refuse_at_once():
    with pytest.raises(ValueError, match="MQAR: pairs=9"):
        TaskSource(MQAR(pairs=9), 32)
    with pytest.raises(ValueError, match="split"):
        TaskSource(TASK, 24, split="test")
