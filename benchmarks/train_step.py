"""Times whole training steps of a preset on one device: tokens/s, peak memory, the loss falling.

    python -m benchmarks.train_step                          # delta_net_1p3b, 16,384 tokens a step
    python -m benchmarks.train_step --preset tiny_kda --batch 4 --seq-len 256 --steps 3 --check

Float32 parameters, the preset's compute dtype, random tokens; the median step is reported. ``--check``
fails unless every loss is finite and the last is below the first.
"""

import dataclasses
import json
import statistics
import time
from typing import Literal

import jax
import numpy as np
import tyro

from benchmarks import collectives
from benchmarks.op_times import print_profile
from deltajax.models import flops_per_token, get_preset
from train.config import OptimizerConfig, Remat
from train.mesh import ShardingRules, global_batch, make_mesh
from train.model_state import model_state
from train.optimizer import make_optimizer, make_schedule
from train.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run."""

    preset: str = "delta_net_1p3b"
    batch: int = 8
    seq_len: int = 2048
    steps: int = 8
    accumulate: int = 1
    remat: Remat = "none"
    scan_layers: bool = True
    optimizer: Literal["adamw", "muon", "adafactor"] = "adamw"
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    second_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    implementation: str | None = None
    fsdp: int = 1
    context: int = 1
    profile: int = 0
    """Print so many of the kernels of a step that take longest (NVIDIA GPUs)."""
    collectives: bool = False
    """Also measure how much of a step its collectives take (NVIDIA GPUs)."""
    check: bool = False
    json: str | None = None


def main(options: Options) -> int:
    """Runs the steps and prints one line."""
    config = dataclasses.replace(
        get_preset(options.preset),
        remat=options.remat,
        scan_layers=options.scan_layers,
        implementation=options.implementation,
    )
    mesh, rules = make_mesh(1, options.fsdp, context=options.context), ShardingRules()
    model = model_state(config, mesh, rules)
    optimizer_config = OptimizerConfig(
        name=options.optimizer,
        moment_dtype=options.moment_dtype,
        second_moment_dtype=options.second_moment_dtype,
        learning_rate=3e-4,
        warmup_steps=1,
    )
    schedule = make_schedule(optimizer_config, 1000)
    optimizer = make_optimizer(optimizer_config, schedule, model.logical_axes)
    state = model.init_train_state(optimizer, 0)
    shardings = jax.tree.map(lambda x: x.sharding, model.abstract_train_state(optimizer))
    step = make_train_step(model.model, optimizer, schedule, shardings, mesh, rules, options.accumulate)

    rng = np.random.default_rng(0)  # the same on every mesh, to compare losses
    tokens = rng.integers(0, config.vocab_size, (options.batch, options.seq_len + 1)).astype(np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones_like(tokens[:, :-1]),
    }
    batch = global_batch(batch, mesh, rules)
    ok = np.bool_(True)
    start = time.perf_counter()
    compiled = step.lower(state, batch, ok).compile()
    compile_s = time.perf_counter() - start
    losses, seconds = [], []
    for _ in range(options.steps):
        start = time.perf_counter()
        state, metrics = compiled(state, batch, ok)
        losses.append(float(metrics.loss))  # the same batch again and again: the loss must fall
        seconds.append(time.perf_counter() - start)
    device = jax.devices()[0]
    per_step = statistics.median(seconds[1:] or seconds)
    count = options.batch * options.seq_len
    memory = compiled.memory_analysis()
    stats = device.memory_stats() or {}
    row = {
        "card": device.device_kind,
        **{k: v for k, v in dataclasses.asdict(options).items() if k not in ("check", "json")},
        "parameters": model.num_parameters,
        "tokens_per_s": count / per_step,
        "tflops": flops_per_token(config, options.seq_len) * count / per_step / 1e12,
        "peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30,
        "program_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
        "compile_s": compile_s,
        "losses": losses,
    }
    print(
        f"{row['card']} {options.preset} {options.batch}x{options.seq_len} {options.optimizer} "
        f"remat={options.remat} scan={options.scan_layers} fsdp={options.fsdp} context={options.context}: "
        f"{row['parameters']:,} parameters, {row['tokens_per_s']:,.0f} tokens/s, "
        f"{row['tflops']:.0f} TFLOP/s, "
        f"peak {row['peak_gib']:.1f} GiB (program {row['program_gib']:.1f}), compile {compile_s:.0f} s, "
        f"losses {' '.join(f'{x:.4f}' for x in losses)}",
        flush=True,
    )
    if options.collectives:
        measured = collectives.measure(lambda: compiled(state, batch, ok)[1])  # the state is gone then
        if measured is not None:
            row |= {
                f"{name}_ms": x for name, x in zip(("collectives", "exposed", "busy"), measured, strict=True)
            }
            print(
                f"    collectives {measured.all:.1f} ms, {measured.exposed:.1f} of them exposed, "
                f"of {measured.busy:.1f} ms in kernels"
            )
    if options.profile:
        keeping = jax.jit(step.__wrapped__).lower(state, batch, ok).compile()  # the state can be used again
        print_profile(keeping, (state, batch, ok), options.profile, keeping.as_text())
    if options.json:
        with open(options.json, "a") as f:
            f.write(json.dumps(row) + "\n")
    good = bool(np.isfinite(losses).all() and losses[-1] < losses[0])
    if options.check:
        print("check:", "ok" if good else f"FAILED, losses {losses}")
    return 0 if good or not options.check else 1


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
