"""The training step of a pod that is not there: compiled ahead of time, never run, and measured."""

import math
import re
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from deltajax.models import ModelConfig, flops_per_token
from train import program, tpu_aot
from train.config import OptimizerConfig
from train.mesh import ShardingRules
from train.model_state import ModelState, model_state
from train.objective import next_token
from train.optimizer import make_optimizer, make_schedule
from train.program import Traffic
from train.step import make_train_step

# Memory of one device (a chip; of tpu7x, one of its two halves), GiB, from the vendor's data sheets.
HBM_GIB = {"v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 96}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        parameters, optimizer, batch: the step's arguments, as they are sharded.
        padding: what their layouts add; 0 where the compiler gave up.
        outputs: results that do not take an argument's place; 0 where the compiler gave up.
        temporaries: activations, gathered parameters, gradients; None where it gave up and did not say.
        total: all of these, as far as known.
        hbm: what a device has.
        over: the compiler's own words, where the step does not fit.
    """

    parameters: int
    optimizer: int
    batch: int
    padding: int
    outputs: int
    temporaries: int | None
    total: int
    hbm: int
    over: str | None = None

    @property
    def fits(self) -> bool:
        """Whether the compiler found room for everything."""
        return self.over is None and self.total <= self.hbm


@dataclass(frozen=True)
class PodStep:
    """A training step for a pod.

    Attributes:
        model: its parameters' shapes and places.
        mesh: devices of the topology.
        memory: of one device.
        collectives: kind -> executions and bytes of one device in one step; empty where it does not fit.
        kernels: Pallas kernel -> executions on one device in one step.
        flops: model FLOPs of a step on all devices (`deltajax.models.flops_per_token`).
        text: the compiled program; empty where it does not fit.
    """

    model: ModelState
    mesh: Mesh
    memory: Memory
    collectives: dict[str, Traffic]
    kernels: dict[str, int]
    flops: float
    text: str = field(repr=False)


def compile_step(
    config: ModelConfig,
    optimizer_config: OptimizerConfig,
    mesh: Mesh,
    *,
    batch: int,
    seq_len: int,
    z_loss: float = 0.0,
) -> PodStep:
    """Compiles the step that `train` would run.

    Args:
        config: the model.
        optimizer_config: optimizer, schedule, micro-batches.
        mesh: the trainer's axes over devices of `train.tpu_aot.devices_of`.
        batch: rows of a step, over all devices.
        seq_len: tokens of a row.
        z_loss: see `train.objective`.

    Raises:
        RuntimeError: libtpu is missing.
        ValueError: sizes that the mesh does not divide, naming them.
    """
    tpu_aot.prepare()
    rules = ShardingRules()
    parts = rules.parts(mesh, "batch")
    if batch % (parts * optimizer_config.accumulate):
        raise ValueError(
            f"batch {batch}: expected a multiple of {parts} devices x {optimizer_config.accumulate} "
            "micro-batches"
        )
    if seq_len % (context := rules.parts(mesh, "sequence")):
        raise ValueError(f"seq_len {seq_len}: expected a multiple of --mesh.context {context}")
    model = model_state(config, mesh, rules)
    schedule = make_schedule(optimizer_config, 1000)
    optimizer = make_optimizer(optimizer_config, schedule, model.logical_axes)
    state = model.abstract_train_state(optimizer)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(
        model.model,
        optimizer,
        schedule,
        shardings,
        mesh,
        rules,
        optimizer_config.accumulate,
        next_token(z_loss),
        optimizer_config.balance_rate,
    )
    tokens = jax.ShapeDtypeStruct((batch, seq_len), jnp.int32, sharding=rules.tokens(mesh))
    data = dict.fromkeys(("tokens", "targets", "segment_ids"), tokens)
    arguments: dict[str, Any] = dict(
        parameters=device_bytes(state.params),
        optimizer=device_bytes((state.opt_state, state.step)),
        batch=device_bytes(data),
    )
    hbm = HBM_GIB[_generation(mesh)] * 2**30
    flops = flops_per_token(config, seq_len) * batch * seq_len
    try:
        compiled = tpu_aot.compile_for(step, (state, data, jax.ShapeDtypeStruct((), jnp.bool_)), mesh=mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        memory = _exceeded(str(error), arguments, hbm)
        return PodStep(model, mesh, memory, {}, {}, flops, "")
    found, text = compiled.memory_analysis(), compiled.as_text()
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    memory = Memory(
        **arguments,
        padding=found.argument_size_in_bytes - sum(arguments.values()),
        outputs=outputs,
        temporaries=found.temp_size_in_bytes,
        total=found.argument_size_in_bytes + outputs + found.temp_size_in_bytes,
        hbm=hbm,
    )
    return PodStep(model, mesh, memory, program.collectives(text), program.kernels(text), flops, text)


def _exceeded(message: str, arguments: dict[str, Any], hbm: int) -> Memory:
    """What the compiler says when it finds no room: in its words and, where they can be read, in bytes."""
    said = next((line for line in message.splitlines() if "hbm" in line.lower()), message.splitlines()[0])
    temporaries, total = _size(r"temporaries \(", said), _size(r"[Uu]sed ", said)
    if total is None:
        total = sum(arguments.values()) + (temporaries or 0)
    return Memory(
        **arguments,
        padding=0,
        outputs=0,
        temporaries=temporaries,
        total=total,
        hbm=hbm,
        over=said.strip(),
    )


def _size(before: str, text: str) -> int | None:
    """Bytes of a size such as 21.50G after `before`, or None."""
    found = re.search(before + r"([\d.]+)([KMG])", text)
    return int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[found[2]]) if found else None


def device_bytes(tree: Any) -> int:
    """Of a tree of sharded shapes, on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _generation(mesh: Mesh) -> str:
    kinds = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}
    kind = mesh.devices.flat[0].device_kind
    return kinds.get(kind, kind.removeprefix("TPU ").lower())
