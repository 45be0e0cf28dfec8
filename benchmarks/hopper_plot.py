"""Plots times of `benchmarks.hopper --backward --json` beside those of the rivals and of plain JAX.

    python -m benchmarks.hopper_plot docs/data/h100_hopper.json \\
        --plain docs/data/h100_chunked_ops.json --out docs/h100_ops.png

A problem that stands in several files is taken from the last.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro

NAMES = {"delta": "DeltaNet", "gated": "Gated", "kda_safe": "KDA bounded", "kda_softplus": "KDA softplus"}
RIVALS = ("FLA (Triton)", "FLA (Triton)", "FlashKDA (CUTLASS)")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to draw."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    out: Path
    plain: Path | None = None
    """Times of the chunked form, from `benchmarks.op_times`."""


def read(files: tuple[Path, ...]) -> dict[str, dict]:
    """Rows by problem."""
    rows = [row for path in files for row in json.loads(path.read_text())]
    return {row["problem"]: row for row in rows}


def bars(rows: dict[str, dict], plain: dict[str, dict]) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds by half ("fwd", "fwd_bwd"), by what was timed, by problem."""
    found: dict[str, dict[str, dict[str, float]]] = {"fwd": {}, "fwd_bwd": {}}
    for problem, row in rows.items():
        forward, both, cutlass = row.get("rival") or (None, None, None)
        timed = {
            "fwd": {"deltajax": row.get("fwd"), RIVALS[0]: forward, RIVALS[2]: cutlass},
            "fwd_bwd": {"deltajax": row.get("fwd_bwd"), RIVALS[1]: both},
        }
        for half, times in timed.items():
            times["plain JAX (chunked)"] = plain.get(problem, {}).get(half)
            for name, ms in times.items():
                if ms is not None:
                    found[half].setdefault(name, {})[problem] = ms
    return found


def draw(options: Options) -> None:
    """Writes the PNG.

    Raises:
      ModuleNotFoundError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read(options.files)
    problems = sorted(rows, key=lambda p: (list(NAMES).index(p.split()[0]), list(rows).index(p)))
    times = bars(rows, read((options.plain,)) if options.plain else {})
    figure, axes = pyplot.subplots(1, 2, figsize=(14, 6), sharey=True)
    for ax, (half, title) in zip(axes, (("fwd", "forward"), ("fwd_bwd", "forward + backward")), strict=True):
        series = times[half]
        height = 0.8 / len(series)
        for i, (name, ms) in enumerate(series.items()):
            at = [problems.index(p) + (i - (len(series) - 1) / 2) * height for p in ms]
            drawn = ax.barh(at, list(ms.values()), height, label=name)
            ax.bar_label(drawn, fmt="%.2f", fontsize=6, padding=2)
        ax.set(title=title, xlabel="ms, log scale", xscale="log", xlim=(0.1, 200))
        ax.legend(fontsize=8, loc="upper right")
    labels = [" ".join([NAMES[p.split()[0]], *p.split()[1:]]) for p in problems]
    axes[0].set_yticks(range(len(problems)), labels)
    axes[0].invert_yaxis()
    figure.suptitle(f"{', '.join({row['card'] for row in rows.values()})}; bf16, K = V = 128, B x T x H(HV)")
    figure.tight_layout()
    figure.savefig(options.out, dpi=120)
    print(options.out)


if __name__ == "__main__":
    draw(tyro.cli(Options, description=__doc__))
