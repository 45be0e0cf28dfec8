"""The jitted training and evaluation steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deltajax.models import LanguageModel, gate_statistics
from train.balance import balanced, without_loads
from train.groups import group_norms
from train.mesh import ShardingRules
from train.objective import Objective, Sums, next_token

Params = Any  # nested dict of float32 arrays
Batch = dict[str, jax.Array]  # tokens, targets, segment_ids: int32 [B, T]
Build = Callable[[Params], LanguageModel]


class TrainState(NamedTuple):
    """All that a step changes; also of shapes or shardings in place of the arrays."""

    step: Any  # int32 [], steps taken
    params: Params
    opt_state: Any


class StepMetrics(NamedTuple):
    """What a training step reports, scalars."""

    loss: jax.Array  # float32, nats per token, z-loss included
    grad_norm: jax.Array  # float32, before clipping
    learning_rate: jax.Array  # float32
    tokens: jax.Array  # float32, tokens that were worked on
    ok: jax.Array  # bool, False from the first step whose loss or gradient was not finite
    group_norms: dict[str, jax.Array]  # float32, gradient norms before clipping, see `train.groups`
    means: dict[str, jax.Array]  # float32, what an objective reports beside its loss


def micro_batches(batch: Batch, parts: int, mesh: Mesh, rules: ShardingRules) -> Batch:
    """[B, T] -> [parts, B / parts, T], every device keeping its own tokens.

    Row b goes to micro-batch b % parts: a device's contiguous rows then spread evenly over all of them.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, *rules.tokens(mesh).spec))

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, sharding)

    return jax.tree.map(cut, batch)


def sums_and_grads(
    build: Build,
    params: Params,
    batch: Batch,
    parts: int,
    mesh: Mesh,
    rules: ShardingRules,
    objective: Objective,
) -> tuple[jax.Array, Sums, Params]:
    """Mean loss, an objective's sums and gradients of a batch, computed in `parts` micro-batches.

    Sums of losses and of their gradients are accumulated in float32 and divided by the batch's count once,
    so micro-batches of unequal length weigh what they should.
    """

    def loss_sum(params, batch):  # the sum, not the mean
        with rules.shard_ops(mesh):
            return objective(build(params), batch)

    value_and_grad = jax.value_and_grad(loss_sum, has_aux=True)
    if parts == 1:
        (loss, sums), grads = value_and_grad(params, batch)
    else:

        def accumulate(carry, micro):
            (loss, sums), grads = value_and_grad(params, micro)
            return jax.tree.map(jnp.add, carry, (loss, sums, grads)), None

        micro = micro_batches(batch, parts, mesh, rules)
        shapes = jax.eval_shape(loss_sum, params, jax.tree.map(lambda x: x[0], micro))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (*shapes, params))
        (loss, sums, grads), _ = jax.lax.scan(accumulate, zero, micro)
    scale = 1.0 / jnp.maximum(sums["count"], 1.0)
    return loss * scale, sums, jax.tree.map(lambda g: g * scale, grads)


def make_train_step(
    build: Build,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    shardings: TrainState,
    mesh: Mesh,
    rules: ShardingRules,
    accumulate: int = 1,
    objective: Objective | None = None,
    balance_rate: float = 0.0,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, StepMetrics]]:
    """Builds the jitted `train_step(state, batch, ok) -> (state, metrics)`; the state is donated.

    `ok` is the previous step's flag. Once a loss or a gradient is not finite, the step and all after it
    hand the state through untouched: the host may look a step late and still finds the state that failed.
    The objective is the next token's cross entropy by default.
    """
    chosen = next_token() if objective is None else objective

    def train_step(state: TrainState, batch: Batch, ok: jax.Array) -> tuple[TrainState, StepMetrics]:
        loss, sums, found = sums_and_grads(build, state.params, batch, accumulate, mesh, rules, chosen)
        grads = without_loads(found)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = balanced(optax.apply_updates(state.params, updates), found, balance_rate)
        new = TrainState(state.step + 1, params, opt_state)
        ok = ok & jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, state)
        learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        scale = 1.0 / jnp.maximum(sums["count"], 1.0)
        means = {name: x * scale for name, x in sums.items() if name not in ("count", "tokens")}
        norms = group_norms(grads)
        return new, StepMetrics(loss, grad_norm, learning_rate, sums["tokens"], ok, norms, means)

    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        train_step,
        in_shardings=(shardings, rules.tokens(mesh), replicated),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )


def make_eval_step(
    build: Build, param_shardings: Params, mesh: Mesh, rules: ShardingRules
) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """Builds the jitted `eval_step(params, batch) -> (summed loss in nats, number of targets)`."""
    sums_step = make_sums_step(build, param_shardings, mesh, rules, next_token())

    def eval_step(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        total, sums = sums_step(params, batch)
        return total, sums["count"]

    return eval_step


def make_sums_step(
    build: Build, param_shardings: Params, mesh: Mesh, rules: ShardingRules, objective: Objective
) -> Callable[[Params, Batch], tuple[jax.Array, Sums]]:
    """Builds the jitted `sums_step(params, batch) -> (summed loss, sums)`, an objective without gradients."""
    replicated = NamedSharding(mesh, PartitionSpec())

    def sums_step(params: Params, batch: Batch) -> tuple[jax.Array, Sums]:
        with rules.shard_ops(mesh):
            return objective(build(params), batch)

    return jax.jit(
        sums_step,
        in_shardings=(param_shardings, rules.tokens(mesh)),
        out_shardings=replicated,
    )


def make_gate_step(
    build: Build, param_shardings: Params, mesh: Mesh, rules: ShardingRules
) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """Builds the jitted `gate_step(params, batch) -> gate_statistics`."""

    def gate_step(params: Params, batch: Batch) -> dict[str, jax.Array]:
        with rules.shard_ops(mesh):
            return gate_statistics(build(params), batch["tokens"], batch["segment_ids"])

    return jax.jit(
        gate_step,
        in_shardings=(param_shardings, rules.tokens(mesh)),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )
