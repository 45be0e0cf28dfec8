"""What the plots of experiments read."""

import json
from pathlib import Path

import pytest

from train.experiments import plot, plot_tuning

DATA = Path(__file__).parents[2] / "docs" / "data"


def test_losses_of_language_models_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [
        json.loads((DATA / f"{name}.json").read_text()) for name in ("h100_language", "h100_language_kda_mla")
    ]
    both = plot_tuning.joined(runs)
    names = [x["variant"] for x in both["results"]]
    assert len(set(names)) == len(names) == 7
    plot_tuning.draw(both, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_steps_are_drawn_at_a_length_that_was_trained(tmp_path):
    pytest.importorskip("matplotlib")
    files = [DATA / "h100_mqar_512.json", DATA / "h100_mqar_lengths.json"]
    with pytest.raises(ValueError, match=r"steps_at=128: expected one of \[256, 512, 1024, 2048\]"):
        plot.draw(files, tmp_path / "plot.png", steps_at=128)
    plot.draw(files, tmp_path / "plot.png", steps_at=512)
    assert (tmp_path / "plot.png").stat().st_size > 1000
