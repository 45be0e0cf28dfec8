"""Delta-rule ops of a model whose arrays are sharded over a mesh.

XLA cannot cut a Pallas kernel in pieces by itself. Rows and heads are independent of each other, so each
device runs the op on its own: `shard_ops` says along which mesh axes, and the layers do the rest with
`jax.shard_map`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

Axes = None | str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class OpSharding:
    """Where the rows and heads of the layers' ops lie."""

    mesh: Mesh | AbstractMesh
    batch: Axes
    heads: Axes

    def size(self, axes: Axes) -> int:
        """Devices along the axes."""
        names = () if axes is None else (axes,) if isinstance(axes, str) else axes
        return int(np.prod([self.mesh.shape[name] for name in names], dtype=int))


_ACTIVE: ContextVar[OpSharding | None] = ContextVar("deltajax_op_sharding", default=None)


@contextlib.contextmanager
def shard_ops(mesh: Mesh | AbstractMesh, batch: Axes = None, heads: Axes = None) -> Iterator[None]:
    """While it is active, layers that are called (or traced by `jax.jit`) run their ops split over ``mesh``.

    Args:
      mesh: all its axes; along those not named below the op is repeated.
      batch: mesh axes of the rows. Rows that they do not divide are not split.
      heads: mesh axes of the heads; they must divide the number of query heads.
    """
    token = _ACTIVE.set(OpSharding(mesh, batch, heads))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def run_op(op: Callable[..., Any], arrays: dict[str, Any], **options: Any) -> Any:
    """``op(**arrays, **options)``, split over the mesh if `shard_ops` is active.

    Args:
      op: returns o [B, T, HV, V] and a state [B, HV, K, V].
      arrays: q, k, v, beta, and g, gate, initial_state, segment_ids or None; of the ops' shapes.
      options: the op's other arguments.
    """
    where = _ACTIVE.get()
    if where is None or where.mesh.size == 1:
        return op(**arrays, **options)
    rows, heads = where.batch, where.heads
    batch = arrays["q"].shape[0]
    if batch % where.size(rows):
        rows = None
    if arrays["q"].shape[2] % where.size(heads):
        raise ValueError(
            f"shard_ops(heads={heads!r}): {arrays['q'].shape[2]} query heads do not split over "
            f"{where.size(heads)} devices"
        )
    per_token = P(rows, None, heads)  # further axes are whole
    specs = {name: per_token for name in ("q", "k", "v", "g", "beta")}
    specs |= {"gate": P(heads), "initial_state": P(rows, heads), "segment_ids": P(rows)}
    given = {name: x for name, x in arrays.items() if x is not None}
    absent = {name: None for name, x in arrays.items() if x is None}
    split = jax.shard_map(
        lambda given: op(**given, **absent, **options),
        mesh=where.mesh,
        in_specs=({name: specs[name] for name in given},),
        out_specs=(per_token, P(rows, heads)),
    )
    return split(given)
