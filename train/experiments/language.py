"""`python -m train.experiments.language`: the same text through models of equal size and other layers.

DeltaNet, Gated DeltaNet, KDA, a softmax transformer, DeltaNet with sliding-window layers, DeltaNet with two
global layers, and KDA with latent attention 3:1. Each sees the same batches, has the same number of
parameters within 2 percent (by the width of its MLPs), and is measured on the same held-out text, over
several seeds.
"""

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from train.experiments import command

if TYPE_CHECKING:
    from train.experiments.language_options import LanguageOptions
    from train.experiments.language_results import LanguageResult


def settings() -> "tuple[LanguageOptions, LanguageOptions]":
    """The small setting's options, and the full one's."""
    from train.experiments.language_options import FULL, LanguageOptions

    return LanguageOptions(), FULL


def main(args: Sequence[str] | None = None) -> int:
    """Parses options, trains, and returns the exit status; wrong options or data give 2."""
    return command.run("train.experiments.language", settings, run, args)


def run(options: "LanguageOptions", typed: str) -> "list[LanguageResult]":
    """Trains and measures every variant.

    Args:
        options: checked here.
        typed: the command, for the record.

    Raises:
        ConfigError: options that cannot work.
        DataError: text that cannot be used.
    """
    import numpy as np

    from train.config import DataConfig
    from train.data import eval_batches, train_batches
    from train.experiments import results
    from train.experiments.lanes import Lane
    from train.experiments.language_models import model_configs
    from train.experiments.language_options import check
    from train.experiments.language_results import LanguageResult, table
    from train.experiments.text_learner import TextLearner
    from train.mixture import load_data

    check(options)
    started = time.monotonic()
    data = load_data(DataConfig(files=options.files))
    configs = model_configs(options, data.tokenizer.vocab_size)
    sizes = dict(seq_len=options.seq_len, batch_size=options.batch_size)
    stream = train_batches(data.train, seed=options.data_seed, prefetch=0, **sizes)
    # All variants see these; a few bytes a token and step.
    calls = [
        [next(stream) for _ in range(options.eval_every)] for _ in range(options.steps // options.eval_every)
    ]
    held_out = eval_batches(data.held_out, max_batches=options.eval_batches, **sizes)
    stacked = [{k: np.stack([x[k] for x in call]) for k in call[0]} for call in [*calls, held_out]]

    lanes = [Lane(rate, seed) for rate in options.learning_rates for seed in options.seeds]
    learners = {name: TextLearner(config, options) for name, config in configs.items()}
    found: list[LanguageResult] = []
    about = results.about(options, typed) | {
        "python": sys.version.split()[0],
        "text": {
            "described": data.description(),
            "fingerprint": data.fingerprint,
            "trained_tokens": int(sum((x["segment_ids"] > 0).sum() for x in stacked[:-1])),
            "held_out_tokens": int((stacked[-1]["segment_ids"] > 0).sum()),
            "bytes_per_token": float(data.held_out.bytes_per_target),
        },
    }
    pool = ThreadPoolExecutor(options.compile_ahead)
    try:
        ready = {
            name: pool.submit(x.compile, len(lanes), stacked[0], stacked[-1]) for name, x in learners.items()
        }
        for name, learner in learners.items():
            if options.budget_seconds is not None and time.monotonic() - started > options.budget_seconds:
                print(f"no time left for {name}", flush=True)
                continue
            ready[name].result()
            config = configs[name]
            result = LanguageResult(
                name, learner.num_parameters, config.intermediate_size, [lane._asdict() for lane in lanes]
            )
            found.append(result)
            state, seconds = learner.init(lanes), 0.0
            for i, batches in enumerate(stacked[:-1]):
                start = time.monotonic()
                state, losses = learner.advance(state, batches)
                seconds += time.monotonic() - start
                evaluated = learner.evaluate(state, stacked[-1])
                step = (i + 1) * options.eval_every
                entry = {"step": step, "seconds": round(seconds, 3), "loss": losses[-1].tolist()}
                result.history.append(entry | {"eval_loss": evaluated.tolist()})
                print(f"{name}: step {step}, eval loss {np.round(evaluated, 4)}, {seconds:.1f} s", flush=True)
                results.save(options.out, about, found)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    text = table(found)
    options.out.with_suffix(".md").write_text(text)
    print(text, flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
