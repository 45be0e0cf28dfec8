"""Values of options that cannot work, found before anything else is done."""

import math
from typing import Any

from train.config import ConfigError, Layout, MeshConfig, TrainConfig


def check(config: TrainConfig) -> None:
    """Raises ConfigError, naming the argument, for values that cannot work."""
    positive = {
        "--steps": config.steps,
        "--data.seq-len": config.data.seq_len,
        "--data.batch-size": config.data.batch_size,
        "--optimizer.accumulate": config.optimizer.accumulate,
        "--optimizer.learning-rate": config.optimizer.learning_rate,
        "--optimizer.clip-norm": config.optimizer.clip_norm,
        "--eval.every": config.eval.every,
        "--eval.batches": config.eval.batches,
        "--sample.every": config.sample.every,
        "--checkpoint.every": config.checkpoint.every,
        "--checkpoint.keep": config.checkpoint.keep,
        "--mesh.join-within": config.mesh.join_within,
        "--mesh.lost-after": config.mesh.lost_after,
        "--log.every": config.log.every,
        "--log.trace-at": 1 if config.log.trace_at is None else config.log.trace_at,
        "--log.trace-steps": config.log.trace_steps,
        "--log.peak-tflops": 1 if config.log.peak_tflops is None else config.log.peak_tflops,
    }
    for name, value in positive.items():
        if not value > 0:
            raise ConfigError(f"argument {name}: must be positive, got {value}")
    _check_ranges(config)
    check_mesh(config.mesh)
    check_layout(config.layout, config.mesh)
    optimizer = config.optimizer
    if optimizer.name == "adafactor" and optimizer.second_moment_dtype != "float32":
        raise ConfigError(
            f"argument --optimizer.second-moment-dtype: {optimizer.second_moment_dtype}, expected float32 "
            "with adafactor, whose second moments are sums over rows and columns"
        )
    manual = (config.mesh.coordinator, config.mesh.num_processes, config.mesh.process_id)
    if any(x is not None for x in manual) and (None in manual or not config.mesh.distributed):
        raise ConfigError(
            "argument --mesh.coordinator: goes with --mesh.num-processes, --mesh.process-id and "
            "--mesh.distributed"
        )
    port = "" if config.mesh.coordinator is None else config.mesh.coordinator.rpartition(":")[2]
    if config.mesh.coordinator is not None and not (port.isdecimal() and int(port) < 2**16):
        raise ConfigError(f"argument --mesh.coordinator: must be host:port, got {config.mesh.coordinator!r}")
    if config.data.seq_len % config.mesh.context:
        raise ConfigError(
            f"argument --mesh.context: {config.mesh.context} does not divide --data.seq-len "
            f"{config.data.seq_len}"
        )
    if config.data.batch_size % config.optimizer.accumulate:
        raise ConfigError(
            f"argument --optimizer.accumulate: {config.optimizer.accumulate} does not divide "
            f"--data.batch-size {config.data.batch_size}"
        )


def check_mesh(mesh: MeshConfig) -> None:
    """Raises ConfigError for sizes of mesh axes that cannot work."""
    for name in ("fsdp", "expert", "context", "tensor"):
        if (size := getattr(mesh, name)) < 1:
            raise ConfigError(f"argument --mesh.{name}: must be positive, got {size}")
    if mesh.data != -1 and mesh.data < 1:
        raise ConfigError(f"argument --mesh.data: must be positive or -1, got {mesh.data}")


def check_layout(layout: Layout, mesh: Any) -> None:
    """Raises ConfigError for sizes of mesh axes beside a layout that chooses them."""
    sizes = {axis: getattr(mesh, axis) for axis in ("data", "fsdp", "expert", "context", "tensor")}
    given = [f"--mesh.{axis} {n}" for axis, n in sizes.items() if n != (-1 if axis == "data" else 1)]
    if layout == "auto" and given:
        raise ConfigError(f"argument {' '.join(given)}: expected none beside --layout auto, which chooses it")


def _check_ranges(config: TrainConfig) -> None:
    optimizer, held_out = config.optimizer, config.data.held_out_fraction
    ranges = {
        "--seed": (config.seed, 0 <= config.seed < 2**32, "from 0 to 2**32 - 1"),
        "--data.held-out-fraction": (held_out, 0 < held_out < 1, "between 0 and 1"),
        "--loss.z-loss": (config.loss.z_loss, 0 <= config.loss.z_loss < math.inf, "0 or more and finite"),
        "--log.gates-every": (config.log.gates_every, config.log.gates_every >= 0, "0 or more"),
        "--data.hard-window": (config.data.hard_window, config.data.hard_window >= 0, "0 or more"),
        "--data.hard-fraction": (
            config.data.hard_fraction,
            0 < config.data.hard_fraction <= 1,
            "above 0 and at most 1",
        ),
        "--data.prefetch": (config.data.prefetch, config.data.prefetch >= 0, "0 or more"),
        "--optimizer.warmup-steps": (optimizer.warmup_steps, optimizer.warmup_steps >= 0, "0 or more"),
        "--optimizer.decay-fraction": (
            optimizer.decay_fraction,
            0 < optimizer.decay_fraction <= 1,
            "above 0 and at most 1",
        ),
        "--optimizer.final-fraction": (
            optimizer.final_fraction,
            0 <= optimizer.final_fraction <= 1,
            "from 0 to 1",
        ),
        "--optimizer.b1": (optimizer.b1, 0 <= optimizer.b1 < 1, "from 0 to below 1"),
        "--optimizer.b2": (optimizer.b2, 0 <= optimizer.b2 < 1, "from 0 to below 1"),
        "--optimizer.eps": (optimizer.eps, 0 < optimizer.eps < math.inf, "positive and finite"),
        "--optimizer.weight-decay": (
            optimizer.weight_decay,
            0 <= optimizer.weight_decay < math.inf,
            "0 or more and finite",
        ),
        "--optimizer.balance-rate": (
            optimizer.balance_rate,
            0 <= optimizer.balance_rate < math.inf,
            "0 or more and finite",
        ),
        "--sample.tokens": (config.sample.tokens, config.sample.tokens >= 0, "0 or more"),
        "--sample.temperature": (
            config.sample.temperature,
            0 <= config.sample.temperature < math.inf,
            "0 or more and finite",
        ),
    }
    for name, (value, fits, expected) in ranges.items():
        if not fits:
            raise ConfigError(f"argument {name}: must be {expected}, got {value}")
