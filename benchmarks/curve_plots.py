"""Plots of what `benchmarks.decode_curves` measured."""

import json
from pathlib import Path
from typing import Any

NAMES = {"hybrid": "KDA:MLA 3:1", "mla": "MLA only", "kda": "KDA only"}
COLORS = {"hybrid": "tab:blue", "mla": "tab:orange", "kda": "tab:green"}


def draw(path: Path) -> Path:
    """Draws a file of results beside it, as PNG.

    Raises:
      ValueError: on a file that holds something else.
      ModuleNotFoundError: without matplotlib.
    """
    result = json.loads(path.read_text())
    kinds = {"decode": _decode, "prefill": _prefill}
    measured = result.get("measured") if isinstance(result, dict) else None
    if measured not in kinds:
        raise ValueError(f"--plot {path}: expected a file of --json, got one with measured={measured!r}")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = kinds[measured](pyplot, result)
    figure.suptitle(f"{result['card']}, jax {result['jax']}, {result['date']}", fontsize=9)
    figure.tight_layout()
    to = path.with_suffix(".png")
    figure.savefig(to, dpi=120)
    pyplot.close(figure)
    return to


def _decode(pyplot, result: dict) -> Any:
    figure, (size, one, largest) = pyplot.subplots(1, 3, figsize=(14, 4.2))
    rows = [row for row in result["rows"] if "error" not in row]
    for form in dict.fromkeys(row["form"] for row in result["rows"]):
        style = dict(marker="o", color=COLORS[form], label=NAMES[form])

        def curve(axes, kind: str, value, rows, form=form, style=style) -> None:
            points = [(r["context"], value(r)) for r in rows if (r["form"], r["kind"]) == (form, kind)]
            axes.plot(*zip(*points, strict=True), **style) if points else None

        curve(size, "one", lambda r: r["cache_bytes"]["total"] / 2**20, result["rows"])
        curve(one, "one", lambda r: r["step_ms"], rows)
        curve(largest, "largest", lambda r: r["step_ms"] / r["batch"], rows)
        for r in rows:
            if (r["form"], r["kind"]) == (form, "largest"):
                at = (r["context"], r["step_ms"] / r["batch"])
                largest.annotate(f"B {r['batch']}", at, fontsize=7, xytext=(2, 5), textcoords="offset points")
    size.set(title="Cache of a sequence", ylabel="MiB", yscale="log")
    one.set(title="Time per token, batch 1", ylabel="ms", ylim=(0, None))
    largest.set(title="Time per token, largest batch B that fits", ylabel="ms / B", yscale="log")
    _tokens(size, one, largest)
    return figure


def _prefill(pyplot, result: dict) -> Any:
    figure, (whole, rate) = pyplot.subplots(1, 2, figsize=(10, 4.2))
    for run in result["runs"]:
        ends = run["chunk_ends_s"]
        tokens = [run["chunk"] * n for n in range(1, len(ends) + 1)]
        color = COLORS[run["form"]]
        whole.plot(tokens, ends, color=color, label=NAMES[run["form"]])
        line = [run["line_s_per_token"] * n for n in tokens]
        whole.plot(tokens, line, color=color, linestyle=":", label=f"line, off by {run['line_error']:.1%}")
        each = [end - start for start, end in zip([0.0, *ends], ends, strict=False)]
        rate.plot(tokens, each, color=color, label=NAMES[run["form"]])
    whole.set(title="Time to read the first n tokens", ylabel="s", xlabel="tokens", ylim=(0, None))
    rate.set(title="Time of a chunk", ylabel="s", xlabel="tokens read", ylim=(0, None))
    for axes in (whole, rate):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def _tokens(*all_axes) -> None:
    for axes in all_axes:
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens of context")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
