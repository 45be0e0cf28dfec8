"""`python -m train.experiments.plot RESULTS.json ... --out PLOT.png`: draws what the experiments measured.

A column for each task; above, accuracy against the length of the rows (of training; where only one was
trained on, of evaluation), below, against steps, at the longest length of training or `--steps-at`. Needs
matplotlib, and no accelerator.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from deltajax import command


def main(args: Sequence[str] | None = None) -> int:
    """Parses options, draws, and returns the exit status."""
    return command.with_packages(lambda: _main(args), "matplotlib", {"matplotlib", "tyro"})


def _main(args: Sequence[str] | None) -> int:
    import tyro

    @dataclass(frozen=True)
    class Options:
        """Draw the results of experiments."""

        results: Annotated[tuple[Path, ...], tyro.conf.Positional]
        """what the experiments saved; those of several runs are drawn together"""
        out: Path
        """a .png or .pdf"""
        late: bool = False
        """draw the accuracy of the last quarter of each row's answers instead of all"""
        steps_at: int | None = None
        """length of the rows of training whose accuracy is drawn by steps; none means the longest"""

    options = tyro.cli(Options, prog="python -m train.experiments.plot", args=args)
    draw(options.results, options.out, "late" if options.late else "answers", options.steps_at)
    return 0


def draw(paths: Sequence[Path], out: Path, kind: str = "answers", steps_at: int | None = None) -> None:
    """Draws results files into one figure.

    Args:
        paths: files of `results.save`.
        out: the picture.
        kind: which accuracy: "answers", "late" or "rows".
        steps_at: length of the rows of training whose accuracy is drawn by steps; None: the longest.

    Raises:
        ValueError: a task without results of that length.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from train.experiments.results import load

    loaded = [load(path) for path in paths]
    results = [x for _, found in loaded for x in found if x.history]
    tasks = list(dict.fromkeys(x.task for x in results))
    mixers = list(dict.fromkeys(x.mixer for x in results))
    figure, axes = pyplot.subplots(2, len(tasks), figsize=(4 * len(tasks), 6), sharey=True, squeeze=False)
    for column, task in enumerate(tasks):
        top, bottom = axes[:, column]
        trained = {x.length for x in results if x.task == task}
        at = max(trained) if steps_at is None else steps_at
        if at not in trained:
            raise ValueError(
                f"steps_at={at}: expected one of {sorted(trained)}, the lengths trained on {task}"
            )
        for i, mixer in enumerate(mixers):
            own = sorted((x for x in results if x.task == task and x.mixer == mixer), key=lambda x: x.length)
            style = dict(label=mixer, color=f"C{i}", marker="o", markersize=3)
            by_length: dict[int, float] = {}
            for x in own:  # runs may have tried other rates: the best counts
                reached = x.accuracy(x.best_rate(), kind=kind)
                by_length[x.length] = max(reached, by_length.get(x.length, reached))
            if len(own) == 1:
                by_length |= {int(n): own[0].at_length(int(n), kind) for n in own[0].lengths}
            lengths = sorted(by_length)
            top.plot(lengths, [100 * by_length[n] for n in lengths], **style)
            for x in own:
                if x.length == at:
                    rate = x.best_rate()
                    curve = [x.accuracy(rate, entry, kind) for entry in range(len(x.history))]
                    steps = [entry["step"] for entry in x.history]
                    bottom.plot([0, *steps], [0, *(100 * y for y in curve)], **style | {"marker": ""})
        top.set_title(task)
        top.set_xscale("log", base=2)
        top.set_xlabel("tokens a row")
        bottom.set_xlabel(f"steps ({at} tokens a row)")
    for row in axes:
        row[0].set_ylabel("right answers, %")
    axes[0, 0].set_ylim(-3, 103)
    axes[0, 0].legend(loc="lower left")  # lines end at the top
    devices = sorted({about["device"] for about, _ in loaded})
    dates = sorted({about["date"] for about, _ in loaded})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    figure.text(0.99, 0.005, f"{', '.join(devices)}, {when}", ha="right", fontsize=7)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
