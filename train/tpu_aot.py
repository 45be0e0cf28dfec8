"""Compiles for TPUs on a host that has none: libtpu's compiler, ahead of time.

libtpu is not one of the project's dependencies: where it can be imported but no TPU is attached, JAX warns on
every start.
"""

import importlib.util
import math
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def available() -> bool:
    """Whether libtpu can be imported."""
    return importlib.util.find_spec("libtpu") is not None


def environment() -> dict[str, str]:
    """The variables libtpu needs on a host without TPU."""
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # parallel test workers
    }


def prepare() -> None:
    """Sets `environment` in this process.

    Raises:
      RuntimeError: libtpu is missing.
    """
    if not available():
        raise RuntimeError("libtpu cannot be imported: run with `uv run --with libtpu ...`")
    os.environ.update(environment())


def devices_of(topology: str) -> list[Any]:
    """The devices of a topology such as "v6e:16x16" (of tpu7x two a chip).

    Raises:
      RuntimeError: libtpu is missing.
      ValueError: libtpu knows no such topology.
    """
    prepare()
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"topology {topology!r}: {reason}") from error


def mesh_for(topology: str, shape: tuple[int, ...] = (1,), axes: tuple[str, ...] = ("x",)) -> Mesh:
    """A mesh over the first devices of a topology."""
    devices = devices_of(topology)
    if math.prod(shape) > len(devices):
        raise ValueError(f"mesh {shape} is larger than {topology}, which has {len(devices)} devices")
    return Mesh(np.array(devices[: math.prod(shape)]).reshape(shape), axes)


def compile_for(fn, args, topology: str | None = None, *, mesh: Mesh | None = None, shardings=None):
    """``jax.jit(fn)`` compiled for a TPU topology.

    Args:
      fn: the function, or one already jitted.
      args: its positional arguments, arrays or `jax.ShapeDtypeStruct`s; the latter keep a sharding they have.
      topology: compiles for its first device.
      mesh: a mesh of such devices, which then goes before ``topology``.
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
