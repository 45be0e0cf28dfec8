"""AdamW with warm-up, a cosine or warm-up-stable-decay schedule, clipping and a weight-decay mask."""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding

from train.config import OptimizerConfig

Params = Any  # nested dict of float32 arrays

# Never decayed, whatever their rank: decay rates and their offsets live in their own (log) space, and the
# short convolutions have only a few taps per channel.
_NO_DECAY = ("A_log", "dt_bias", "bias", "conv", "norm")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> learning rate, for a run of `steps` steps.

    Linear from 0 to the peak over `warmup_steps`; then "cosine" falls to `final_fraction` of the peak at
    the last step, and "wsd" holds the peak and falls linearly over the last `decay_fraction` of the run.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    if config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), alpha=config.final_fraction)
        return optax.join_schedules([rise, fall], [warmup])
    decay = min(max(round(steps * config.decay_fraction), 1), max(steps - warmup, 1))
    hold, fall = optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)
    return optax.join_schedules([rise, hold, fall], [warmup, max(steps - decay, warmup)])


def decay_mask(logical_axes: dict[str, Any]) -> dict[str, Any]:
    """Which parameters weight decay touches: matrices and the embedding table.

    Args:
        logical_axes: nested dict of each parameter's logical axis names (tuples).

    Returns:
        The same tree of bools. False for vectors (norms, biases; a "layers" axis from stacking layers
        does not count) and for anything whose path contains A_log, dt_bias, bias, conv or norm.
    """

    def decays(path: Any, axes: tuple[str | None, ...]) -> bool:
        name = jax.tree_util.keystr(path)
        rank = sum(axis != "layers" for axis in axes)
        return rank >= 2 and not any(part in name for part in _NO_DECAY)

    return jax.tree_util.tree_map_with_path(decays, logical_axes, is_leaf=lambda x: isinstance(x, tuple))


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, mask: dict[str, Any]
) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW, decaying only where `mask` says so."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=mask
        ),
    )


def state_shardings(
    optimizer: optax.GradientTransformation, params: Params, shardings: Params, replicated: NamedSharding
) -> Any:
    """Where each array of the optimizer's state lies: moments beside their parameter, counts everywhere."""
    state = jax.eval_shape(optimizer.init, params)
    return optax.tree_map_params(
        optimizer, lambda _, s: s, state, shardings, transform_non_params=lambda _: replicated
    )
