"""The ops inside `jax.shard_map` on 8 CPU devices, in a process of its own."""

import os
import subprocess
import sys


def test_sharded_ops_equal_unsharded_ones_in_outputs_states_and_gradients():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.sharded_checks"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert run.stdout.count("\nok ") >= 29
