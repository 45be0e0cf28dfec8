"""`--layout auto`: mesh sizes and a remat policy for a model, a batch and devices (docs/pod_plans.md)."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from deltajax.models import ModelConfig, count_parameters
from deltajax.models.config import REMAT
from train.config import ConfigError, OptimizerConfig, TrainConfig

# Parameters of a device: float32, with gradients and Adam's moments 1.6 GB. Finer parts would gather as much.
_PARAMETERS = 100_000_000
_EXPERT_PARTS = 16  # at most: rows travel to all devices of that axis
_FILL = 0.92  # of the memory; the rest is for what an estimate cannot see

# What a token leaves in a block for the backward pass, in values of the compute dtype: so many of the block's
# width, more where rows are spread, and so many of the MLP's. Fitted to compiled plans of delta_net_1p3b.
_SAVED = {
    "none": (17.5, 4.5, 2),
    "save_dots": (10.5, 3.0, 2),
    "save_delta_rule": (8.0, 1.5, 0),
    "full": (1.0, 0.0, 0),
}


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh's axes, and what blocks keep for the backward pass."""

    data: int
    fsdp: int
    expert: int
    context: int
    remat: str
    tensor: int = 1

    @property
    def mesh(self) -> dict[str, int]:
        """The sizes by the name of their option."""
        axes = ("data", "fsdp", "expert", "context", "tensor")
        return {axis: getattr(self, axis) for axis in axes}

    @property
    def options(self) -> dict[str, Any]:
        """The sizes to give: data takes the rest."""
        return {**self.mesh, "data": -1}

    @property
    def arguments(self) -> str:
        """The options that say the same."""
        sizes = [f"--mesh.{axis} {size}" for axis, size in self.options.items() if size > 1]
        return " ".join([*sizes, f"--model.remat {self.remat}"])


def choose(
    config: ModelConfig,
    optimizer: OptimizerConfig,
    *,
    devices: int,
    rows: int,
    seq_len: int,
    memory: int | None,
    remat: str | None = None,
) -> Layout:
    """A layout for all the devices.

    A row is spread over several devices only where there are fewer rows than devices. Parameters are split
    until a device has 100M, experts over up to 16 devices before that. The fastest remat policy whose
    estimate fits is taken, "full" if none does.

    Args:
        config: the model; its own policy stands where the memory is unknown.
        optimizer: for the size of its state, and the micro-batches.
        devices: how many.
        rows: of a step, over all devices.
        seq_len: tokens of a row.
        memory: of one device in bytes, None if unknown.
        remat: a policy that is given.

    Raises:
        ConfigError: a batch that no mesh divides.
    """
    own, left = divmod(rows, optimizer.accumulate)
    contexts = [
        c
        for c in _divisors(devices)
        if own % (devices // c) == 0 and seq_len % c == 0 and config.hidden_size % c == 0
    ]
    if left or not contexts:
        raise ConfigError(
            f"argument --layout auto: {rows} rows of {seq_len} tokens, {optimizer.accumulate} micro-batches: "
            f"expected a multiple of {devices} devices, or rows that divide over several of them each"
        )
    context = contexts[0]
    rest = devices // context
    experts = config.num_experts or 1
    expert = max(e for e in _divisors(math.gcd(rest, experts)) if e <= _EXPERT_PARTS)
    mixtures = sum(kind.mlp == "experts" for kind in config.blocks)
    routed = mixtures * experts * 3 * config.hidden_size * (config.expert_intermediate_size or 0)
    whole = count_parameters(config) - routed + routed / expert
    splits = [f for f in _divisors(rest // expert) if config.hidden_size % (f * context) == 0]
    fsdp = next((f for f in splits if whole / f <= _PARAMETERS), splits[-1])
    state = whole / (fsdp * context)
    tokens = own * seq_len // devices
    if remat is None:
        remat = config.remat
        if memory is not None:
            sizes = {
                policy: _bytes(config, optimizer, policy, state, tokens, context > 1) for policy in REMAT
            }
            remat = next((policy for policy, size in sizes.items() if size <= _FILL * memory), "full")
    return Layout(rest // (expert * fsdp), fsdp, expert, context, remat)


def laid_out(config: TrainConfig, model: ModelConfig) -> tuple[TrainConfig, Layout]:
    """A run's options with the layout for the devices that are there in place of `--layout auto`.

    Raises:
        ConfigError: as `choose`.
    """
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")  # CPUs tell of none
    layout = choose(
        model,
        config.optimizer,
        devices=len(jax.devices()),
        rows=config.data.batch_size,
        seq_len=config.data.seq_len,
        # In whole GiB, so that all processes choose alike.
        memory=None if limit is None else limit // 2**30 * 2**30,
        remat=config.model.remat,
    )
    changed = dataclasses.replace(
        config,
        layout="given",
        mesh=dataclasses.replace(config.mesh, **layout.options),
        model=dataclasses.replace(config.model, remat=layout.remat),
    )
    return changed, layout


def slower(remat: str) -> Sequence[str]:
    """The policies that need less memory."""
    return REMAT[REMAT.index(remat) + 1 :]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _bytes(
    config: ModelConfig, optimizer: OptimizerConfig, remat: str, parameters: float, tokens: int, spread: bool
) -> float:
    """An estimate of a step's memory on one device."""
    moments = {"float32": 4, "bfloat16": 2}
    first = moments[optimizer.moment_dtype]
    second = 0 if optimizer.name != "adamw" else moments[optimizer.second_moment_dtype]
    state = parameters * (4 + first + second + 4)  # with gradients
    size = 4 if config.dtype == "float32" else 2
    # Whole for a while: the tables and a layer or two, in the compute dtype, and their gradients in float32.
    tables = (1 if config.tie_embeddings else 2) * config.vocab_size * config.hidden_size
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    heads = (config.num_v_heads or config.num_heads) * (config.head_v_dim or config.head_dim)
    width = max(config.hidden_size, heads)
    if "experts" in {kind.mlp for kind in config.blocks}:
        chosen = config.experts_per_token + config.num_shared_experts
        mlp = chosen * ((config.expert_intermediate_size or 0) + config.hidden_size)
    else:
        mlp = config.intermediate_size
    of_width, of_width_spread, of_mlp = _SAVED[remat]
    saved = (of_width + of_width_spread * spread) * width + of_mlp * mlp
    working = 20 * width + 6 * mlp  # of the block that is being computed
    activations = config.num_layers * saved + (working if remat == "full" else 0)
    return state + (tables + layer) * (size + 4) + tokens * size * activations
