"""Runs checks that need 8 CPU devices, in a process of its own."""

import os
import subprocess
import sys


def check(module: str, *options: str, least: int) -> None:
    """Asserts that ``python -m module options`` ends well and printed at least so many lines with ok."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"  # compiles as the tests do
    run = subprocess.run(
        [sys.executable, "-m", module, *options],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert run.stdout.count("\nok ") >= least
