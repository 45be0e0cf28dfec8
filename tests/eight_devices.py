"""Runs checks that need 8 CPU devices, in a process of its own."""

import os
import subprocess
import sys

# XLA's newer way to emit fusions takes more than half of compiling such programs; code of the older one, kept
# beside it, is far slower, which counts only where programs are larger than these.
OLDER_FUSIONS = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
FLAGS = f"--xla_force_host_platform_device_count=8 {OLDER_FUSIONS}"


def check(module: str, *options: str, least: int) -> None:
    """Asserts that ``python -m module options`` ends well and printed at least so many lines with ok."""
    flags = f"{os.environ['XLA_FLAGS']} {FLAGS}"  # compiles as the tests do, and quicker
    run = subprocess.run(
        [sys.executable, "-m", module, *options],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert run.stdout.count("\nok ") >= least
