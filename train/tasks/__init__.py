"""Synthetic tasks whose answers are known: recall, copying, stacks, state tracking, and the MAD suite.

Each task is a frozen dataclass; `sample` makes one row from a random key in plain JAX, so that the same rows
come from a Grain source (`TaskSource`) on a host and in bulk inside a jitted program (`sample_rows`).
"""

from train.tasks.compression import Compression
from train.tasks.fuzzy_recall import FuzzyRecall
from train.tasks.in_context_recall import InContextRecall
from train.tasks.memorisation import Memorisation
from train.tasks.mqar import MQAR
from train.tasks.palindrome import Palindrome
from train.tasks.parity import Parity
from train.tasks.permutations import PermutationGroup
from train.tasks.rebinding import Rebinding
from train.tasks.selective_copying import SelectiveCopying
from train.tasks.source import TaskSource, sample_rows, task_batches
from train.tasks.stacks import Stacks
from train.tasks.task import Sample, Task

__all__ = [
    "MQAR",
    "Compression",
    "FuzzyRecall",
    "InContextRecall",
    "Memorisation",
    "Palindrome",
    "Parity",
    "PermutationGroup",
    "Rebinding",
    "Sample",
    "SelectiveCopying",
    "Stacks",
    "Task",
    "TaskSource",
    "sample_rows",
    "task_batches",
]
