"""Checks and times the experiments' learner: many small models trained side by side in one program.

    python -m benchmarks.task_lanes --check   # gradients of models side by side against one by one
    python -m benchmarks.task_lanes           # milliseconds a step of four lanes, full setting of recall

On a GPU the check shows that the ops' kernels are right under `jax.vmap`.
"""

import dataclasses
import operator
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import jax
import jax.numpy as jnp
import tyro

from train.experiments import readout, recall, sweep
from train.experiments.lanes import Lane
from train.experiments.learner import Learner
from train.tasks import sample_rows
from train.tasks.source import split_key

TOLERANCE = 0.1  # relative, bf16 models; a kernel that mixes up the models is off by 1 and more


@dataclasses.dataclass(frozen=True)
class Options:
    """See the module."""

    check: bool = False
    """compare instead of timing"""
    mixers: tuple[Literal["kda", "gated_delta_net", "delta_net", "delta_net_neg", "kda_neg"], ...] = (
        "kda",
        "gated_delta_net",
        "delta_net",
        "kda_neg",
    )
    """layers"""
    length: int = 256
    """tokens of a row"""
    task: Literal["mqar", "palindrome", "stacks"] = "stacks"
    """what is learned"""
    head_dim: int = 128
    """of both heads"""
    steps: int = 50
    """steps of a timed call"""


def learner(options: Options, mixer: str, **changes) -> Learner:
    """A learner of the full setting of `recall`."""
    full = dataclasses.replace(recall.settings()[1], head_dim=options.head_dim, **changes)
    return sweep.make_learner(full, options.task, options.length, mixer)


def check(options: Options) -> bool:
    """Gradients of two models, together and one by one, by the kernels and by the chunked ops."""
    lanes = [Lane(1e-3, 0), Lane(1e-3, 1)]

    def measure(mixer: str) -> dict[str, float]:
        x = learner(options, mixer, batch_tokens=8 * options.length)
        plain = learner(options, mixer, batch_tokens=8 * options.length, implementation="chunked")
        params = x.init(lanes).params
        rows = jnp.arange(8, dtype=jnp.uint32)
        sample = sample_rows(x.task, options.length, split_key(0, "train"), rows)
        asked = readout.questions(x.task, sample)

        def gradient(of: Learner):
            return jax.grad(lambda p: readout.loss(of.task, of.model.model(p["model"]), None, asked))

        together = jax.jit(jax.vmap(gradient(x)))(params)
        errors = {}
        for name, one in (("one by one", x), ("the chunked ops", plain)):
            run = jax.jit(gradient(one))
            alone = [run(jax.tree.map(operator.itemgetter(i), params)) for i in range(len(lanes))]
            stacked = jax.tree.map(lambda *g: jnp.stack(g), *alone)
            errors[name] = max(map(_error, jax.tree.leaves(together), jax.tree.leaves(stacked)))
        return errors

    with ThreadPoolExecutor(len(options.mixers)) as pool:
        found = dict(zip(options.mixers, pool.map(measure, options.mixers), strict=True))
    for mixer, errors in found.items():
        print(f"{mixer}: " + ", ".join(f"against {name} {e:.1e}" for name, e in errors.items()))
    good = all(e < TOLERANCE for errors in found.values() for e in errors.values())
    print("ok" if good else f"FAILED: expected errors below {TOLERANCE}")
    return good


def _error(a: jax.Array, b: jax.Array) -> float:
    """Relative, of a parameter's gradient."""
    return float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))


def times(options: Options) -> None:
    """Milliseconds a step of four lanes."""
    lanes = [Lane(rate, 0) for rate in (1e-4, 5e-4, 1e-3, 3e-3)]
    ways: tuple[Literal["together", "in_turn"], ...] = ("together", "in_turn")
    made = {
        (mixer, way): learner(options, mixer, lanes=way, steps=options.steps, eval_every=options.steps)
        for mixer in options.mixers
        for way in ways
    }
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda x: x.compile(len(lanes)), made.values()))
    for (mixer, way), x in made.items():
        state, _ = x.advance(x.init(lanes))
        found = []
        for _ in range(3):
            start = time.perf_counter()
            state, _ = x.advance(state)
            found.append(1e3 * (time.perf_counter() - start) / options.steps)
        rows = x.plan.batch_size
        print(
            f"{mixer}, {way}: {min(found):.2f} ms a step of 4 lanes x {rows} x {options.length}", flush=True
        )


def main() -> int:
    options = tyro.cli(Options, prog="python -m benchmarks.task_lanes")
    print(jax.devices()[0].device_kind, flush=True)
    if options.check:
        return 0 if check(options) else 1
    times(options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
