"""Options that the experiments on synthetic tasks share, and what their names stand for."""

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

from train.config import ConfigError
from train.tasks import (
    MQAR,
    Compression,
    FuzzyRecall,
    InContextRecall,
    Memorisation,
    Palindrome,
    Parity,
    PermutationGroup,
    Rebinding,
    SelectiveCopying,
    Stacks,
    Task,
)

Setting = Literal["small", "full"]


class Sizes(NamedTuple):
    """A task in one setting, and the length of its rows where the options name none."""

    task: Task
    length: int


class Mixer(NamedTuple):
    """A kind of layer, whether its write strengths reach 2 (negative eigenvalues), and its decay's bound."""

    kind: str
    negative: bool = False
    lower_bound: float | None = None


# Name -> the task in the small setting, for a CPU, and in the full one.
TASKS: Mapping[str, tuple[Sizes, Sizes]] = {
    "mqar": (Sizes(MQAR(vocabulary=64), 32), Sizes(MQAR(), 512)),
    "palindrome": (Sizes(Palindrome(symbols=15), 16), Sizes(Palindrome(), 256)),
    "stacks": (Sizes(Stacks(stacks=4, symbols=8), 48), Sizes(Stacks(), 256)),
    "rebinding": (Sizes(Rebinding(4, 8), 48), Sizes(Rebinding(), 256)),
    "parity": (Sizes(Parity(), 32), Sizes(Parity(), 64)),
    "s3": (Sizes(PermutationGroup(3), 16), Sizes(PermutationGroup(3), 64)),
    "s5": (Sizes(PermutationGroup(5), 16), Sizes(PermutationGroup(5), 64)),
    "s5_swaps": (Sizes(PermutationGroup(5, "swaps"), 16), Sizes(PermutationGroup(5, "swaps"), 64)),
    "in_context_recall": (Sizes(InContextRecall(), 32), Sizes(InContextRecall(), 128)),
    "noisy_recall": (Sizes(InContextRecall(16, 16, 0.2), 32), Sizes(InContextRecall(16, 16, 0.2), 128)),
    "fuzzy_recall": (Sizes(FuzzyRecall(9, 2), 32), Sizes(FuzzyRecall(), 128)),
    "selective_copying": (Sizes(SelectiveCopying(copied=4), 32), Sizes(SelectiveCopying(), 256)),
    "compression": (Sizes(Compression(), 8), Sizes(Compression(), 32)),
    "memorisation": (Sizes(Memorisation(symbols=64), 16), Sizes(Memorisation(), 32)),
}
# Name -> what the layer is made of.
MIXERS: Mapping[str, Mixer] = {
    "delta_net": Mixer("delta_net"),
    "gated_delta_net": Mixer("gated_delta_net"),
    "kda": Mixer("kda"),
    "kda_bounded": Mixer("kda", lower_bound=-5.0),
    "delta_net_neg": Mixer("delta_net", negative=True),
    "gated_delta_net_neg": Mixer("gated_delta_net", negative=True),
    "kda_neg": Mixer("kda", negative=True),
    "attention": Mixer("full_attention"),
}

# The choices come from tables, which a static type cannot name.
if typing.TYPE_CHECKING:
    TaskName = str
    MixerName = str
else:
    TaskName = tyro.extras.literal_type_from_choices(list(TASKS))
    MixerName = tyro.extras.literal_type_from_choices(list(MIXERS))


