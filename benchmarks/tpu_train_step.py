"""Compiles a preset's whole training step for a TPU pod that is not there: memory, kernels, collectives.

    uv run --with libtpu python -m benchmarks.tpu_train_step --topology v5p:8x8x8 --preset delta_net_1p3b

Compiled, never run: memory is what the compiler assigns to each device, bytes of collectives are those of
each device's results.
"""

import collections
import dataclasses
import math
import re
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

from benchmarks import tpu_aot
from deltajax.models import ModelConfig, get_preset
from train.config import OptimizerConfig
from train.mesh import MESH_AXES, ShardingRules
from train.model_state import model_state
from train.optimizer import make_optimizer, make_schedule
from train.step import make_train_step

# Memory of one device (a chip; of v7x, one of its two), GiB.
HBM = {"v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 96}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile."""

    topology: str = "v5p:8x8x8"
    preset: str = "delta_net_1p3b"
    rows: int = 1  # of each device
    seq_len: int = 4096
    fsdp: int = 16  # parts of the parameters; all other devices hold copies
    devices: int | None = None  # all of the topology's
    remat: Literal["none", "full"] = "full"
    layers: int | None = None  # fewer than the preset's
    implementation: str | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiled step is made of.

    Attributes:
      kernels: Pallas kernel -> calls in the text (a loop's body counts once).
      collectives: kind -> (number in the text, bytes of their results on one device).
      memory: bytes of one device: arguments (parameters, optimizer state, batch), outputs that are
        not donated arguments, temporaries.
      hbm: bytes of one device of this generation.
      text: the program.
    """

    kernels: dict[str, int]
    collectives: dict[str, tuple[int, int]]
    arguments: int
    outputs: int
    temp: int
    hbm: int
    text: str = dataclasses.field(repr=False)

    @property
    def total(self) -> int:
        """Bytes of one device that the step needs."""
        return self.arguments + self.outputs + self.temp


def compile_step(config: ModelConfig, options: Options) -> Any:
    """The training step of ``options`` as `train` makes it, compiled."""
    tpu_aot.prepare()
    count = options.devices or math.prod(map(int, options.topology.split(":")[1].split("x")))
    mesh = tpu_aot.mesh_for(options.topology, (count // options.fsdp, options.fsdp), MESH_AXES)
    rules = ShardingRules()
    model = model_state(config, mesh, rules)
    optimizer_config = OptimizerConfig(learning_rate=3e-4, warmup_steps=1)
    schedule = make_schedule(optimizer_config, 1000)
    optimizer = make_optimizer(optimizer_config, schedule, model.logical_axes)
    state = model.abstract_train_state(optimizer)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(model.model, optimizer, schedule, shardings, mesh, rules)
    rows = jax.sharding.NamedSharding(mesh, rules.spec(("batch",)))
    tokens = jax.ShapeDtypeStruct((count * options.rows, options.seq_len), jnp.int32, sharding=rows)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids"), tokens)
    return tpu_aot.compile_for(step, (state, batch, jax.ShapeDtypeStruct((), jnp.bool_)), mesh=mesh)


_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (?P<type>\(.*?\)|\S+) (?P<operation>[\w\-]+)\(")
_KERNEL = re.compile(r'kernel_name\W+(\w+)|op_name="[^"]*?(delta_rule_\w+)')


def _bytes(type_: str) -> int:
    """Of the largest array of a result type: an asynchronous start names its operand too."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", type_)
    return max(
        (BYTES.get(t, 4) * math.prod(map(int, filter(None, d.split(",")))) for t, d in arrays), default=0
    )


def report(compiled: Any, topology: str) -> Report:
    """Reads a compiled step."""
    text, memory = compiled.as_text(), compiled.memory_analysis()
    kernels: collections.Counter = collections.Counter()
    collectives: dict[str, tuple[int, int]] = {}
    for line in text.splitlines():
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        operation = found["operation"].removesuffix("-start")
        if operation in COLLECTIVES:
            n, size = collectives.get(operation, (0, 0))
            collectives[operation] = n + 1, size + _bytes(found["type"])
        if operation == "custom-call" and "tpu_custom_call" in line:
            name = _KERNEL.search(line)
            kernels[next(filter(None, name.groups())) if name else "other"] += 1
    return Report(
        dict(kernels),
        collectives,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temp=memory.temp_size_in_bytes,
        hbm=HBM[topology.split(":")[0]] * 2**30,
        text=text,
    )


def main(options: Options) -> int:
    """Compiles and prints; 1 if the step has no kernel or does not fit."""
    config = dataclasses.replace(
        get_preset(options.preset), remat=options.remat, implementation=options.implementation
    )
    if options.layers is not None:
        config = dataclasses.replace(config, num_layers=options.layers)
    start = time.perf_counter()
    found = report(compile_step(config, options), options.topology)
    gib = lambda n: f"{n / 2**30:.2f} GiB"  # noqa: E731
    print(f"{options.preset} for {options.topology}, {options.rows} x {options.seq_len} tokens a device:")
    print(f"  compiled in {time.perf_counter() - start:.0f} s")
    print(
        f"  memory of one device: {gib(found.total)} of {gib(found.hbm)}"
        f" (arguments {gib(found.arguments)}, temporary {gib(found.temp)}, outputs {gib(found.outputs)})"
    )
    print(f"  kernels: {', '.join(f'{name} x {n}' for name, n in found.kernels.items()) or 'none'}")
    for kind, (n, size) in found.collectives.items():
        print(f"  {kind}: {n}, results {size / 2**20:.1f} MiB")
    good = bool(found.kernels) and found.total < found.hbm
    print("  fits, with kernels" if good else "  FAILED: no kernel, or more memory than there is")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
