"""Models with experts from the command line, and the ratio of their layers."""

import pytest

from tests.train.train_common import TINY, write_text
from train.__main__ import main
from train.config import ConfigError, ModelOptions, TrainConfig, model_config
from train.metrics import read_metrics


@pytest.mark.slow  # `mesh_curves` trains one too
def test_a_model_with_experts_learns_and_tells_of_them(tmp_path):
    text = write_text(tmp_path / "text.jsonl")
    args = [*TINY, "--preset", "tiny_kimi_linear", "--model.num-layers", "2", "--model.kda-per-mla", "1"]
    args += [
        "--data.files",
        str(text),
        "--steps",
        "10",
        "--log.gates-every",
        "5",
        "--optimizer.accumulate",
        "2",
    ]
    assert main([*args, "--run-dir", str(tmp_path / "run")]) == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert all(line["grad_norm/router"] > 0 and line["grad_norm/experts"] > 0 for line in lines)
    load = {name: lines[4][f"gates/1/expert_load_{name}"] for name in ("min", "max")}
    assert 0 <= load["min"] < 1 < load["max"] <= 4  # of 8 experts a token has 2
    assert "gates/0/expert_load_max" not in lines[4]  # the first layer has none


@pytest.mark.parametrize("ratio, mla", [(None, [4]), (0, [1, 2, 3, 4]), (1, [2, 4]), (2, [3, 4])])
def test_the_ratio_of_kda_to_latent_attention_is_an_option(ratio, mla):
    run = TrainConfig(preset="tiny_kimi_linear", model=ModelOptions(kda_per_mla=ratio))
    layers = model_config(run, 260).layers
    assert [i for i, kind in enumerate(layers, 1) if kind == "latent_attention"] == mla
    longer = TrainConfig(preset="tiny_kimi_linear", model=ModelOptions(kda_per_mla=1, num_layers=6))
    assert model_config(longer, 260).layers == ("kda", "latent_attention") * 3


def test_a_ratio_is_refused_where_there_is_none():
    run = TrainConfig(preset="tiny_hybrid", model=ModelOptions(kda_per_mla=1))
    with pytest.raises(
        ConfigError, match=r"--model.kda-per-mla 1: kda_per_mla=1: the preset's layers are full"
    ):
        model_config(run, 260)
