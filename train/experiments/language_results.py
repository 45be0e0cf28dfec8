"""What the language-model comparison found."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from train.experiments.results import of_rate, rates


@dataclass
class LanguageResult:
    """One variant with all its lanes.

    Attributes:
        variant: its name.
        parameters: numbers a model learns.
        intermediate_size: width of its MLPs.
        lanes: each model's learning rate and seed.
        history: one entry an evaluation: step, seconds of training so far, and of each lane `loss` (training,
            the last step's) and `eval_loss`, nats a token.
    """

    variant: str
    parameters: int
    intermediate_size: int
    lanes: list[dict[str, float]]
    history: list[dict[str, Any]] = field(default_factory=list)

    def best(self) -> tuple[float, list[float]]:
        """The learning rate with the lowest mean loss at the last evaluation, and its seeds' losses."""
        last = self.history[-1]["eval_loss"]
        by_rate = {rate: of_rate(self.lanes, rate, last) for rate in rates(self.lanes)}
        rate = min(by_rate, key=lambda r: np.nan_to_num(np.mean(by_rate[r]), nan=np.inf))
        return rate, by_rate[rate]


def table(found: Sequence[LanguageResult]) -> str:
    """Markdown: held-out loss, mean and deviation over seeds, of each variant's best learning rate."""
    lines = [
        "| model | parameters | held-out nats a token | of seeds | rate | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for x in found:
        rate, losses = x.best()
        spread = f" +- {np.std(losses, ddof=1):.4f}" if len(losses) > 1 else ""
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        seconds = f"{x.history[-1]['seconds']:.0f}"
        lines.append(
            f"| {x.variant} | {x.parameters:,} | {np.mean(losses):.4f}{spread} | {each} "
            f"| {rate:g} | {seconds} |"
        )
    return "\n".join(lines) + "\n"
