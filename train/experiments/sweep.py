"""Runs a sweep: every task and length, its mixers in turns, learning rates and seeds side by side."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltajax.models import ModelConfig
from train.config import ConfigError, OptimizerConfig
from train.experiments import options as names
from train.experiments import results
from train.experiments.lanes import Lane, Lanes
from train.experiments.learner import Learner, Plan
from train.experiments.options import SweepOptions
from train.experiments.results import Result


@dataclass
class _Run:
    """One task, length and mixer."""

    learner: Learner
    result: Result
    compiled: "Future[None] | None" = None
    lanes: Lanes | None = None
    seconds: float = 0.0


def run_sweep(options: SweepOptions, say: Callable[[str], None], command: str = "") -> list[Result]:
    """Trains and measures everything the options ask for; results are saved after every evaluation.

    Args:
        options: checked here.
        say: is told how it goes, a line at a time.
        command: what was typed, for the record.

    Raises:
        ConfigError: options that cannot work, found before anything is trained.
    """
    options.check()
    started = time.monotonic()
    runs = [
        [_make(options, task, length, mixer) for mixer in options.mixers]
        for task in options.tasks
        for length in options.lengths_of(task)
    ]
    found = [run.result for group in runs for run in group]
    about = results.about(options, command)

    def save() -> None:
        results.save(options.out, about, found)

    lanes = [Lane(rate, seed) for rate in options.learning_rates for seed in options.seeds]
    pool = ThreadPoolExecutor(options.compile_ahead)
    try:
        for run in (run for group in runs for run in group):
            run.compiled = pool.submit(run.learner.compile, len(lanes), options.eval_lengths)
        for i, group in enumerate(runs):
            for run in group:
                assert run.compiled is not None
                run.compiled.result()
            deadline = None
            if options.budget_seconds is not None:
                left = options.budget_seconds - (time.monotonic() - started)
                deadline = time.monotonic() + left / (len(runs) - i)
            _train(group, lanes, options, deadline, say, save)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    text = results.table(found)
    options.out.with_suffix(".md").write_text(text)
    say(text)
    return found


def make_learner(options: SweepOptions, task_name: str, length: int, mixer: str) -> Learner:
    """What trains the models of one task, length and mixer.

    Raises:
        ConfigError: sizes that the models refuse.
    """
    layer = names.MIXERS[mixer]
    task = options.task(task_name)
    try:
        config = ModelConfig(
            vocab_size=task.vocab_size,
            hidden_size=options.num_heads * options.head_dim,
            num_layers=options.num_layers,
            layer_pattern=(layer.kind,),
            num_heads=options.num_heads,
            head_dim=options.head_dim,
            attn_head_dim=options.head_dim,
            intermediate_size=options.intermediate_size,
            allow_neg_eigval=layer.negative,
            lower_bound=layer.lower_bound,
            tie_embeddings=options.tie_embeddings,
            dtype=options.dtype,
            implementation=options.implementation,
            scan_layers=False,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    optimizer = OptimizerConfig(
        learning_rate=1.0, weight_decay=options.weight_decay, warmup_steps=options.warmup_steps
    )
    plan = Plan(
        steps=options.steps,
        batch_size=max(options.batch_tokens // length, 1),
        steps_per_call=options.eval_every,
        eval_rows=options.eval_rows,
        optimizer=optimizer,
        data_seed=options.data_seed,
        lanes=options.lanes,
    )
    return Learner(config, task, length, plan)


def _make(options: SweepOptions, task_name: str, length: int, mixer: str) -> _Run:
    learner = make_learner(options, task_name, length, mixer)
    lanes = [
        {"learning_rate": rate, "seed": seed} for rate in options.learning_rates for seed in options.seeds
    ]
    return _Run(learner, Result(task_name, mixer, length, lanes, learner.model.num_parameters))


def _train(
    group: Sequence[_Run],
    lanes: list[Lane],
    options: SweepOptions,
    deadline: float | None,
    say: Callable[[str], None],
    save: Callable[[], None],
) -> None:
    """Trains a task's mixers in turns until each has the target, all steps, or the time is over."""
    active = list(group)
    while active:
        for run in list(active):
            result = run.result
            start = time.monotonic()
            if run.lanes is None:
                run.lanes = run.learner.init(lanes)
            run.lanes, losses = run.learner.advance(run.lanes)
            run.seconds += time.monotonic() - start
            scores = run.learner.measure(run.lanes)
            step = (len(result.history) + 1) * options.eval_every
            entry: dict[str, Any] = {"step": step, "seconds": round(run.seconds, 3)}
            entry["loss"] = np.mean(losses[-10:], axis=0).tolist()
            entry |= {name: x.tolist() for name, x in vars(scores).items()}
            result.history.append(entry)
            rate = result.best_rate()
            say(
                f"{result.task} {result.length} {result.mixer}: step {step}, accuracy "
                f"{result.accuracy(rate):.4f} (late {result.accuracy(rate, kind='late'):.4f}), "
                f"rate {rate:g}, {run.seconds:.1f} s"
            )
            if result.solved(options.target):
                result.stopped = "target"
            elif step >= options.steps:
                result.stopped = "steps"
            if result.stopped:
                active.remove(run)
        # Only after a whole turn, so that all have taken as many steps.
        if deadline is not None and time.monotonic() > deadline:
            for run in active:
                run.result.stopped = "budget"
            active = []
        save()
    for run in group:
        assert run.lanes is not None
        for length in options.eval_lengths:
            scores = run.learner.measure(run.lanes, length)
            run.result.lengths[str(length)] = {name: x.tolist() for name, x in vars(scores).items()}
        run.lanes = None  # frees the memory
    save()


def tell(line: str) -> None:
    """Prints a line at once, also into a pipe."""
    print(line, flush=True)
