"""The device mesh, and the rules that place logical axes on it."""

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deltajax.layers import shard_ops

MESH_AXES = ("data", "fsdp")
# A logical axis lies on no mesh axis (replicated), on one, or on several.
Placement = None | str | tuple[str, ...]


@dataclass(frozen=True)
class ShardingRules:
    """Which mesh axes each logical axis is split over; None replicates it.

    Parameters are split over "fsdp" along their embedding dimension, of which every large matrix has exactly
    one; what has none (decay rates, convolution taps, KDA's low-rank gate) is small and stays whole.
    Activations are split along the batch.
    """

    batch: Placement = ("data", "fsdp")
    embed: Placement = "fsdp"
    vocab: Placement = None
    heads: Placement = None
    kv_heads: Placement = None
    head_dim: Placement = None
    mlp: Placement = None
    conv: Placement = None
    layers: Placement = None
    experts: Placement = None

    def spec(self, logical_axes: tuple[str | None, ...], where: str = "array") -> PartitionSpec:
        """The partition of an array whose dimensions carry these logical names (None replicates).

        Raises:
            ValueError: an unknown name, or two dimensions that would split over the same mesh axis;
                `where` names the array in the message.
        """
        known = {field.name for field in dataclasses.fields(self)}
        placements: list[Placement] = []
        used: dict[str, str] = {}
        for name in logical_axes:
            if name is not None and name not in known:
                raise ValueError(f"{where}: unknown logical axis {name!r}; known: {', '.join(sorted(known))}")
            placement = None if name is None else getattr(self, name)
            for axis in _axes(placement):
                if axis in used:
                    raise ValueError(
                        f"{where}: logical axes {used[axis]!r} and {name!r} both lie on mesh axis {axis!r}"
                    )
                used[axis] = str(name)
            placements.append(placement)
        return PartitionSpec(*placements)

    def shard_ops(self, mesh: Mesh) -> contextlib.AbstractContextManager[None]:
        """While active, layers split their ops and the loss over the mesh as these rules place them."""
        return shard_ops(mesh, self.batch, self.heads, embed=self.embed, vocab=self.vocab)

    def sharding(
        self, mesh: Mesh, logical_axes: tuple[str | None, ...], shape: tuple[int, ...], where: str = "array"
    ) -> NamedSharding:
        """`spec` on a mesh, for an array of that shape.

        Raises:
            ValueError: as `spec`; or the mesh does not divide a dimension. (Replicating such an array
                instead would quietly cost the memory that sharding is there to save.)
        """
        spec = self.spec(logical_axes, where)
        for dim, (name, placement) in enumerate(zip(logical_axes, spec, strict=True)):
            parts = int(np.prod([mesh.shape[axis] for axis in _axes(placement)], dtype=int))
            if shape[dim] % parts:
                raise ValueError(
                    f"{where}: dimension {dim} ({name}) of shape {shape} is not divisible by mesh "
                    f"axis {placement!r} of size {parts}"
                )
        return NamedSharding(mesh, spec)


def _axes(placement: Placement) -> tuple[str, ...]:
    return () if placement is None else (placement,) if isinstance(placement, str) else placement


def make_mesh(data: int, fsdp: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A [data, fsdp] mesh over the available devices.

    Args:
        data: copies of the parameters; -1 takes every device left over by `fsdp`.
        fsdp: parts that parameters and optimizer state are split into.
        devices: None for `jax.devices()`.

    Raises:
        ValueError: sizes that do not fit the number of devices. A single process may leave devices
            idle; several processes must use all of them.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or (data < 1 and data != -1):
        raise ValueError(f"mesh sizes must be positive (or data -1), got data={data}, fsdp={fsdp}")
    if data == -1:
        data = max(1, len(devices) // fsdp)
    wanted = data * fsdp
    if wanted > len(devices) or (jax.process_count() > 1 and wanted != len(devices)):
        raise ValueError(f"mesh data={data} x fsdp={fsdp} needs {wanted} devices, found {len(devices)}")
    if wanted == len(devices):
        # Neighbours in the mesh are neighbours in the pod; an axis may take a part of one of the pod's.
        grid = create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)
    else:
        grid = np.array(devices[:wanted]).reshape(data, fsdp)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 2)


def global_batch(batch: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    """This process's rows of a batch -> global arrays, their first dimension split over the mesh."""
    sharding = NamedSharding(mesh, rules.spec(("batch",)))
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}
