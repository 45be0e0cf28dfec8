"""Trains language models of one configuration side by side on given batches of packed text."""

from functools import cached_property
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deltajax.models import ModelConfig
from train.config import OptimizerConfig
from train.experiments.lanes import Lane, Lanes, init_lanes, init_model, take_steps
from train.mesh import ShardingRules, make_mesh
from train.model_state import ModelState, model_state
from train.objective import batch_loss_sum
from train.optimizer import make_optimizer, make_schedule


class Schedule(Protocol):
    """What the options say about the optimizer."""

    @property
    def steps(self) -> int:
        """Of the run."""

    @property
    def warmup_steps(self) -> int:
        """Of the learning rate."""

    @property
    def weight_decay(self) -> float:
        """Of matrices."""


class TextLearner:
    """Models of one configuration.

    Args:
        config: the models'.
        options: of the optimizer.
    """

    def __init__(self, config: ModelConfig, options: Schedule):
        self._config, self._options = config, options
        self._advance: Any = None
        self._evaluate: Any = None

    @cached_property
    def model(self) -> ModelState:
        """The models' structure."""
        return model_state(self._config, make_mesh(1, 1), ShardingRules())

    @cached_property
    def _optimizer(self) -> optax.GradientTransformation:
        options = OptimizerConfig(
            learning_rate=1.0,
            warmup_steps=self._options.warmup_steps,
            weight_decay=self._options.weight_decay,
        )
        return make_optimizer(options, make_schedule(options, self._options.steps), self.model.logical_axes)

    @property
    def num_parameters(self) -> int:
        """Numbers a model learns."""
        return self.model.num_parameters

    def init(self, lanes: list[Lane]) -> Lanes:
        """Lanes before their first step."""
        return init_lanes(lanes, lambda key: init_model(self._config, key), self._optimizer)

    def compile(self, lanes: int, batches: Any, held_out: Any) -> None:
        """Compiles for such arrays; may be called in a thread of its own."""
        state = jax.eval_shape(lambda: self.init([Lane(0.0, 0)] * lanes))
        self._advance = jax.jit(self._steps, donate_argnums=0).lower(state, batches).compile()
        self._evaluate = jax.jit(self._losses).lower(state.params, held_out).compile()

    def advance(self, lanes: Lanes, batches: Any) -> tuple[Lanes, np.ndarray]:
        """A step for each batch, {"tokens", "targets", "segment_ids"} of int32 [N, B, T].

        Returns:
            The lanes after them (those before are donated), and mean losses, float32 [N, lanes].
        """
        lanes, losses = self._advance(lanes, batches)
        return lanes, np.asarray(losses)

    def evaluate(self, lanes: Lanes, held_out: Any) -> np.ndarray:
        """Mean loss of each lane over all targets of the batches, float32 [lanes]."""
        return np.asarray(self._evaluate(lanes.params, held_out))

    def _steps(self, lanes: Lanes, batches: Any) -> tuple[Lanes, jax.Array]:
        def loss(params, batch):
            total, count = batch_loss_sum(self.model.model(params), batch)
            return total / jnp.maximum(count, 1)

        return take_steps(loss, self._optimizer, lanes, batches)

    def _losses(self, params: Any, held_out: Any) -> jax.Array:
        def one(params):
            sums = jax.lax.map(lambda batch: batch_loss_sum(self.model.model(params), batch), held_out)
            total, count = (jnp.sum(x) for x in sums)
            return total / count

        return jax.vmap(one)(params)
