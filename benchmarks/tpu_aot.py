"""`train.tpu_aot` with the compiler's dumps, for the benchmarks and tests of single kernels.

    uv run --with libtpu python ...

libtpu reads its flags once, so a process compiles either with a dump folder or without.
"""

import os
import pathlib

from train import tpu_aot
from train.tpu_aot import available, compile_for, importlib, mesh_for

__all__ = ["TOPOLOGIES", "available", "compile_for", "environment", "importlib", "mesh_for", "prepare"]

# A small topology of each generation on which kernels must compile.
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")

_FLAGS = "LIBTPU_INIT_ARGS"
# The dumps that are kept: scheduled bundles with registers, the compiler's last form that still shows waits.
_DUMP_PASSES = "packed-bundles-post-ra"


def environment(dump: pathlib.Path | None = None) -> dict[str, str]:
    """The variables libtpu needs on a host without TPU.

    Args:
      dump: folder for the schedule of every operation compiled.
    """
    variables = tpu_aot.environment()
    if dump is not None:
        variables[_FLAGS] = (
            f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
            f" --xla_jf_dump_llo_pass_label_regex=.*{_DUMP_PASSES}.*"
        )
    return variables


def prepare(dump: pathlib.Path | None = None) -> None:
    """Sets `environment` in this process.

    Raises:
      RuntimeError: libtpu is missing, or already runs with other flags.
    """
    flags = environment(dump).get(_FLAGS, "")
    if available() and _loaded() and flags not in os.environ.get(_FLAGS, ""):
        raise RuntimeError("libtpu is loaded and has read its flags: dump schedules from a new process")
    tpu_aot.prepare()
    if flags not in os.environ.get(_FLAGS, ""):
        os.environ[_FLAGS] = f"{os.environ.get(_FLAGS, '')} {flags}".strip()


def _loaded() -> bool:
    maps = pathlib.Path("/proc/self/maps")
    return maps.exists() and b"libtpu.so" in maps.read_bytes()
