"""`python -m train.experiments.recall`: Kimi Linear's comparison on palindromes, MQAR and stacks.

As in its paper (arXiv 2510.26692): two layers of two heads of 128, rows of 256 to 2048 tokens, up to 20,000
steps, the best of several learning rates: accuracy against length, and against steps. The output layer is the
table of embeddings, as in Zoology's models: else every token of 8192 has to be learned twice. MQAR at 512
tokens, 64 pairs, is the DeltaNet paper's (arXiv 2406.06484) hardest.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.experiments import command


def settings() -> tuple[Any, Any]:
    """The small setting's options, and the full one's."""
    from train.experiments.options import SweepOptions

    small = SweepOptions(
        tasks=("mqar", "palindrome", "stacks"),
        mixers=("kda", "gated_delta_net", "delta_net"),
        lengths=(32,),
        out=Path("runs/recall.json"),
    )
    full = command.on_one_gpu(
        small,
        lengths=(256, 512, 1024, 2048),
        out=Path("runs/recall_full.json"),
        learning_rates=(1e-4, 5e-4, 1e-3, 3e-3),
        steps=20_000,
        num_heads=2,
        head_dim=128,
        intermediate_size=768,
        tie_embeddings=True,
        weight_decay=0.1,
        warmup_steps=200,
    )
    return small, full


def main(args: Sequence[str] | None = None) -> int:
    """Parses options, trains, and returns the exit status."""
    return command.sweep("train.experiments.recall", settings, args)


if __name__ == "__main__":
    sys.exit(main())
