"""`python -m train.experiments.delta_language`: delta learning (arXiv 2507.06187) with language models.

A student and smaller teachers learn to answer a task (`arrows`) from text with errors, the teachers from text
with more of them, and sample answers of that quality. The student is then tuned on the teachers' answers to
new prompts, which are worse than its own: fine-tuned on the better teacher's, and by DPO on pairs of the
better and a worse one's. Controls: worse teachers of several strengths (the gap), two samples of the better
teacher (no gap), an answer beside itself (the same), and pairs the wrong way round.

Where pairs are plenty, DPO's optimum is known: it multiplies the student's odds of a right element by
(the better teacher's odds / the worse one's)^(1 / beta). Results are compared with that.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from train.experiments import command

if TYPE_CHECKING:
    from deltajax.models import ModelConfig

# Who answered -> kind of score -> each seed's.
Scores = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Options:
    """Tune a student on the answers of weaker teachers."""

    out: Path = Path("runs/delta_language.json")
    """results, as JSON; a table goes beside them"""
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    """of parameters, prompts and answers; each is a repetition, and all run side by side"""
    symbols: int = 6
    """of the task; a prompt lists an arrow from each"""
    length: int = 6
    """elements of an answer"""
    hard: float = 2.0
    """what the log-odds of a right element are less by after a hard symbol, in all text"""
    student_width: int = 64
    """width of the student"""
    student_layers: int = 1
    """blocks of the student"""
    teacher_width: int = 32
    """width of the teachers"""
    teacher_layers: int = 1
    """blocks of the teachers"""
    steps: int = 300
    """of pretraining"""
    rows: int = 64
    """texts of a step of pretraining"""
    rate: float = 5e-3
    """learning rate of pretraining"""
    student_errors: float = 0.25
    """share of errors after easy symbols in the student's text"""
    better_errors: float = 0.4
    """in the better teacher's"""
    worse_errors: tuple[float, ...] = (0.6, 0.5, 0.8)
    """in the worse teachers', each a gap of its own; the first is also the one of reversed pairs"""
    tuning_steps: int = 60
    """of DPO and of fine-tuning"""
    pairs: int = 64
    """of a step; each is used once"""
    tuning_rate: float = 1e-3
    """learning rate of DPO and of fine-tuning"""
    beta: float = 0.5
    """of DPO"""
    test: int = 512
    """prompts of the scores"""
    implementation: Literal["pallas", "chunked", "scan"] | None = "chunked"
    """backend of the delta-rule ops"""

    def check(self) -> None:
        """Raises ConfigError, naming the argument, for values that cannot work."""
        from train.config import ConfigError

        for name, value in vars(self).items():
            dashed = name.replace("_", "-")
            if value == ():
                raise ConfigError(f"argument --{dashed}: expected at least one")
            if name.endswith("_errors"):
                for share in value if isinstance(value, tuple) else (value,):
                    if not 0 < share < 1:
                        raise ConfigError(f"argument --{dashed}: must be between 0 and 1, got {share}")
            elif isinstance(value, (int, float)) and not (value > 0 or (name == "hard" and value == 0)):
                raise ConfigError(f"argument --{dashed}: must be positive, got {value}")
        if self.symbols < 4:
            raise ConfigError(f"argument --symbols: expected at least 4, got {self.symbols}")
        errors = (self.better_errors, *self.worse_errors)
        if len(set(errors)) < len(errors):
            raise ConfigError(f"argument --worse-errors: expected others than the better's, got {errors[1:]}")
        if min(self.seeds) < 0 or max(self.seeds) >= 2**20:
            raise ConfigError(f"argument --seeds: must be from 0 to 2**20 - 1, got {self.seeds}")


FULL = Options(
    out=Path("runs/delta_language_full.json"),
    seeds=tuple(range(8)),
    symbols=12,
    length=12,
    student_width=128,
    student_layers=3,
    teacher_width=64,
    teacher_layers=2,
    steps=600,
    rows=128,
    rate=2e-3,
    tuning_steps=120,
    tuning_rate=5e-4,
    test=1024,
)


def main(args: Sequence[str] | None = None) -> int:
    """Parses options, trains, and returns the exit status; wrong options give 2."""
    return command.run("train.experiments.delta_language", lambda: (Options(), FULL), run, args)


def run(options: Options, typed: str = "") -> dict[str, Any]:
    """Trains, answers, tunes and scores; writes the results and their table, and returns them.

    Raises:
        ConfigError: options that cannot work.
    """
    import json

    from train.experiments import results

    options.check()
    started = time.monotonic()
    found = results.about(options, typed) | {"scores": scores(options)}
    found["seconds"] = round(time.monotonic() - started, 1)
    text = table(found["scores"])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(text)
    print(f"{text}\n{found['seconds']} s; {options.out}", flush=True)
    return found


