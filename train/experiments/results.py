"""What an experiment found: as JSON, saved as it goes, and as a table."""

import dataclasses
import datetime
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from train.config_dict import to_dict


@dataclass
class Result:
    """One task, length and mixer, with all its lanes.

    Attributes:
        task, mixer, length: what was trained.
        lanes: each model's learning rate and seed.
        parameters: numbers a model learns.
        history: one entry an evaluation: step, seconds of training so far, and of each lane the last loss and
            the accuracies (`answers`, `late`, `rows`; see `learner.Scores`).
        lengths: length -> accuracies of each lane after the last step, of other lengths than the training's.
        stopped: "target", "steps" or "budget"; empty while it runs.
    """

    task: str
    mixer: str
    length: int
    lanes: list[dict[str, float]]
    parameters: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    lengths: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    stopped: str = ""

    def best_rate(self) -> float:
        """The learning rate whose models are the most accurate, over seeds, at the last evaluation."""
        return max(self.rates(), key=lambda rate: self.accuracy(rate))

    def rates(self) -> list[float]:
        """The learning rates, in order."""
        return rates(self.lanes)

    def accuracy(self, rate: float, entry: int = -1, kind: str = "answers") -> float:
        """Mean accuracy of a learning rate's models at an evaluation; 0 before the first."""
        if not self.history:
            return 0.0
        return float(np.mean(self._of(rate, self.history[entry][kind])))

    def solved(self, target: float) -> bool:
        """Whether all models of a learning rate have reached the target."""
        return bool(self.history) and any(
            min(self._of(rate, self.history[-1]["answers"])) >= target for rate in self.rates()
        )

    def at_length(self, length: int, kind: str = "answers") -> float:
        """Mean accuracy of the best rate's models on another length after the last step."""
        return float(np.mean(self._of(self.best_rate(), self.lengths[str(length)][kind])))

    def _of(self, rate: float, values: Sequence[float]) -> list[float]:
        return of_rate(self.lanes, rate, values)


def rates(lanes: Sequence[dict[str, float]]) -> list[float]:
    """Their learning rates, in order."""
    return list(dict.fromkeys(lane["learning_rate"] for lane in lanes))


def of_rate(lanes: Sequence[dict[str, float]], rate: float, values: Sequence[float]) -> list[float]:
    """The values of the lanes with that learning rate."""
    return [x for x, lane in zip(values, lanes, strict=True) if lane["learning_rate"] == rate]


def about(options: Any, command: str) -> dict[str, Any]:
    """What is recorded with results: options (a dataclass with `out`), what was typed, when, on what."""
    import jax  # here: plots do without

    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "options": to_dict(options) | {"out": str(options.out)},
    }


def save(path: Path, about: dict[str, Any], results: Sequence[Any]) -> None:
    """Writes all results (dataclasses) so far; a reader never finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {"about": about, "results": [_finite(dataclasses.asdict(x)) for x in results]}, allow_nan=False
    )
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n")
    os.replace(partial, path)


def load(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """What `save` wrote."""
    content = json.loads(path.read_text())
    return content["about"], [Result(**x) for x in content["results"]]


def table(results: Sequence[Result]) -> str:
    """Markdown: a row for each task and length, a column for each mixer: accuracy, steps, learning rate."""
    mixers = list(dict.fromkeys(x.mixer for x in results))
    by_place = {(x.task, x.length, x.mixer): x for x in results}
    lines = [
        "| task | length | " + " | ".join(mixers) + " |",
        "|---|---|" + "---|" * len(mixers),
    ]
    for task, length in dict.fromkeys((x.task, x.length) for x in results):
        found = [by_place.get((task, length, mixer)) for mixer in mixers]
        lines.append(f"| {task} | {length} | " + " | ".join(_cell(x) for x in found) + " |")
        others = dict.fromkeys(int(n) for x in found if x is not None for n in x.lengths)
        for other in others:
            cells = [
                f"{100 * x.at_length(other):.1f} (late {100 * x.at_length(other, 'late'):.1f})"
                if x is not None and str(other) in x.lengths
                else ""
                for x in found
            ]
            lines.append(f"| {task}, trained on {length} | {other} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(x: Result | None) -> str:
    if x is None or not x.history:
        return ""
    rate = x.best_rate()
    late = x.accuracy(rate, kind="late")
    step = x.history[-1]["step"]
    return f"{100 * x.accuracy(rate):.1f} (late {100 * late:.1f}) at {step:,}, rate {rate:g}"


def _finite(value: Any) -> Any:
    """Losses that are no numbers become None, which JSON has."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
