"""The device mesh, and the rules that place logical axes on it."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deltajax.layers import shard_ops
from deltajax.layers.sharding import axis_names
from deltajax.models import ModelConfig
from train.config import MeshConfig

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
# A logical axis lies on no mesh axis (replicated), on one, or on several.
Placement = None | str | tuple[str, ...]


@dataclass(frozen=True)
class ShardingRules:
    """Which mesh axes each logical axis is split over; None replicates it.

    Parameters are split over "fsdp" and "context", whose devices hold different tokens, along their embedding
    dimension, of which every large matrix has exactly one; what has none (decay rates, convolution taps, the
    second matrices of low-rank projections in KDA's gates and latent attention) is small and not split there.
    Over "tensor" go heads, the MLP's width and the
    vocabulary: of the parameters, and of the activations between a block's first matrices and its last.
    Over "expert" go the experts of a mixture, while other parameters have a copy there; routers are whole on
    every device. Activations are split along the batch and, over "context", along the sequence.
    """

    batch: Placement = ("data", "fsdp", "expert")
    sequence: str | None = "context"
    embed: Placement = ("fsdp", "context")
    vocab: Placement = "tensor"
    heads: Placement = "tensor"
    kv_heads: Placement = "tensor"
    head_dim: Placement = None
    latent: Placement = None
    mlp: Placement = "tensor"
    experts: Placement = "expert"
    router: Placement = None
    conv: Placement = None
    layers: Placement = None

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
            for axis in axis_names(placement):
                if axis in used:
                    raise ValueError(
                        f"{where}: logical axes {used[axis]!r} and {name!r} both lie on mesh axis {axis!r}"
                    )
                used[axis] = str(name)
            placements.append(placement)
        return PartitionSpec(*placements)

    def shard_ops(self, mesh: Mesh) -> contextlib.AbstractContextManager[None]:
        """While active, layers split their ops and the loss over the mesh as these rules place them."""
        return shard_ops(
            mesh,
            self.batch,
            self.heads,
            sequence=self.sequence,
            embed=self.embed,
            vocab=self.vocab,
            mlp=self.mlp,
            experts=self.experts,
        )

    def tokens(self, mesh: Mesh) -> NamedSharding:
        """Where a batch's arrays [B, T] lie."""
        return NamedSharding(mesh, self.spec(("batch", "sequence")))

    def parts(self, mesh: Mesh, logical_axis: str) -> int:
        """How many parts a mesh cuts that axis into."""
        return math.prod(mesh.shape[axis] for axis in axis_names(getattr(self, logical_axis)))

    def check_model(self, config: ModelConfig, mesh: Mesh) -> None:
        """Raises ValueError where the mesh does not divide a model's heads, MLPs, experts or vocabulary."""
        sizes: dict[tuple[str, str], int] = {}
        kinds = {kind.mlp for kind in config.blocks}
        if "dense" in kinds:
            sizes |= {("intermediate_size", "mlp"): config.intermediate_size}
        if "experts" in kinds:
            sizes |= {
                ("num_experts", "experts"): config.num_experts or 0,
                ("expert_intermediate_size", "mlp"): config.expert_intermediate_size or 0,
            }
        elif (parts := self.parts(mesh, "experts")) > 1:
            raise ValueError(f"argument --mesh.expert {parts}: the model's layers have no experts")
        sizes |= {("vocab_size", "vocab"): config.vocab_size}
        if config.has_delta:
            sizes |= {("num_heads", "heads"): config.num_heads}
        if config.has_attention:
            sizes |= {
                ("attn_num_heads", "heads"): config.attention_heads,
                ("attn_num_kv_heads", "kv_heads"): config.attention_kv_heads,
            }
        if config.has_latent_attention:
            sizes |= {("attn_num_heads", "heads"): config.attention_heads}
        for (field, axis), size in sizes.items():
            if size % (parts := self.parts(mesh, axis)):
                flags = ", ".join(
                    f"--mesh.{name} {mesh.shape[name]}" for name in axis_names(getattr(self, axis))
                )
                raise ValueError(
                    f"argument {flags}: expected a divisor of the model's {field} {size}, which it cuts into "
                    f"{parts} parts"
                )

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
            parts = 1 if name is None else self.parts(mesh, name)
            if shape[dim] % parts:
                axes = " x ".join(repr(axis) for axis in axis_names(placement) if mesh.shape[axis] > 1)
                raise ValueError(
                    f"{where}: dimension {dim} ({name}) of shape {shape} is not divisible by mesh "
                    f"axis {axes} of size {parts}"
                )
        return NamedSharding(mesh, spec)


def make_mesh(
    data: int,
    fsdp: int,
    devices: Sequence[Any] | None = None,
    *,
    expert: int = 1,
    context: int = 1,
    tensor: int = 1,
) -> Mesh:
    """A [data, fsdp, expert, context, tensor] mesh over the available devices.

    Args:
        data: copies of the parameters; -1 takes every device left over by the others.
        fsdp: parts that parameters and optimizer state are split into.
        devices: None for `jax.devices()`.
        expert: parts that the experts are split into.
        context: parts that each row's tokens are split into.
        tensor: parts that heads, MLP and vocabulary are split into, of parameters and of activations.

    Raises:
        ValueError: sizes that do not fit the number of devices. A single process may leave devices
            idle; several processes must use all of them.
    """
    devices = jax.devices() if devices is None else devices
    others = (fsdp, expert, context, tensor)
    if min(others) < 1 or (data < 1 and data != -1):
        sizes = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, (data, *others), strict=True))
        raise ValueError(f"mesh sizes must be positive (or data -1), got {sizes}")
    if data == -1:
        data = max(1, len(devices) // math.prod(others))
    # Tensor parallelism communicates most and comes last: its devices are the nearest neighbours.
    shape = (data, *others)
    wanted = math.prod(shape)
    if wanted > len(devices) or (jax.process_count() > 1 and wanted != len(devices)):
        sizes = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True))
        raise ValueError(f"mesh {sizes} needs {wanted} devices, found {len(devices)}")
    if wanted == len(devices):
        # Neighbours in the mesh are neighbours in the pod; an axis may take a part of one of the pod's.
        grid = create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.array(devices[:wanted]).reshape(shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_of(options: MeshConfig) -> Mesh:
    """`make_mesh` of the sizes in a run's options."""
    return make_mesh(**{axis: getattr(options, axis) for axis in MESH_AXES})


def data_group(mesh: Mesh, rules: ShardingRules) -> tuple[int, int]:
    """Which share of a batch's rows this process reads, and how many shares there are.

    Processes whose devices hold the same rows (parts of their tokens or heads) read the same share.

    Raises:
        ValueError: processes that hold some rows, but not all, in common.
    """
    parts = _row_parts(mesh, rules)
    groups = sorted({tuple(own) for own in parts.values()})
    if sum(map(len, groups)) != rules.parts(mesh, "batch"):
        sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        raise ValueError(
            f"argument --mesh: {sizes} over {len(parts)} processes: some hold the same rows only in "
            "part; expected sizes that place a row on as few processes as possible"
        )
    return groups.index(tuple(parts[jax.process_index()])), len(groups)


def _row_parts(mesh: Mesh, rules: ShardingRules) -> dict[int, list[int]]:
    """Process -> which of the parts of a batch's rows its devices hold, in order."""
    axes = axis_names(rules.batch)
    sizes = [mesh.shape[axis] for axis in axes]
    parts: dict[int, set[int]] = {}
    for place, device in np.ndenumerate(mesh.devices):
        at = dict(zip(mesh.axis_names, place, strict=True))
        part = np.ravel_multi_index([at[axis] for axis in axes], sizes) if axes else 0
        parts.setdefault(device.process_index, set()).add(int(part))
    return {process: sorted(own) for process, own in parts.items()}


@functools.cache  # asked for every batch, of a pod's many devices
def _own_parts(mesh: Mesh, rules: ShardingRules) -> list[int]:
    return _row_parts(mesh, rules)[jax.process_index()]


def global_batch(batch: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    """The rows of this process's group (see `data_group`), whole -> global arrays, split over the mesh."""
    sharding = rules.tokens(mesh)
    own, count = _own_parts(mesh, rules), rules.parts(mesh, "batch")

    def place(x: Any) -> jax.Array:
        size = len(x) // len(own)  # rows of a part

        def part(index: Any) -> Any:
            first = own.index((index[0].start or 0) // size) * size
            return x[(slice(first, first + size), *index[1:])]

        return jax.make_array_from_callback((count * size, *x.shape[1:]), sharding, part)

    return {name: place(x) for name, x in batch.items()}
