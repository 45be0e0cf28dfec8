"""`python -m train.plan`: whether a training step fits a TPU pod, and what it moves, from any machine.

    uv run --with libtpu python -m train.plan --topology v5p:8x8x8 --preset delta_net_1p3b \
        --batch 512 --seq-len 8192 --mesh.fsdp 64 --model.remat save_dots

Compiles, for the whole pod, the step that `python -m train` would run there with the same `--model`,
`--optimizer` and `--loss` options. The exit status is 0 if it fits, 1 if not, 2 for options that cannot work.
"""

import dataclasses
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console
from rich.table import Table

from deltajax.models import ModelConfig, count_active_parameters, get_preset
from train import tpu_aot
from train.config import (
    ConfigError,
    DataConfig,
    Layout,
    LossConfig,
    ModelOptions,
    OptimizerConfig,
    Preset,
    TrainConfig,
    model_config,
)
from train.config_checks import check, check_layout
from train.layout import choose, slower
from train.mesh import make_mesh
from train.metrics import peak_flops
from train.pod_step import HBM_GIB, PodStep, compile_step

_WIDTH = 100


@dataclass(frozen=True)
class MeshShape:
    """How the pod's devices share the work."""

    data: int = -1
    """copies of the model; -1 takes the devices that the others leave"""
    fsdp: int = 1
    """parts that parameters and optimizer state are split into"""
    expert: int = 1
    """parts that the experts of a mixture are split into; divides their number"""
    context: int = 1
    """parts that each row's tokens are split into (context parallelism); divides their number"""
    tensor: int = 1
    """parts that heads, MLP and vocabulary are split into"""


@dataclass(frozen=True)
class Plan:
    """Compile a training step for a TPU pod, without one: memory, collectives, FLOPs, and whether it fits."""

    topology: str
    """the slice, such as v5e:16x16, v5p:8x8x8, v6e:16x16 or tpu7x:4x4x4"""
    batch: int
    """rows per step, over all devices"""
    preset: Preset = "delta_net_1p3b"
    """the model"""
    seq_len: int = 8192
    """tokens per row"""
    vocab_size: int | None = None
    """entries of the tokenizer; none means the preset's"""
    output: Path | None = None
    """file to write the report to as well"""
    layout: Layout = "given"
    """auto: mesh sizes and, unless given, --model.remat by model size, batch, devices and their memory; where
    the compiler finds no room, the next smaller remat"""
    mesh: MeshShape = field(default_factory=MeshShape)
    model: ModelOptions = field(default_factory=ModelOptions)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


def make(plan: Plan) -> PodStep:
    """Compiles the planned step.

    Raises:
        ConfigError: options that cannot work, named.
        RuntimeError: libtpu is missing.
    """
    generation = plan.topology.partition(":")[0]
    if generation not in HBM_GIB:
        raise ConfigError(
            f"argument --topology: {plan.topology!r}, expected one of {', '.join(HBM_GIB)} and a shape, "
            "as in v5e:16x16"
        )
    sizes = {"--batch": plan.batch, "--seq-len": plan.seq_len, "--vocab-size": plan.vocab_size}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ConfigError(f"argument {name}: must be positive, got {size}")
    run = TrainConfig(
        preset=plan.preset,
        model=plan.model,
        loss=plan.loss,
        optimizer=plan.optimizer,
        data=DataConfig(batch_size=plan.optimizer.accumulate),  # its own sizes are checked against the mesh
    )
    check(run)
    check_layout(plan.layout, plan.mesh)
    config = model_config(run, plan.vocab_size or get_preset(plan.preset).vocab_size)
    try:
        devices = tpu_aot.devices_of(plan.topology)
        if plan.layout == "given":
            return _compiled(plan, config, dataclasses.asdict(plan.mesh), _whole(plan, devices))
        layout = choose(
            config,
            plan.optimizer,
            devices=len(devices),
            rows=plan.batch,
            seq_len=plan.seq_len,
            memory=HBM_GIB[generation] * 2**30,
            remat=plan.model.remat,
        )
        rest = [] if plan.model.remat else slower(layout.remat)
        for remat in (layout.remat, *rest):
            step = _compiled(plan, config.replace(remat=remat), layout.mesh, devices)
            if step.memory.fits:
                break
        return step
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error


def _compiled(plan: Plan, config: ModelConfig, sizes: Mapping[str, int], devices: list[Any]) -> PodStep:
    mesh = make_mesh(**sizes, devices=devices)
    batch, seq_len, z_loss = plan.batch, plan.seq_len, plan.loss.z_loss
    return compile_step(config, plan.optimizer, mesh, batch=batch, seq_len=seq_len, z_loss=z_loss)


