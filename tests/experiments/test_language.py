"""The language-model comparison: equal sizes, equal text, losses as the trainer's evaluation has them."""

import json

import jax
import numpy as np
import pytest

from deltajax.models import count_parameters
from train.config import DataConfig
from train.data import eval_batches
from train.evaluation import Evaluation
from train.experiments import language
from train.experiments.lanes import Lane
from train.experiments.language_models import model_configs
from train.experiments.language_options import FULL, LanguageOptions
from train.experiments.language_results import LanguageResult, table
from train.experiments.text_learner import TextLearner
from train.mesh import ShardingRules
from train.mixture import load_data

TINY = LanguageOptions(
    num_layers=2, hidden_size=16, num_heads=1, head_dim=16, intermediate_size=48, seq_len=32, batch_size=2
)


@pytest.mark.parametrize("options", [LanguageOptions(), FULL], ids=["small", "full"])
def test_all_variants_have_the_first_ones_size(options):
    configs = model_configs(options, 257)
    assert len(configs) == 7
    sizes = [count_parameters(x) for x in configs.values()]
    assert max(abs(size / sizes[0] - 1) for size in sizes) < 0.02
    assert configs["delta_net_global"].layers.count("full_attention") == 2
    assert configs["kda_mla"].layers.count("kda") == 3 * configs["kda_mla"].layers.count("latent_attention")


def test_it_trains_and_measures_what_the_trainer_measures():
    data = load_data(DataConfig())
    held_out = eval_batches(data.held_out, seq_len=32, batch_size=2, max_batches=3)
    stacked = {name: np.stack([x[name] for x in held_out]) for name in held_out[0]}
    (config,) = model_configs(LanguageOptions(**{**vars(TINY), "variants": ("delta_net",)}), 260).values()
    learner = TextLearner(config, TINY)
    learner.compile(2, stacked, stacked)
    state = learner.init([Lane(1e-2, 0), Lane(1e-2, 1)])
    first = learner.evaluate(state, stacked)
    for _ in range(10):
        state, _ = learner.advance(state, stacked)
    last = learner.evaluate(state, stacked)
    assert np.all(last < first - 0.3)  # the same text again and again
    sizes = dict(seq_len=32, batch_size=2, max_batches=3)
    evaluation = Evaluation(learner.model, ShardingRules(), data.held_out, **sizes)
    one = jax.tree.map(lambda x: x[1], state.params)
    assert evaluation.loss(one) == pytest.approx(float(last[1]), rel=1e-5)


@pytest.mark.slow  # a command with its own programs
def test_the_command_saves_losses_and_what_the_text_was(tmp_path):
    out = tmp_path / "language.json"
    args = (
        "--variants kda --steps 2 --eval-every 1 --seq-len 16 --batch-size 2 --eval-batches 2 --num-layers 1"
    )
    args += " --hidden-size 8 --num-heads 1 --head-dim 8 --intermediate-size 8 --seeds 0 1"
    assert language.main([*args.split(), "--out", str(out)]) == 0
    saved = json.loads(out.read_text())
    (result,) = saved["results"]
    assert [x["step"] for x in result["history"]] == [1, 2] and len(result["history"][1]["eval_loss"]) == 2
    text = saved["about"]["text"]
    assert text["fingerprint"] and 32 < text["trained_tokens"] <= 64 and text["bytes_per_token"] > 0.9
    assert "| kda |" in out.with_suffix(".md").read_text()


def test_the_table_shows_the_best_rate():
    lanes = [{"learning_rate": rate, "seed": seed} for rate in (0.1, 0.2) for seed in (0, 1)]
    last = {"step": 9, "seconds": 3.0, "loss": [0.0] * 4, "eval_loss": [2.0, float("nan"), 1.0, 1.5]}
    x = LanguageResult("kda", 1000, 8, lanes, [last])
    assert x.best() == (0.2, [1.0, 1.5])
    assert "| kda | 1,000 | 1.2500 +- 0.3536 | 1.0000, 1.5000 | 0.2 | 3 |" in table([x])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--eval-every", "7"], "argument --eval-every: 7 does not divide"),
        (["--seeds", "-1"], "argument --seeds"),
        (["--batch-size", "0"], "argument --batch-size: must be positive, got 0"),
        (
            ["--intermediate-size", "8", "--variants", "delta_net", "kda_mla"],
            "argument --intermediate-size: 8",
        ),
        (["--files", "nowhere/*.txt"], "nowhere"),
    ],
)
def test_wrong_options_are_named(args, message, capsys):
    assert language.main(args) == 2
    assert message in capsys.readouterr().err
