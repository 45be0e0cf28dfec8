"""Optax's AdamW, Muon and Adafactor with clipping and a weight-decay mask, and the schedules."""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding
from optax.contrib import MuonDimensionNumbers

from train.config import OptimizerConfig
from train.rounding import bfloat16_second_moments

Params = Any  # nested dict of float32 arrays
Axes = Any  # the same tree of each parameter's logical axis names (tuples)

# Never decayed, whatever their rank: decay rates and their offsets live in their own (log) space, and the
# short convolutions have only a few taps per channel.
_NO_DECAY = ("A_log", "dt_bias", "bias", "conv", "norm")
# Tables of one row or column per token are no maps between hidden states: Muon leaves them to Adam.
_TABLES = ("embedding", "lm_head")
# Muon's updates get the root mean square that AdamW's have in practice (arXiv 2502.16982), so that learning
# rates and weight decays carry over.
_MUON_RMS = 0.2


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


def decay_mask(logical_axes: Axes, embeddings: bool = True) -> Params:
    """Which parameters weight decay touches: matrices and, if asked for, the embedding table.

    Args:
        logical_axes: nested dict of each parameter's logical axis names (tuples).
        embeddings: whether the embedding table decays.

    Returns:
        The same tree of bools. False for vectors (norms, biases; a "layers" axis from stacking layers
        does not count) and for anything whose path contains A_log, dt_bias, bias, conv or norm.
    """

    def decays(name: str, axes: tuple[str | None, ...]) -> bool:
        if "embedding" in name and not embeddings:
            return False
        return _is_matrix(name, axes)

    return _map_axes(decays, logical_axes)


def muon_dimensions(logical_axes: Axes) -> Params:
    """How Muon sees each parameter: [.., in, out] matrices of blocks, stacked layers apart; None: by Adam.

    Heads and their channels are one axis of the projections, so that a projection is one matrix. The
    embedding table and the LM head are Adam's, as is everything that weight decay never touches.
    """

    def dimensions(name: str, axes: tuple[str | None, ...]) -> MuonDimensionNumbers | None:
        if not _is_matrix(name, axes) or any(table in name for table in _TABLES):
            return None
        return MuonDimensionNumbers(reduction_axis=len(axes) - 2, output_axis=len(axes) - 1)

    return _map_axes(dimensions, logical_axes)


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, logical_axes: Axes
) -> optax.GradientTransformation:
    """Global-norm clipping, then the optimizer, decaying only where `decay_mask` says so.

    Weight decay is decoupled and scaled by the learning rate, in all three.
    """
    mask = decay_mask(logical_axes, config.decay_embeddings)
    clip = optax.clip_by_global_norm(config.clip_norm)
    if config.name == "adamw":
        adamw = optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            mu_dtype=config.moment_dtype,
            weight_decay=config.weight_decay,
            mask=mask,
        )
        return optax.chain(clip, _stored(adamw, config))
    # Optax's Muon has no decay mask for its Adam, its Adafactor a decay that no learning rate scales: both
    # make a unit step here, and decay and rate follow.
    if config.name == "muon":
        unit = optax.contrib.muon(
            1.0,
            mu_dtype=config.moment_dtype,
            eps=config.eps,
            adam_b1=config.b1,
            adam_b2=config.b2,
            consistent_rms=_MUON_RMS,
            muon_weight_dimension_numbers=muon_dimensions(logical_axes),
        )
    else:
        unit = optax.adafactor(
            multiply_by_parameter_scale=False,
            momentum=config.b1 or None,
            dtype_momentum=config.moment_dtype,
        )
    decay = optax.add_decayed_weights(-config.weight_decay, mask)
    return optax.chain(clip, _stored(unit, config), decay, optax.scale_by_schedule(schedule))


def state_layout(config: OptimizerConfig) -> dict[str, Any]:
    """The options that decide which arrays the optimizer's state has: a checkpoint fits these only."""
    layout: dict[str, Any] = {"name": config.name, "moment_dtype": config.moment_dtype}
    if config.name == "adafactor":
        layout["first_moment"] = config.b1 > 0
    if config.second_moment_dtype != "float32":  # absent from older checkpoints
        layout["second_moment_dtype"] = config.second_moment_dtype
    return layout


def state_shardings(
    optimizer: optax.GradientTransformation, params: Params, shardings: Params, replicated: NamedSharding
) -> Any:
    """Where each array of the optimizer's state lies.

    Moments lie beside their parameter; counts, and Adafactor's sums over a dimension, small as they are,
    everywhere.
    """
    # A moment's path ends in its parameter's.
    leaves = jax.tree.leaves_with_path(params)
    places = {path: (x.shape, s) for (path, x), s in zip(leaves, jax.tree.leaves(shardings), strict=True)}

    def place(path: Any, x: Any) -> NamedSharding:
        for start in range(len(path)):
            shape, sharding = places.get(path[start:], (None, replicated))
            if shape == x.shape:
                return sharding
        return replicated

    return jax.tree.map_with_path(place, jax.eval_shape(optimizer.init, params))


def _stored(optimizer: optax.GradientTransformation, config: OptimizerConfig) -> optax.GradientTransformation:
    return bfloat16_second_moments(optimizer) if config.second_moment_dtype == "bfloat16" else optimizer


def _is_matrix(name: str, axes: tuple[str | None, ...]) -> bool:
    return sum(axis != "layers" for axis in axes) >= 2 and not any(part in name for part in _NO_DECAY)


def _map_axes(of: Any, logical_axes: Axes) -> Params:
    return jax.tree.map_with_path(
        lambda path, axes: of(jax.tree_util.keystr(path), axes),
        logical_axes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
