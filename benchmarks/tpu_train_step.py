"""The compiled training step of `train.plan`, by rows of each device: what the compile tests ask of it."""

import dataclasses

from deltajax.models import ModelConfig
from train.config import OptimizerConfig
from train.mesh import make_mesh
from train.pod_step import PodStep
from train.pod_step import compile_step as compile_for_mesh
from train.tpu_aot import devices_of


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile."""

    topology: str
    preset: str
    rows: int = 1  # of each device
    seq_len: int = 4096
    fsdp: int = 16  # parts of the parameters; all other devices hold copies


@dataclasses.dataclass(frozen=True)
class Report:
    """Kernel -> executions, bytes of one device that are needed and there, and the program."""

    kernels: dict[str, int]
    total: int
    hbm: int
    text: str = dataclasses.field(repr=False)


def compile_step(config: ModelConfig, options: Options) -> PodStep:
    """The step on all devices of the topology."""
    mesh = make_mesh(-1, options.fsdp, devices_of(options.topology))
    rows = mesh.size * options.rows
    return compile_for_mesh(config, OptimizerConfig(), mesh, batch=rows, seq_len=options.seq_len)


def report(step: PodStep, topology: str) -> Report:
    """Of a compiled step; the topology is its mesh's."""
    return Report(step.kernels, step.memory.total, step.memory.hbm, step.text)
