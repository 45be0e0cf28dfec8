"""The mixers under `shard_ops` on 8 CPU devices, their tokens and heads spread, in a process of its own."""

import os
import subprocess
import sys


def test_mixers_spread_over_devices_equal_one_devices_in_outputs_and_gradients():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    run = subprocess.run(
        [sys.executable, "-m", "tests.layers.sharded_mixers"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert run.stdout.count("\nok ") >= 19
