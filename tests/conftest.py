"""Settings for every test, the first of them made before JAX is imported."""

import gc
import os
import pathlib
import time

# Most programs here run once or twice: compiling them is the cost, so compile them quickly.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

import jax
import pytest

# Tracing makes objects by the million, and few of them are garbage of cycles: look for it less often.
gc.set_threshold(20_000, 20, 20)

# Every compiled CPU program holds some hundred memory maps, of which Linux grants a process 65,530: beyond
# that the compiler crashes.
MAX_MAPS = 30_000
# Reading them all takes up to 30 ms, more than most tests do; what a second compiles is some thousand.
SECONDS_BETWEEN_LOOKS = 1.0
_MAPS = pathlib.Path("/proc/self/maps")
_looked = time.monotonic()


@pytest.fixture(autouse=True)
def few_memory_maps():
    """Drops compiled programs before they use up the process's memory maps."""
    global _looked
    yield
    if time.monotonic() - _looked < SECONDS_BETWEEN_LOOKS:
        return
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > MAX_MAPS:
        jax.clear_caches()
        gc.collect()  # programs in cycles of references
    _looked = time.monotonic()
