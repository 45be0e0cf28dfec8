"""`python -m train.experiments.state_tracking`: parity and permutation groups, with strengths to 1 and to 2.

After arXiv 2411.12537: a delta-rule layer whose write strengths stay in [0, 1] cannot track parity; one whose
strengths reach 2 (negative eigenvalues) can, on rows longer than it was trained on too. A layer's step is one
reflection at most: a swap needs one, other permutations several.
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
        tasks=("parity", "s3"),
        mixers=("delta_net_neg", "delta_net"),
        lengths=(32,),
        eval_lengths=(64, 128),
        out=Path("runs/state_tracking.json"),
        steps=400,
        target=1.0,
        batch_tokens=1024,
    )
    full = command.on_one_gpu(
        small,
        tasks=("parity", "s3", "s5_swaps"),
        mixers=("delta_net_neg", "delta_net", "gated_delta_net_neg", "gated_delta_net", "kda_neg", "kda"),
        lengths=(64,),
        eval_lengths=(128, 256, 512),
        out=Path("runs/state_tracking_full.json"),
        learning_rates=(3e-4, 1e-3, 3e-3),
        seeds=(0, 1, 2),
        steps=10_000,
        head_dim=128,
        intermediate_size=768,
    )
    return small, full


def main(args: Sequence[str] | None = None) -> int:
    """Parses options, trains, and returns the exit status."""
    return command.sweep("train.experiments.state_tracking", settings, args)


if __name__ == "__main__":
    sys.exit(main())
