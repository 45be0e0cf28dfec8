"""Language models of one shape that learn to answer a task, answer it, and are tuned on answers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from deltajax.models import ModelConfig
from deltajax.models.decoding import Options, advance, begin
from deltajax.models.sampling import Sampling
from train.config import OptimizerConfig
from train.experiments.arrows import Arrows
from train.experiments.lanes import Lanes, Params, init_model, take_steps
from train.mesh import ShardingRules, make_mesh
from train.model_state import ModelState, model_state
from train.optimizer import make_optimizer, make_schedule
from train.preference.loss import Batch, batch_log_probs, dpo, fine_tuning

_ANSWERED = 1024  # prompts of a model at a time: their states and caches take memory


@dataclass(frozen=True)
class Training:
    """So many steps of so many rows (or pairs) at a peak learning rate, after a tenth of them to warm up."""

    steps: int
    rows: int
    rate: float


class Answerers:
    """Models of one configuration; all arguments and results have a leading axis of models side by side.

    Args:
        config: the models'.
        task: what they answer.
    """

    def __init__(self, config: ModelConfig, task: Arrows):
        self.config, self.task = config, task

    @cached_property
    def model(self) -> ModelState:
        """The models' structure."""
        return model_state(self.config, make_mesh(1, 1), ShardingRules())

    @partial(jax.jit, static_argnums=(0, 1))
    def pretrain(self, how: Training, seeds: Int[Array, " lanes"], errors: Float[Array, " lanes"]) -> Params:
        """New models, each trained on text of its own with its share of errors."""

        def loss(params: Params, step: Array, seed: Array, errors: Array) -> Array:
            asked, said = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
            prompts = self.task.draw(asked, how.rows)
            batch = _rows(prompts.tokens, self.task.answers(said, prompts, errors))
            total, sums = fine_tuning(self.model.model(params), batch)
            return total / sums["count"]

        params = jax.vmap(lambda seed: init_model(self.config, jax.random.key(seed)))(seeds)
        return self._trained(how, params, loss, (seeds, errors))

    @partial(jax.jit, static_argnums=0)
    def answer(
        self, params: Params, prompts: Int[Array, "lanes N P"], keys: Key[Array, " lanes"]
    ) -> Int[Array, "lanes N L"]:
        """Answers sampled at temperature 1."""
        options = Options(Sampling(1.0, None, None), stop_tokens=(), pad_token=0)

        def one(params: Params, prompts: Array, key: Array) -> Array:
            model, (count, length) = self.model.model(params), prompts.shape

            def some(asked: tuple[Array, Array]) -> Array:
                cache = model.init_cache(rows, length + self.task.steps)
                hidden, cache = model.hidden_states(asked[0], cache=cache)
                state = begin(model, hidden[:, -1], cache, asked[1], options)

                def step(state: Any, _: None) -> tuple[Any, Array]:
                    return advance(model, state, options), state.last

                return jax.lax.scan(step, state, None, length=self.task.steps)[1].T

            rows = math.gcd(count, _ANSWERED)
            asked = prompts.reshape(-1, rows, length), jax.random.split(key, count // rows)
            return jax.lax.map(some, asked).reshape(count, self.task.steps)

        return jax.vmap(one)(params, prompts, keys)

    @partial(jax.jit, static_argnums=(0, 1, 2))
    def tune(
        self,
        how: Training,
        beta: float,
        params: Params,
        prompts: Int[Array, "lanes N P"],
        chosen: Int[Array, "lanes N L"],
        rejected: Int[Array, "lanes N L"],
        weights: Float[Array, "lanes 2"],
    ) -> Params:
        """The models after one pass over N = steps x rows pairs.

        `weights` are those of DPO's loss and of fine-tuning's on the chosen answers.
        """

        def loss(params: Params, step: Array, start: Params, weights: Array, *of: Array) -> Array:
            prompts, *said = (jax.lax.dynamic_slice_in_dim(x, step * how.rows, how.rows) for x in of)
            model, batch = self.model.model(params), _pairs(*(_rows(prompts, x) for x in said))
            # Once for each pair, as it is used once.
            reference = jax.lax.stop_gradient(batch_log_probs(self.model.model(start), batch))
            alone = batch | {"answers": batch["answers"] * (batch["segment_ids"] == 1)}
            preferred, pairs = dpo(beta, 1)(model, batch | {"reference": reference})
            told, tokens = fine_tuning(model, alone)
            return weights[0] * preferred / pairs["count"] + weights[1] * told / tokens["count"]

        return self._trained(how, params, loss, (params, weights, prompts, chosen, rejected))

    def _trained(self, how: Training, params: Params, loss: Callable[..., Array], own: Any) -> Params:
        # Pairs of equal answers have gradients of rounding errors alone, which a smaller eps would scale up.
        config = OptimizerConfig(learning_rate=1.0, warmup_steps=how.steps // 10, weight_decay=0.0, eps=1e-6)
        optimizer = make_optimizer(config, make_schedule(config, how.steps), self.model.logical_axes)
        rates = jnp.full(len(jax.tree.leaves(params)[0]), how.rate)
        lanes = Lanes(jnp.zeros((), jnp.int32), rates, params, jax.vmap(optimizer.init)(params))
        return take_steps(loss, optimizer, lanes, jnp.arange(how.steps), own=own)[0].params


def most_likely(params: Params) -> Params:
    """Models whose samples are the likeliest elements: their logits lie far apart."""
    return params | {"lm_head": 1e4 * params["lm_head"]}


def _rows(prompts: Int[Array, "B P"], answers: Int[Array, "B L"]) -> Batch:
    """A batch of one sequence a row, its answer's tokens marked."""
    ids = jnp.concatenate([prompts, answers], axis=1)
    tokens = ids[:, :-1]
    marks = jnp.broadcast_to(jnp.arange(tokens.shape[1]) >= prompts.shape[1] - 1, tokens.shape)
    return {
        "tokens": tokens,
        "targets": ids[:, 1:],
        "segment_ids": jnp.ones_like(tokens),
        "answers": marks.astype(jnp.int32),
    }


def _pairs(chosen: Batch, rejected: Batch) -> Batch:
    """Rows of two sequences each."""
    rejected = rejected | {"segment_ids": 2 * rejected["segment_ids"]}
    return {name: jnp.concatenate([chosen[name], rejected[name]], axis=1) for name in chosen}