def scores(options: Options) -> Scores:
    """Trains, answers, tunes and scores; kinds are those of `Arrows.scores`, of greedy answers too."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from train.experiments.answerers import Answerers, Training, most_likely
    from train.experiments.arrows import Arrows

    started = time.monotonic()
    task = Arrows(options.symbols, options.length, options.hard)
    student = Answerers(
        _config(options, task.vocabulary, options.student_width, options.student_layers), task
    )
    teacher = Answerers(
        _config(options, task.vocabulary, options.teacher_width, options.teacher_layers), task
    )
    seeds, S = np.array(options.seeds, np.uint32), len(options.seeds)

    def running(what: str) -> None:  # not waited for: the next program is compiled meanwhile
        print(f"{time.monotonic() - started:.1f} s: {what}", flush=True)

    # A few small programs rather than many of one operation.
    select = jax.jit(lambda params, lanes: jax.tree.map(lambda x: x[lanes], params))
    # One set of answers after the other: side by side they want tens of GiB.
    measure = jax.jit(lambda *texts: jax.lax.map(lambda x: task.scores(*x), texts))

    @jax.jit
    def keys(uses: Any) -> Any:  # of each use and seed, apart from those of pretraining's steps
        fold = lambda use, seed: jax.random.fold_in(jax.random.key(seed), 2**30 + use)  # noqa: E731
        return jax.vmap(jax.vmap(fold, (None, 0)), (0, None))(uses, jnp.array(seeds)).reshape(-1)

    def draw(use: int, count: int, times: int) -> Any:
        drawn = jax.jit(jax.vmap(lambda key: task.draw(key, count)))(keys(np.array([use])))
        return jax.tree.map(lambda x: np.concatenate([x] * times), jax.device_get(drawn))

    def measured(prompts: Any, answers: Any, names: list[str], kind: str = "") -> Scores:
        of = jax.device_get(measure(prompts, answers))
        return {
            name: {kind + k: x[i * S : (i + 1) * S].tolist() for k, x in of.items()}
            for i, name in enumerate(names)
        }

    # The better teacher, once more (for another sample of it), and the worse ones.
    rates = (options.better_errors, *options.worse_errors)
    names = ["chosen", *(f"rejected {x:g}" for x in rates)]
    how = Training(options.steps, options.rows, options.rate)
    own = student.pretrain(how, seeds, np.full(S, options.student_errors, np.float32))
    running("the student is trained")
    others = np.concatenate([seeds + np.uint32(2**20 * (i + 1)) for i in range(len(rates))])
    taught = teacher.pretrain(how, others, np.repeat(np.array(rates, np.float32), S))
    running("the teachers are trained")

    how = Training(options.tuning_steps, options.pairs, options.tuning_rate)
    prompts = draw(0, how.steps * how.rows, len(names))
    taught = select(taught, np.array([*range(S), *range(S * len(rates))]))
    said = jax.device_get(teacher.answer(taught, prompts.tokens, keys(np.arange(len(names)) + 1)))
    found = measured(prompts, said, names)
    running("the teachers have answered")

    answers = dict(zip(names, np.split(said, len(names)), strict=True))
    names, n = list(tunings(options)), len(tunings(options))
    better, worse, weights = zip(*tunings(options).values(), strict=True)
    tuned = student.tune(
        how,
        options.beta,
        select(own, np.tile(np.arange(S), n)),
        np.tile(prompts.tokens[:S], (n, 1, 1)),
        np.concatenate([answers[x] for x in better]),
        np.concatenate([answers[x] for x in worse]),
        np.repeat(np.array(weights, np.float32), S, axis=0),
    )
    running("the student is tuned")

    test, each = draw(100, options.test, n), keys(np.full(n, 101))
    found |= measured(test, student.answer(tuned, test.tokens, each), names)
    greedy = measured(test, student.answer(most_likely(tuned), test.tokens, each), names, "greedy_")
    found = {name: of | greedy.get(name, {}) for name, of in found.items()}
    for name, (preferred, other, (by_dpo, _)) in tunings(options).items():
        for kind in ("easy", "hard") if by_dpo else ():
            a, b, c = (np.array(found[x][kind]) for x in ("student", preferred, other))
            found[name][f"predicted_{kind}"] = predicted(a, b, c, options.beta).tolist()
    return found


def tunings(options: Options) -> dict[str, tuple[str, str, tuple[float, float]]]:
    """Condition -> whose answers are preferred, to whose, and the weights of DPO and of fine-tuning."""
    worse = {f"dpo {x:g}": f"rejected {x:g}" for x in options.worse_errors}
    return {
        "student": ("chosen", "chosen", (0, 0)),  # left as it is
        "sft": ("chosen", "chosen", (0, 1)),
        **{name: ("chosen", other, (1, 0)) for name, other in worse.items()},
        "no gap": ("chosen", f"rejected {options.better_errors:g}", (1, 0)),
        "same": ("chosen", "chosen", (1, 0)),
        "reversed": (next(iter(worse.values())), "chosen", (1, 0)),
    }


def predicted(student: Any, better: Any, worse: Any, beta: float) -> Any:
    """Share of right elements at DPO's optimum, of the shares of the three (arrays)."""
    of, preferred, other = (x / (1 - x) for x in (student, better, worse))
    odds = of * (preferred / other) ** (1 / beta)
    return odds / (1 + odds)


def _config(options: Options, vocabulary: int, width: int, layers: int) -> "ModelConfig":
    from deltajax.models import ModelConfig

    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_layers=layers,
        layer_pattern=("delta_net",),
        num_heads=max(1, width // 64),
        head_dim=min(width, 64),
        intermediate_size=2 * width,
        initializer_range=0.8 * width**-0.5,
        implementation=options.implementation,
        chunk_size=16,
    )


def table(found: Scores) -> str:
    """Markdown: shares right in percent, means over seeds, 95 % intervals, (DPO's optimum)."""
    from train.experiments.statistics import mean_and_band

    columns = ("right", "easy", "hard", "whole", "other", "greedy_right", "greedy_hard")
    lines = ["| who | " + " | ".join(c.replace("_", " ") for c in columns) + " |", "|---" * 8 + "|"]

    def cell(of: dict[str, list[float]], column: str) -> str:
        if column not in of:
            return ""
        mean, band = mean_and_band([100 * x for x in of[column]])
        text = f"{mean:.1f} ± {band:.1f}"
        optimum = of.get(f"predicted_{column}")
        return text if optimum is None else f"{text} ({100 * sum(optimum) / len(optimum):.1f})"

    lines += [f"| {name} | " + " | ".join(cell(of, c) for c in columns) + " |" for name, of in found.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
