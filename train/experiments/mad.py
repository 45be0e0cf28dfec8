"""`python -m train.experiments.mad`: the six tasks of the MAD suite (arXiv 2403.17844).

The full setting has its sizes: vocabulary 16 (32 with noise, 256 for memorisation), width 128, two layers
with MLPs, rows of 128 tokens (selective copying 256, compression and memorisation 32). Rows are drawn anew
instead of from 12,800 fixed ones, and only the answers are trained.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.experiments import command


def settings() -> tuple[Any, Any]:
    """The small setting's options, and the full one's."""
    from train.experiments.options import SweepOptions

    tasks = (
        "in_context_recall",
        "noisy_recall",
        "fuzzy_recall",
        "selective_copying",
        "compression",
        "memorisation",
    )
    small = SweepOptions(
        tasks=tasks,
        mixers=("delta_net", "gated_delta_net", "kda"),
        lengths=(),
        out=Path("runs/mad.json"),
    )
    full = command.on_one_gpu(
        small,
        out=Path("runs/mad_full.json"),
        learning_rates=(1e-4, 5e-4, 1e-3, 3e-3),
        steps=20_000,
        num_heads=2,
        head_dim=64,
        intermediate_size=512,
        weight_decay=0.1,
        warmup_steps=200,
    )
    return small, full


def main(args: Sequence[str] | None = None) -> int:
    """Parses options, trains, and returns the exit status."""
    return command.sweep("train.experiments.mad", settings, args)


if __name__ == "__main__":
    sys.exit(main())
