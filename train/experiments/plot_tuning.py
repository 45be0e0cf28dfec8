"""`python -m train.experiments.plot_tuning RESULTS.json ... --out PLOT.png`: draws experiments that
are no tasks.

Which one is read off the results: delta_logistic, delta_language, hard_batches or language. Needs matplotlib.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from deltajax import command


def main(args: Sequence[str] | None = None) -> int:
    """Parses options, draws, and returns the exit status."""
    return command.with_packages(lambda: _main(args), "matplotlib", {"matplotlib", "tyro"})


def _main(args: Sequence[str] | None) -> int:
    import tyro

    @dataclass(frozen=True)
    class Options:
        """Draw the results of an experiment."""

        results: Annotated[tuple[Path, ...], tyro.conf.Positional]
        """what the experiment saved; of language, variants that only later files have are added"""
        out: Path
        """a .png or .pdf"""

    options = tyro.cli(Options, prog="python -m train.experiments.plot_tuning", args=args)
    draw(joined([json.loads(path.read_text()) for path in options.results]), options.out)
    return 0


def joined(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first run with the variants that only the others have, which must be of the same text.

    Raises:
        ValueError: several runs of another experiment, or of other texts.
    """
    first, *others = runs
    found = list(first.get("results", []))
    for other in others:
        if not found or "results" not in other or other["about"]["text"] != first["about"]["text"]:
            raise ValueError("results: expected one run, or several of language on the same text")
        found += [x for x in other["results"] if x["variant"] not in {y["variant"] for y in found}]
    return first | {"results": found} if found else first


def draw(results: dict[str, Any], out: Path) -> None:
    """Draws an experiment's results into a file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    hard, language = "mini_batches" in results, "scores" in results
    two = hard or language
    figure, axes = pyplot.subplots(1, 2 if two else 1, figsize=(9 if two else 6, 4), squeeze=False)
    if "results" in results:
        _variants(results, axes[0, 0])
    elif hard:
        _hard(results, axes[0])
    elif language:
        _language(results, axes[0])
    else:
        _logistic(results, axes[0, 0])
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def _variants(results: dict[str, Any], axes: Any) -> None:
    """Held-out loss by steps: the mean of each variant's best rate, and its seeds' range."""
    per_byte = results["about"]["text"]["bytes_per_token"]
    for found in results["results"]:
        rates = [lane["learning_rate"] for lane in found["lanes"]]
        losses = [[x / per_byte for x in entry["eval_loss"]] for entry in found["history"]]

        def of(rate: float, row: list[float], rates: list[float] = rates) -> list[float]:
            return [x for x, own in zip(row, rates, strict=True) if own == rate]

        best = min(set(rates), key=lambda rate: sum(of(rate, losses[-1])) / len(of(rate, losses[-1])))
        rows = [of(best, row) for row in losses]
        steps = [entry["step"] for entry in found["history"]]
        (line,) = axes.plot(steps, [sum(row) / len(row) for row in rows], label=found["variant"])
        axes.fill_between(
            steps, list(map(min, rows)), list(map(max, rows)), color=line.get_color(), alpha=0.2
        )
    axes.set_xlabel("steps")
    axes.set_ylabel("held-out loss, nats per byte")
    axes.legend()


def _logistic(results: dict[str, Any], axes: Any) -> None:
    rows = sorted(results["rows"], key=lambda row: row["gap"])
    gaps = [100 * row["gap"] for row in rows]
    for name in ("gain", "predicted"):
        style = {"gain": dict(marker="o", label="measured"), "predicted": dict(ls="--", label="predicted")}[
            name
        ]
        axes.plot(gaps, [100 * row[name] for row in rows], **style)
    low, high = ([100 * (row["gain"] + sign * row["band"]) for row in rows] for sign in (-1, 1))
    axes.fill_between(gaps, low, high, alpha=0.3)
    axes.axhline(0, color="gray", lw=0.8)
    axes.set_xlabel("better minus worse teacher's accuracy, points")
    axes.set_ylabel("the student's gain by DPO, points")
    axes.legend()


def _language(results: dict[str, Any], axes: Any) -> None:
    from train.experiments.statistics import mean_and_band

    found = results["scores"]
    for ax, kind in zip(axes, ("easy", "hard"), strict=True):
        for name, of in found.items():
            mean, band = mean_and_band([100 * x for x in of[kind]])
            color = "gray" if name.startswith(("chosen", "rejected")) else "C0"
            ax.bar(name, mean, yerr=band, capsize=3, color=color)
            optimum = of.get(f"predicted_{kind}")
            if optimum is not None:
                ax.plot(name, 100 * sum(optimum) / len(optimum), "k_", markersize=14)
            if name == "student":
                ax.axhline(mean, color="gray", ls="--", lw=0.8)
        ax.set_ylim(0, 100)
        ax.set_title(f"after {kind} symbols; a line: DPO's optimum")
        ax.tick_params(axis="x", rotation=75)
    axes[0].set_ylabel("right elements of sampled answers, %")


def _hard(results: dict[str, Any], axes: Any) -> None:
    rows = results["rows"]
    plain = rows[0]
    for ax, name, label in zip(axes, ("fewer_epochs", "less_work"), ("epochs", "work"), strict=True):
        for mode in dict.fromkeys(row["mode"] for row in rows[1:]):
            for hard in (True, False):
                own = [row for row in rows[1:] if row["mode"] == mode and row["hard"] == hard]
                ax.errorbar(
                    [row["delta"] for row in own],
                    [100 * row[name] for row in own],
                    [100 * row[f"{name}_band"] for row in own],
                    label=f"{mode}, {'hardest' if hard else 'random'}",
                    capsize=3,
                    ls="-" if hard else ":",
                )
        ax.axhline(0, color="gray", lw=0.8)
        ax.set_ylim(-150, 60)
        ax.set_xlabel("delta")
        ax.set_ylabel(f"{label} saved to {results['options']['target']:.0%}, %")
    axes[0].set_title(f"plain: {plain['epochs']:.1f} epochs")
    axes[1].legend()


if __name__ == "__main__":
    sys.exit(main())
