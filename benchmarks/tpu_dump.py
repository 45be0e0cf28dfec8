"""Compiling for TPUs (`train.tpu_aot`) with libtpu's dumps of every operation's schedule.

libtpu reads its flags once, so a process compiles either with a dump folder or without.
"""

import os
import pathlib

from train import tpu_aot

_FLAGS = "LIBTPU_INIT_ARGS"
# The dumps that are kept: scheduled bundles with registers, the compiler's last form that still shows waits.
_DUMP_PASSES = "packed-bundles-post-ra"


def prepare(dump: pathlib.Path) -> None:
    """Prepares this process to compile, dumping to the folder ``dump``.

    Raises:
      RuntimeError: libtpu is missing, or already runs with other flags.
    """
    tpu_aot.prepare()
    flags = (
        f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        f" --xla_jf_dump_llo_pass_label_regex=.*{_DUMP_PASSES}.*"
    )
    given = os.environ.get(_FLAGS, "")
    if flags in given:
        return
    if _loaded():
        raise RuntimeError("libtpu is loaded and has read its flags: dump schedules from a new process")
    os.environ[_FLAGS] = f"{given} {flags}".strip()


def _loaded() -> bool:
    maps = pathlib.Path("/proc/self/maps")
    return maps.exists() and b"libtpu.so" in maps.read_bytes()
