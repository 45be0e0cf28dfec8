"""Settings for every test, the first of them made before JAX is imported."""

import os
import pathlib

# Most programs here run once or twice: compiling them is the cost, so compile them quickly.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

import jax
import pytest

# Every compiled CPU program holds some hundred memory maps, of which Linux grants a process 65,530: beyond
# that the compiler crashes.
MAX_MAPS = 30_000
_MAPS = pathlib.Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def few_memory_maps():
    """Drops compiled programs before they use up the process's memory maps."""
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > MAX_MAPS:
        jax.clear_caches()
