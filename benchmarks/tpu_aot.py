"""Compiles for TPUs on a host that has none: libtpu's compiler, ahead of time.

    uv run --with libtpu python ...

libtpu is not one of the project's dependencies: where it can be imported but no TPU is attached, JAX warns on
every start. It reads its flags once, so a process compiles either with a dump folder or without.
"""

import importlib.util
import math
import os
import pathlib

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# A small topology of each generation on which kernels must compile.
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")

_FLAGS = "LIBTPU_INIT_ARGS"
# The dumps that are kept: scheduled bundles with registers, the compiler's last form that still shows waits.
_DUMP_PASSES = "packed-bundles-post-ra"


def available() -> bool:
    """Whether libtpu can be imported."""
    return importlib.util.find_spec("libtpu") is not None


def environment(dump: pathlib.Path | None = None) -> dict[str, str]:
    """The variables libtpu needs on a host without TPU.

    Args:
      dump: folder for the schedule of every operation compiled.
    """
    variables = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # parallel test workers
    }
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
    if not available():
        raise RuntimeError("libtpu cannot be imported: run with `uv run --with libtpu ...`")
    wanted = environment(dump)
    if _loaded() and wanted.get(_FLAGS, "") not in os.environ.get(_FLAGS, ""):
        raise RuntimeError("libtpu is loaded and has read its flags: dump schedules from a new process")
    if _FLAGS in wanted and wanted[_FLAGS] not in os.environ.get(_FLAGS, ""):
        wanted[_FLAGS] = f"{os.environ.get(_FLAGS, '')} {wanted[_FLAGS]}".strip()
    elif _FLAGS in wanted:
        del wanted[_FLAGS]
    os.environ.update(wanted)


def _loaded() -> bool:
    maps = pathlib.Path("/proc/self/maps")
    return maps.exists() and b"libtpu.so" in maps.read_bytes()


def mesh_for(topology: str, shape: tuple[int, ...] = (1,), axes: tuple[str, ...] = ("x",)) -> Mesh:
    """A mesh over the first devices of a topology such as "v6e:16x16"."""
    prepare()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    if math.prod(shape) > len(devices):
        raise ValueError(f"mesh {shape} is larger than {topology}, which has {len(devices)} devices")
    return Mesh(np.array(devices[: math.prod(shape)]).reshape(shape), axes)


def compile_for(fn, args, topology: str | None = None, *, mesh: Mesh | None = None, shardings=None):
    """``jax.jit(fn)`` compiled for a TPU topology.

    Args:
      fn: the function, or one already jitted.
      args: its positional arguments, arrays or `jax.ShapeDtypeStruct`s; the latter keep a sharding they have.
      topology: compiles for its first device.
      mesh: a mesh of `mesh_for`, which then goes before ``topology``.
      shardings: a prefix tree of args with the sharding of each; replicated if None.

    Returns:
      The compiled program: `as_text()`, `memory_analysis()`.
    """
    if mesh is None:
        if topology is None:
            raise ValueError("give a topology or a mesh")
        mesh = mesh_for(topology)
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(sharding, tree):
        def leaf(x):
            own = getattr(x, "sharding", None) if isinstance(x, jax.ShapeDtypeStruct) else None
            return jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.result_type(x), sharding=own or sharding)

        return jax.tree.map(leaf, tree)

    args = jax.tree.map(place, replicated if shardings is None else shardings, tuple(args))
    jitted = fn if hasattr(fn, "trace") else jax.jit(fn)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jitted.trace(*args).lower(lowering_platforms=("tpu",)).compile()
