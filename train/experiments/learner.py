"""Training small models on a task with the whole loop on the device: many steps a call, many models at once.

All lanes of a learner have the same shapes and see the same rows, so that one program, mapped over the lanes,
trains them side by side: a small model alone leaves an accelerator idle.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from deltajax.models import ModelConfig
from train.config import OptimizerConfig
from train.experiments import readout
from train.experiments.lanes import Lane, Lanes, init_lanes, init_model, take_steps
from train.mesh import ShardingRules, make_mesh
from train.model_state import ModelState, model_state
from train.optimizer import make_optimizer, make_schedule
from train.tasks import Sample, Task, sample_rows
from train.tasks.source import split_key

# The last part of the answers, where what the state holds is oldest.
LATE = 0.25


@dataclass(frozen=True)
class Scores:
    """Accuracies of each lane on rows it never saw, float32 [lanes].

    Attributes:
        answers: share of all answers that are right.
        late: of those in the last quarter of the row's answers.
        rows: share of the rows without a wrong answer.
    """

    answers: np.ndarray
    late: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class Plan:
    """How lanes are trained.

    Attributes:
        steps: optimizer steps, for the schedule.
        batch_size: rows of a step.
        optimizer: of a peak learning rate of 1, which each lane's multiplies.
        steps_per_call: steps of one call of the program, whose rows are made at once.
        eval_rows: rows of an evaluation, rounded up to parts of about as many tokens as a training step has.
        data_seed: of the rows.
        lanes: "together" maps over the lanes; "in_turn" runs one after another inside the program, with the
            memory of one.
    """

    steps: int
    batch_size: int
    optimizer: OptimizerConfig
    steps_per_call: int = 100
    eval_rows: int = 256
    data_seed: int = 0
    lanes: Literal["together", "in_turn"] = "together"


class Learner:
    """Models of one configuration that learn one task at one length.

    Args:
        config: the models'.
        task: what they learn.
        length: T of the training rows.
        plan: how.

    Raises:
        ValueError: a length that the task has no rows of.
    """

    def __init__(self, config: ModelConfig, task: Task, length: int, plan: Plan):
        task.check(length)
        self.config, self.task, self.length, self.plan = config, task, length, plan
        self._compiled: dict[Any, Any] = {}

    @cached_property
    def model(self) -> ModelState:
        """The models' structure."""
        return model_state(self.config, make_mesh(1, 1), ShardingRules())

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """Makes the updates of a learning rate of 1."""
        schedule = make_schedule(self.plan.optimizer, self.plan.steps)
        axes = {"model": self.model.logical_axes}
        if self.task.reads_last:
            axes["decoder"] = {
                name: {"kernel": ("embed", "embed")} for name in readout.init_decoder(jax.random.key(0), 1)
            }
        return make_optimizer(self.plan.optimizer, schedule, axes)

    def init(self, lanes: list[Lane]) -> Lanes:
        """Lanes before their first step."""

        def make(key):
            params = {"model": init_model(self.config, key)}
            if self.task.reads_last:
                params["decoder"] = readout.init_decoder(jax.random.fold_in(key, 1), self.config.hidden_size)
            return params

        return init_lanes(lanes, make, self.optimizer)

    def advance(self, lanes: Lanes) -> tuple[Lanes, np.ndarray]:
        """Takes `steps_per_call` steps.

        Args:
            lanes: donated.

        Returns:
            The lanes after them, and their losses, float32 [steps_per_call, lanes].
        """
        lanes, losses = self._advance(len(lanes.rates))(lanes)
        return lanes, np.asarray(losses)

    def measure(self, lanes: Lanes, length: int | None = None) -> Scores:
        """Accuracies on held-out rows of `length` (the training length by default)."""
        length = self.length if length is None else length
        self.task.check(length)
        found = jax.device_get(self._measure(len(lanes.rates), length)(lanes.params))
        return Scores(*(np.asarray(x) for x in found))

    def compile(self, lanes: int, lengths: tuple[int, ...] = ()) -> None:
        """Compiles what `advance` and `measure` run; may be called in a thread of its own."""
        self._advance(lanes)
        for length in {self.length, *lengths}:
            self._measure(lanes, length)

    def _advance(self, lanes: int) -> Any:
        return self._program(
            ("advance", lanes), lambda: jax.jit(self._steps, donate_argnums=0), lambda x: x, lanes
        )

    def _measure(self, lanes: int, length: int) -> Any:
        return self._program(
            ("measure", lanes, length),
            lambda: jax.jit(partial(self._scores, length=length)),
            lambda x: x.params,
            lanes,
        )

    def _program(self, name: Any, make: Any, argument: Any, lanes: int) -> Any:
        if name not in self._compiled:
            shapes = jax.eval_shape(lambda: self.init([Lane(0.0, 0)] * lanes))
            self._compiled[name] = make().lower(argument(shapes)).compile()
        return self._compiled[name]

    def _batches(self, split: str, length: int, first: Array, count: int, rows: int) -> readout.Questions:
        """`count` batches of `rows` rows from row `first` on, each [count, rows, ..]."""
        indices = first + jnp.arange(count * rows, dtype=jnp.uint32)
        sample: Sample = sample_rows(self.task, length, split_key(self.plan.data_seed, split), indices)
        asked = readout.questions(self.task, sample)
        return jax.tree.map(lambda x: x.reshape(count, rows, *x.shape[1:]), asked)

    def _map(self, f: Any) -> Any:
        """`f` of one lane for all lanes."""
        if self.plan.lanes == "together":
            return jax.vmap(f)
        return lambda *args: jax.lax.map(lambda x: f(*x), args)

    def _steps(self, lanes: Lanes) -> tuple[Lanes, Array]:
        calls, rows = self.plan.steps_per_call, self.plan.batch_size
        first = lanes.step.astype(jnp.uint32) * jnp.uint32(rows)
        batches = self._batches("train", self.length, first, calls, rows)

        def loss(params, asked):
            model = self.model.model(params["model"])
            return readout.loss(self.task, model, params.get("decoder"), asked)

        return take_steps(loss, self.optimizer, lanes, batches, self._map)

    def _scores(self, params: Any, length: int) -> tuple[Array, Array, Array]:
        tokens = self.plan.batch_size * self.length
        rows = min(self.plan.eval_rows, max(tokens // length, 1))
        count = -(-self.plan.eval_rows // rows)
        batches = self._batches("eval", length, jnp.uint32(0), count, rows)

        def one(params):
            model = self.model.model(params["model"])

            def batch(asked):
                right = readout.right_answers(self.task, model, params.get("decoder"), asked)
                number = jnp.cumsum(asked.counts, axis=1)
                late = asked.counts & (number > (1 - LATE) * number[:, -1:])
                whole = jnp.all(right | ~asked.counts, axis=1)
                return [jnp.sum(x) for x in (right, asked.counts, right & late, late, whole)]

            right, asked, late_right, late, whole = (jnp.sum(x) for x in jax.lax.map(batch, batches))
            return right / asked, late_right / late, whole / (count * rows)

        return self._map(one)(params)
