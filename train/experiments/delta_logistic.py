"""`python -m train.experiments.delta_logistic`: delta learning (arXiv 2507.06187) in logistic regression.

Inputs are standard normal in d dimensions, labels the sign of their product with a direction. Student and
teachers are directions too, at given cosines to the true one and otherwise at random; their accuracy is
1 - arccos(cosine) / pi. Both teachers, weaker than the student, label inputs. Where they differ, the better
one's label is chosen: a logistic model's log-probabilities of the two differ by label x product, and DPO is

    -log sigmoid(beta chosen <theta - theta_0, x>)

and for little steps moves the student by a multiple of delta = better - worse (unit vectors). Errors that are
independent of each other are nearly orthogonal in high dimension, so delta helps by the teachers' gap,

    cosine(eta) = (c + eta (b - w)) / sqrt(1 + 2 eta c (b - w) + eta^2 (2 - 2 b w))

with c, b, w the cosines of student, better and worse teacher: above c for small eta wherever b > w. The
measured gain is compared with it at eta = |displacement| / |delta|.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.__main__ import with_packages
from train.experiments.command import simulate

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Options:
    """Tune a direction on the labels of two weaker ones."""

    out: Path = Path("runs/delta_logistic.json")
    """results, as JSON"""
    dimension: int = 200
    """d"""
    student: float = 0.8
    """the student's cosine to the truth"""
    better: float = 0.6
    """the better teacher's"""
    worse: tuple[float, ...] = (-0.3, 0.0, 0.2, 0.4, 0.5, 0.55, 0.6, 0.7, 0.75)
    """the other teacher's, each an experiment; above the better one's, pairs are the wrong way round"""
    samples: int = 8000
    """inputs that are labelled"""
    batch: int = 100
    """inputs of a step; each is used once"""
    rate: float = 0.006
    """learning rate"""
    beta: float = 1.0
    """of DPO"""
    sft_epochs: int = 3
    """passes of fine-tuning until the better teacher's labels are learned, at 100 times the rate"""
    seeds: int = 40
    """repetitions, for the confidence bands"""


def main(args: Sequence[str] | None = None) -> int:
    """Parses options, simulates, writes the results, and returns the exit status."""
    return with_packages(lambda: simulate("train.experiments.delta_logistic", Options, run, args))


def run(options: Options, say: Callable[[str], object]) -> dict[str, Any]:
    """All repetitions: the student's accuracy before and after, for every worse teacher."""
    import numpy as np

    from train.experiments.statistics import mean_and_band

    found = [_repetition(options, np.random.default_rng(seed)) for seed in range(options.seeds)]
    rows = []
    for i, worse in enumerate(options.worse):
        mean, band = mean_and_band([f["gains"][i] for f in found])
        rows.append(
            {
                "worse": worse,
                "gap": accuracy(options.better) - accuracy(worse),
                "gain": mean,
                "band": band,
                "predicted": float(np.mean([f["predicted"][i] for f in found])),
            }
        )
        say(
            f"gap {rows[-1]['gap']:+.3f}: gain {mean:+.4f} +- {band:.4f}, predicted "
            f"{rows[-1]['predicted']:+.4f}"
        )
    tuned = {}
    for name, what in (("sft", "until learned"), ("sft_little", "one pass at DPO's rate")):
        mean, band = mean_and_band([f[name] for f in found])
        tuned[name] = {"gain": mean, "band": band}
        say(f"fine-tuning on the better teacher's labels, {what}: {mean:+.4f} +- {band:.4f}")
    return {
        "options": dataclasses.asdict(options),
        "student_accuracy": accuracy(options.student),
        "better_accuracy": accuracy(options.better),
        "rows": rows,
        **tuned,
    }


def accuracy(cosine: float) -> float:
    """Of a direction at this cosine to the true one."""
    import math

    return 1 - math.acos(max(-1.0, min(1.0, cosine))) / math.pi


def _repetition(options: Options, rng: "np.random.Generator") -> dict[str, Any]:
    import numpy as np

    truth = _unit(rng.normal(size=options.dimension))

    def direction(cosine: float) -> np.ndarray:
        other = rng.normal(size=options.dimension)
        other = _unit(other - truth * (truth @ other))
        return cosine * truth + (1 - cosine**2) ** 0.5 * other

    student, better = direction(options.student), direction(options.better)
    inputs = rng.normal(size=(options.samples, options.dimension))
    chosen = np.sign(inputs @ better)
    before = accuracy(options.student)
    gains, predicted = [], []
    for cosine in options.worse:
        worse = direction(cosine)
        tuned = preference_tuned(student, inputs, chosen, np.sign(inputs @ worse), options)
        gains.append(accuracy(float(_unit(tuned) @ truth)) - before)
        eta = float(np.linalg.norm(tuned - student) / np.linalg.norm(better - worse))
        c, b, w = options.student, options.better, cosine
        moved = (c + eta * (b - w)) / (1 + 2 * eta * c * (b - w) + eta**2 * (2 - 2 * b * w)) ** 0.5
        predicted.append(accuracy(moved) - before)
    little, whole = (
        accuracy(float(_unit(fine_tuned(student, inputs, chosen, options.batch, *how)) @ truth)) - before
        for how in ((options.rate, 1), (100 * options.rate, options.sft_epochs))
    )
    return {"gains": gains, "predicted": predicted, "sft": whole, "sft_little": little}


def preference_tuned(
    student: "np.ndarray",
    inputs: "np.ndarray",
    chosen: "np.ndarray",
    rejected: "np.ndarray",
    options: Options,
) -> "np.ndarray":
    """DPO by one pass of SGD: student [d], inputs [n, d], labels of +-1 [n] -> [d]."""
    import numpy as np

    theta = student.copy()
    sign = (chosen - rejected) / 2  # 0 where the teachers agree: nothing is learned there
    for start in range(0, len(inputs), options.batch):
        x, s = inputs[start : start + options.batch], sign[start : start + options.batch]
        margin = options.beta * s * (x @ (theta - student))
        theta = theta + options.rate * options.beta * ((s / (1 + np.exp(margin))) @ x) / len(x)
    return theta


def fine_tuned(
    student: "np.ndarray", inputs: "np.ndarray", labels: "np.ndarray", batch: int, rate: float, epochs: int
) -> "np.ndarray":
    """Logistic regression on labels of +-1 [n] by SGD, from the student."""
    import numpy as np

    theta = student.copy()
    for start in list(range(0, len(inputs), batch)) * epochs:
        x, y = inputs[start : start + batch], labels[start : start + batch]
        theta = theta + rate * ((y / (1 + np.exp(y * (x @ theta)))) @ x) / len(x)
    return theta


def _unit(x: "np.ndarray") -> "np.ndarray":
    return x / (x @ x) ** 0.5


if __name__ == "__main__":
    sys.exit(main())
