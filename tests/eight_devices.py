"""Runs checks that need 8 CPU devices, in a process of its own."""

import os
import subprocess
import sys


def check(module: str, least: int) -> None:
    """Asserts that ``python -m module`` ends well and printed at least so many lines beginning with ok."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    run = subprocess.run(
        [sys.executable, "-m", module],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert run.stdout.count("\nok ") >= least