@dataclass(frozen=True)
class SweepOptions:
    """Train small models on synthetic tasks and measure how many answers are right."""

    tasks: tuple[TaskName, ...]
    """what is learned"""
    mixers: tuple[MixerName, ...]
    """the layers compared; those in _neg write with strengths in [0, 2]; kda_bounded's log
    decay is kept within [-5, 0] by a sigmoid"""
    lengths: tuple[int, ...]
    """tokens of a training row, each with models of its own; none means each task's own length"""
    out: Path
    """results, as JSON; a table goes beside them, and python -m train.experiments.plot draws them"""
    setting: tyro.conf.Suppress[Setting] = "small"
    eval_lengths: tuple[int, ...] = ()
    """lengths of held-out rows measured at the end besides the training length (length generalisation)"""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """each has models of its own, trained side by side; the best counts"""
    seeds: tuple[int, ...] = (0,)
    """of the parameters; each has models of its own"""
    steps: int = 600
    """optimizer steps at most"""
    eval_every: int = 100
    """steps between evaluations, which are also taken in one call of the device"""
    eval_rows: int = 256
    """rows of an evaluation"""
    target: float = 0.999
    """accuracy at which models stop early, once a learning rate's models all have it"""
    batch_tokens: int = 2048
    """tokens of a step of each model: the rows are this over the length"""
    num_layers: int = 2
    """blocks"""
    num_heads: int = 2
    """heads"""
    head_dim: int = 32
    """size of keys and values; heads times this is the width"""
    intermediate_size: int = 128
    """width of the MLPs"""
    tie_embeddings: bool = False
    """the output layer is the table of embeddings: what is copied need not be learned token by token"""
    weight_decay: float = 0.0
    """of matrices"""
    warmup_steps: int = 50
    """of the learning rate, which then falls as a cosine to a tenth"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """compute dtype"""
    implementation: Literal["pallas", "chunked", "scan"] | None = None
    """backend of the delta-rule ops"""
    lanes: Literal["together", "in_turn"] = "together"
    """learning rates and seeds side by side, or one after another in less memory"""
    data_seed: int = 0
    """of the rows"""
    budget_seconds: float | None = None
    """ends after about so many seconds: each task and length gets an equal share of what is left, and its
    mixers take turns, so that they are compared after equal steps"""
    compile_ahead: int = 1
    """programs compiled at a time in the background"""

    def check(self) -> None:
        """Raises ConfigError, naming the argument, for values that cannot work."""
        for name in ("tasks", "mixers", "learning_rates", "seeds"):
            if not getattr(self, name):
                raise ConfigError(f"argument --{_dashed(name)}: expected at least one")
        positive = (
            "steps",
            "eval_every",
            "eval_rows",
            "batch_tokens",
            "num_layers",
            "num_heads",
            "head_dim",
            "intermediate_size",
            "compile_ahead",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise ConfigError(f"argument --{_dashed(name)}: must be positive, got {getattr(self, name)}")
        check_lanes(self)
        if not 0 < self.target <= 1:
            raise ConfigError(f"argument --target: must be above 0 and at most 1, got {self.target}")
        if self.budget_seconds is not None and not self.budget_seconds > 0:
            raise ConfigError(f"argument --budget-seconds: must be positive, got {self.budget_seconds}")
        for name in self.tasks:
            for length in (*self.lengths_of(name), *self.eval_lengths):
                try:
                    self.task(name).check(length)
                except ValueError as error:
                    raise ConfigError(f"arguments --tasks {name} --lengths {length}: {error}") from error

    def task(self, name: str) -> Task:
        """The task of that name in this setting."""
        return self._sizes(name).task

    def lengths_of(self, name: str) -> tuple[int, ...]:
        """The lengths of training rows of that task."""
        return self.lengths or (self._sizes(name).length,)

    def _sizes(self, name: str) -> Sizes:
        return TASKS[name][self.setting == "full"]


def check_lanes(options: Any) -> None:
    """Raises ConfigError for learning rates, seeds or numbers of steps that no models can be trained by."""
    if min(options.learning_rates) <= 0:
        raise ConfigError(f"argument --learning-rates: must be positive, got {min(options.learning_rates)}")
    if min(options.seeds) < 0 or max(options.seeds) >= 2**32:
        raise ConfigError(f"argument --seeds: must be from 0 to 2**32 - 1, got {options.seeds}")
    if options.steps % options.eval_every:
        raise ConfigError(
            f"argument --eval-every: {options.eval_every} does not divide --steps {options.steps}"
        )


def parse[T](small: T, full: T, prog: str, args: Sequence[str]) -> T:
    """Options from the command line, after "small" (which may be left out) or "full"."""
    args = list(args)
    if not args or (args[0] not in ("small", "full") and args[0] not in ("-h", "--help")):
        args = ["small", *args]
    return tyro.extras.overridable_config_cli(
        {"small": ("for a CPU", small), "full": ("for one GPU", full)}, prog=prog, args=args
    )


def _dashed(name: str) -> str:
    return name.replace("_", "-")
