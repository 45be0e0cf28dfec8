"""Compiles one decoding step of a model for a TPU slice that is not there: memory, collectives, kernels.

    uv run --with libtpu python -m train.decode_plan --topology v5p:2x2x1 --preset kimi_linear_48b_a3b \\
        --batch 64 --length 4096 --mesh.expert 4

A step takes one token of every sequence and the caches, which it overwrites, and gives the likeliest next
tokens.
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import NamedSharding, PartitionSpec

from deltajax.models import get_preset
from train import program, tpu_aot
from train.config import Preset
from train.mesh import ShardingRules, make_mesh
from train.model_state import model_state
from train.plan import MeshShape
from train.pod_step import HBM_GIB, device_bytes


@dataclass(frozen=True)
class DecodePlan:
    """Compile a decoding step for a TPU slice, without one."""

    topology: str
    """the slice, such as v5p:2x2x1 or v6e:2x4"""
    batch: int
    """sequences, over all devices"""
    length: int
    """tokens that the caches have room for"""
    preset: Preset = "kimi_linear_48b_a3b"
    """the model"""
    param_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """of the parameters"""
    mesh: MeshShape = field(default_factory=MeshShape)


@dataclass(frozen=True)
class DecodeStep:
    """Bytes on one device; its collectives and kernels in one step; the compiled program."""

    parameters: int
    cache: int
    updated: int  # of the arguments, overwritten by results
    temporaries: int
    total: int
    hbm: int
    collectives: dict[str, program.Traffic]
    kernels: dict[str, int]
    text: str = field(repr=False)


def compile_decode(plan: DecodePlan) -> DecodeStep:
    """Compiles the step.

    Raises:
        RuntimeError: libtpu is missing.
        ValueError: a topology that is none, or sizes that do not go together, named.
        jax.errors.JaxRuntimeError: it does not fit; the compiler says by how much.
    """
    generation = plan.topology.partition(":")[0]
    if generation not in HBM_GIB:
        raise ValueError(
            f"argument --topology: {plan.topology!r}, expected one of {', '.join(HBM_GIB)} and a shape"
        )
    if plan.length < 1:
        raise ValueError(f"argument --length: must be positive, got {plan.length}")
    mesh = make_mesh(**dataclasses.asdict(plan.mesh), devices=tpu_aot.devices_of(plan.topology))
    rules = ShardingRules()
    parts = rules.parts(mesh, "batch")
    if plan.batch < 1 or plan.batch % parts:
        raise ValueError(f"argument --batch: expected a multiple of {parts} devices, got {plan.batch}")
    config = dataclasses.replace(get_preset(plan.preset), param_dtype=plan.param_dtype)
    model = model_state(config, mesh, rules)
    params = model.abstract_params()
    rows = rules.spec((None, "batch"))  # a cache's arrays are [layers, B, ...]
    cache = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, rows)),
        jax.eval_shape(lambda params: model.model(params).init_cache(plan.batch, plan.length), params),
    )
    batch = NamedSharding(mesh, PartitionSpec(rows[1]))
    tokens = jax.ShapeDtypeStruct((plan.batch, 1), jnp.int32, sharding=batch)

    def step(params, tokens, cache):
        with rules.shard_ops(mesh):
            decoder = model.model(params)
            hidden, cache = decoder.hidden_states(tokens, cache=cache)
            return jnp.argmax(decoder.logits(hidden), axis=-1), cache

    places = batch, jax.tree.map(lambda x: x.sharding, cache)
    jitted = jax.jit(step, donate_argnums=2, out_shardings=places)
    compiled = tpu_aot.compile_for(jitted, (params, tokens, cache), mesh=mesh)
    found, text = compiled.memory_analysis(), compiled.as_text()
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    return DecodeStep(
        parameters=device_bytes(params),
        cache=device_bytes(cache),
        updated=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        total=found.argument_size_in_bytes + outputs + found.temp_size_in_bytes,
        hbm=HBM_GIB[generation] * 2**30,
        collectives=program.collectives(text),
        kernels=program.kernels(text),
        text=text,
    )


def main(args: Sequence[str] | None = None) -> int:
    """Compiles, prints and returns the exit status."""
    plan = tyro.cli(DecodePlan, prog="python -m train.decode_plan", args=args)
    logging.getLogger("jax").setLevel(logging.ERROR)  # it warns of TPUs that are not there
    jax.config.update("jax_platforms", "cpu")
    try:
        step = compile_decode(plan)
    except (ValueError, RuntimeError) as error:  # the compiler's are RuntimeErrors
        print(f"error: {str(error)[:2000]}", file=sys.stderr)
        return 2
    print(
        f"{plan.preset}, {plan.batch} sequences of up to {plan.length} tokens, {plan.topology}: GiB a device"
    )
    for name in ("parameters", "cache", "updated", "temporaries", "total", "hbm"):
        print(f"  {name:12s} {getattr(step, name) / 2**30:8.3f}")
    for kind, traffic in step.collectives.items():
        print(f"  {kind}: {traffic.count}, {traffic.bytes / 2**20:.2f} MiB")
    print("  kernels: " + (", ".join(f"{name} {n}" for name, n in step.kernels.items()) or "none"))
    return 0 if step.total <= step.hbm else 1


if __name__ == "__main__":
    sys.exit(main())