def _whole(plan: Plan, devices: list[Any]) -> list[Any]:
    """The devices, all of which the mesh has to use: a slice is paid for whole."""
    sizes = dataclasses.asdict(plan.mesh)
    data = sizes.pop("data")
    others = math.prod(sizes.values())
    used = others * (data if data != -1 else max(len(devices) // max(others, 1), 1))
    if used > 0 and used != len(devices):  # `make_mesh` refuses sizes that are not positive
        raise ConfigError(
            f"argument --mesh: {_shape({'data': data, **sizes})} is {used} devices, expected all "
            f"{len(devices)} of {plan.topology}"
        )
    return devices


def _shape(sizes: Mapping[str, int]) -> str:
    """A mesh's axes; those beside data and fsdp only where they are used."""
    used = {axis: size for axis, size in sizes.items() if axis in ("data", "fsdp") or size != 1}
    return " x ".join(f"{axis} {size}" for axis, size in used.items())


def show(plan: Plan, step: PodStep, console: Console) -> None:
    """Prints the report."""
    shape = _shape(step.mesh.shape)
    tokens = plan.batch * plan.seq_len
    active, total = count_active_parameters(step.model.config), step.model.num_parameters
    console.print(
        f"{plan.preset}: {total:,} parameters{f' ({active:,} active)' if active != total else ''}, "
        f"{plan.optimizer.name}, remat "
        f"{step.model.config.remat}, {plan.optimizer.accumulate} micro-batch(es)\n"
        f"{plan.topology}: {step.mesh.size} devices as {shape}; {plan.batch} rows x {plan.seq_len} = "
        f"{tokens:,} tokens a step"
    )
    if plan.layout == "auto":
        sizes = " ".join(f"--mesh.{a} {n}" for a, n in step.mesh.shape.items() if n > 1 and a != "data")
        console.print(f"chosen: {f'{sizes} ' if sizes else ''}--model.remat {step.model.config.remat}")
    console.print(_memory(step))
    if step.collectives:
        console.print(_collectives(step))
    if step.memory.over is None:
        ran = ", ".join(f"{name} x {n}" for name, n in sorted(step.kernels.items()))
        console.print(f"Pallas kernels: {ran or 'none'}")
    console.print(_flops(step))
    if step.memory.over is not None:
        console.print(f"the compiler: {step.memory.over}")
    console.print("fits" if step.memory.fits else "does not fit")


def _memory(step: PodStep) -> Table:
    memory = step.memory
    table = Table(title="Memory of one device", title_justify="left")
    for name in ("", "GiB", "share of HBM"):
        table.add_column(name, justify="left" if not name else "right")
    known = memory.over is None
    rows = {
        "parameters": memory.parameters,
        "optimizer state": memory.optimizer,
        "batch": memory.batch,
        "padding of their layouts": memory.padding if known else None,
        "temporaries (activations, gathered parameters, gradients)": memory.temporaries,
        "outputs that replace no argument": memory.outputs if known else None,
    }
    for name, size in rows.items():
        table.add_row(name, *_of(size, memory.hbm))
    table.add_section()
    table.add_row("total", *_of(memory.total, memory.hbm))
    table.add_row("HBM", *_of(memory.hbm, memory.hbm))
    return table


def _of(size: int | None, hbm: int) -> tuple[str, str]:
    return ("unknown", "") if size is None else (f"{size / 2**30:.3f}", f"{size / hbm:.1%}")


def _collectives(step: PodStep) -> Table:
    table = Table(title="Collectives of one device in one step", title_justify="left")
    for name in ("kind", "executions", "MiB"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for kind, traffic in step.collectives.items():
        table.add_row(kind, f"{traffic.count:,}", f"{traffic.bytes / 2**20:,.1f}")
    table.add_section()
    total = sum(traffic.bytes for traffic in step.collectives.values())
    count = sum(traffic.count for traffic in step.collectives.values())
    table.add_row("all", f"{count:,}", f"{total / 2**20:,.1f}")
    return table


def _flops(step: PodStep) -> str:
    own = step.flops / step.mesh.size
    text = f"model FLOPs of a step: {step.flops:.3e}, {own:.3e} on each device"
    kind = step.mesh.devices.flat[0].device_kind
    if peak := peak_flops(kind):
        text += f"; {own / peak * 1e3:,.0f} ms at its peak of {peak / 1e12:,.0f} TFLOP/s"
    return text


def main(args: Sequence[str] | None = None) -> int:
    """Plans, prints and returns the exit status."""
    plan = tyro.cli(Plan, prog="python -m train.plan", args=args)
    logging.getLogger("jax").setLevel(logging.ERROR)  # it warns of TPUs that are not there
    jax.config.update("jax_platforms", "cpu")
    start = time.perf_counter()
    try:
        step = make(plan)
    except (ConfigError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(width=_WIDTH, highlight=False, record=plan.output is not None)
    show(plan, step, console)
    if plan.output is not None:
        plan.output.write_text(console.export_text())
    console.print(f"(compiled in {time.perf_counter() - start:.0f} s)")
    return 0 if step.memory.fits else 1


if __name__ == "__main__":
    sys.exit(main())
