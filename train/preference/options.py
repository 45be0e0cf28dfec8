"""Every option of `python -m train.preference`."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from train.command import arguments
from train.config import (
    CheckpointConfig,
    ConfigError,
    EvalConfig,
    LogConfig,
    MeshConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
)


@dataclass(frozen=True)
class PairsConfig:
    """Pairs of answers, and batches of them."""

    files: tuple[str, ...]
    """.jsonl files and globs; a record has text in prompt, chosen and rejected"""
    on_error: Literal["raise", "skip"] = "raise"
    """bad records: stop at the first, or count them, pass over them and report"""
    seq_len: int | None = None
    """tokens per row; the tuned run's by default"""
    batch_size: int | None = None
    """rows per step, over all devices; the tuned run's by default"""
    held_out_fraction: float = 0.05
    """share of the pairs kept for evaluation"""
    prefetch: int = 2
    """batches prepared ahead in a background thread; 0 for none"""
    hard_window: int = 0
    """batches measured (without updates) at a time, to train on the hardest of them; 0 for all batches"""
    hard_fraction: float = 0.5
    """share of a window's batches that is trained on, those of the highest loss"""


@dataclass(frozen=True)
class PreferenceOptions:
    """Tune a trained model on pairs of a better and a worse answer; run again to resume."""

    base: Annotated[Path, tyro.conf.Positional]
    """the run to tune, as given to python -m train --run-dir"""
    run_dir: str
    """where checkpoints, metrics and the configuration go"""
    data: PairsConfig
    step: int | None = None
    """the tuned run's checkpoint; the newest by default"""
    method: Literal["dpo", "sft"] = "dpo"
    """dpo: chosen against rejected answers; sft: fine-tuning on the chosen answers alone"""
    beta: float = 0.1
    """dpo: how firmly the tuned run's model holds the new one"""
    length_normalized: bool = False
    """dpo: log-probabilities averaged over an answer's tokens instead of summed; takes a larger beta"""
    steps: int = 300
    """optimizer steps in all, those before a resume included"""
    seed: int = 0
    """seed of the data order and the samples"""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-4, weight_decay=0.0)
    )
    eval: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=lambda: SampleConfig(tokens=0))
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def check(self) -> None:
        """Raises ConfigError, naming the argument, for values that `run_config`'s check does not see."""
        if not 0 < self.beta < math.inf:
            raise ConfigError(f"argument --beta: must be positive and finite, got {self.beta}")
        if not 0 < self.data.held_out_fraction < 1:
            raise ConfigError(
                f"argument --data.held-out-fraction: must be between 0 and 1, "
                f"got {self.data.held_out_fraction}"
            )

    def run_config(self, base: TrainConfig) -> TrainConfig:
        """The tuned run's options with those given here in their place."""
        data = replace(
            base.data,
            prefetch=self.data.prefetch,
            hard_window=self.data.hard_window,
            hard_fraction=self.data.hard_fraction,
            seq_len=base.data.seq_len if self.data.seq_len is None else self.data.seq_len,
            batch_size=base.data.batch_size if self.data.batch_size is None else self.data.batch_size,
        )
        own: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "steps",
                "seed",
                "run_dir",
                "optimizer",
                "eval",
                "sample",
                "checkpoint",
                "mesh",
                "log",
            )
        }
        return replace(base, data=data, **own)

    def saved(self) -> dict[str, Any]:
        """What decides the result beside `run_config`, JSON-ready."""
        own = {"method": self.method, "held_out_fraction": self.data.held_out_fraction}
        if self.method == "dpo":
            own |= {"beta": self.beta, "length_normalized": self.length_normalized}
        return own

    def command(self) -> str:
        """The command with every option that is not its default, quoted for a shell."""
        usual = PreferenceOptions(self.base, self.run_dir, PairsConfig(self.data.files))
        given = [str(self.base), "--run-dir", self.run_dir, "--data.files", *self.data.files]
        return arguments("train.preference", given, self, usual)


def parse(args: list[str] | None = None) -> PreferenceOptions:
    """Options from the command line; prints usage and exits with status 2 if they are wrong."""
    return tyro.cli(PreferenceOptions, prog="python -m train.preference", args=args)
