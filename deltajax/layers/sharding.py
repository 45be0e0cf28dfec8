"""Ops of a model whose arrays are sharded over a mesh.

XLA cannot cut a Pallas kernel in pieces by itself, nor a loop over chunks of tokens. Rows and heads are
independent of each other, so each device runs the op on its own, and devices that share a row exchange what
they must: `shard_ops` says along which mesh axes, and the layers do the rest with `jax.shard_map`. Where a
matrix's gradient is made there too, it is summed over the devices in the accumulators' dtype, straight to
where the matrix lies.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from deltajax.ops import short_convolution

Axes = None | str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class OpSharding:
    """Where rows, tokens and heads of the layers' ops lie, and the dimensions of their matrices."""

    mesh: Mesh | AbstractMesh
    batch: Axes
    heads: Axes
    sequence: str | None
    embed: Axes
    vocab: Axes
    mlp: Axes
    experts: Axes

    def size(self, axes: Axes) -> int:
        """Devices along the axes."""
        return int(np.prod([self.mesh.shape[name] for name in axis_names(axes)], dtype=int))

    def dividing(self, axes: Axes, size: int) -> tuple[str, ...]:
        """Those of the axes that split a dimension of that size; none where they do not divide it."""
        return () if size % self.size(axes) else tuple(a for a in axis_names(axes) if self.mesh.shape[a] > 1)

    def axes_of(self, logical_axis: str) -> Axes:
        """Where a matrix's dimension of that name (`layers.parameters`) lies."""
        placed = {
            "embed": self.embed,
            "heads": self.heads,
            "kv_heads": self.heads,
            "mlp": self.mlp,
            "experts": self.experts,
        }
        return placed.get(logical_axis)

    def split_sequence(self, tokens: int) -> str | None:
        """The axis that spreads a row's tokens; None where there is none or it does not divide them."""
        axis = self.sequence
        return None if axis is None or self.mesh.shape[axis] == 1 or tokens % self.mesh.shape[axis] else axis

    def token_axes(self, shape: tuple[int, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The axes of an array's rows and tokens, [B, T, ...] or [B] alone; empty where not split."""
        sequence = self.split_sequence(shape[1]) if len(shape) > 1 else None
        return self.dividing(self.batch, shape[0]), axis_names(sequence)

    def split_heads(self, count: int, what: str) -> Axes:
        """The heads' axes.

        Raises:
          ValueError: they do not divide this number of heads; ``what`` names them.
        """
        if count % self.size(self.heads):
            raise ValueError(
                f"shard_ops(heads={self.heads!r}): {count} {what} do not split over "
                f"{self.size(self.heads)} devices"
            )
        return self.heads


def axis_names(axes: Axes) -> tuple[str, ...]:
    """None, a name or several, as a tuple."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


_ACTIVE: ContextVar[OpSharding | None] = ContextVar("deltajax_op_sharding", default=None)


@contextlib.contextmanager
def shard_ops(
    mesh: Mesh | AbstractMesh,
    batch: Axes = None,
    heads: Axes = None,
    *,
    sequence: str | None = None,
    embed: Axes = None,
    vocab: Axes = None,
    mlp: Axes = None,
    experts: Axes = None,
) -> Iterator[None]:
    """While it is active, layers that are called (or traced by `jax.jit`) run their ops split over ``mesh``.

    Args:
      mesh: all its axes; along those not named below the op is repeated.
      batch: mesh axes of the rows. Rows that they do not divide are not split.
      heads: mesh axes of the heads; they must divide the number of query heads, and in attention layers that
        of key/value heads.
      sequence: mesh axis of each row's tokens (context parallelism), its devices in their order. Where it
        does not divide their number (a single token, say) they are not split. Calls with a cache are exact
        too, but exchange all tokens.
      embed, vocab, mlp: mesh axes of these dimensions of the matrices, for the sums of their gradients, and
        in the embedding's lookup and `linear_cross_entropy`; without effect where they do not divide them.
      experts: mesh axes of the experts of `MixtureOfExperts`; they must divide their number. Rows may lie on
        the same axes.
    """
    token = _ACTIVE.set(OpSharding(mesh, batch, heads, sequence, embed, vocab, mlp, experts))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def op_sharding() -> OpSharding | None:
    """What `shard_ops` says, or None where it is not active or has one device only."""
    where = _ACTIVE.get()
    return None if where is None or where.mesh.size == 1 else where


def run_op(op: Callable[..., Any], arrays: dict[str, Any], **options: Any) -> Any:
    """``op(**arrays, **options)``, split over the mesh if `shard_ops` is active.

    Args:
      op: returns o [B, T, HV, V] and a state [B, HV, K, V].
      arrays: q, k, v, beta, and g, gate, initial_state, segment_ids or None; of the ops' shapes.
      options: the op's other arguments; `axis_name` is added where `shard_ops` splits the tokens.
    """
    where = op_sharding()
    if where is None:
        return op(**arrays, **options)
    rows, sequence = where.token_axes(arrays["q"].shape)
    heads = where.split_heads(arrays["q"].shape[2], "query heads")
    if sequence:
        options["axis_name"] = where.sequence
    per_token = P(rows, sequence or None, heads)  # further axes are whole
    specs = {name: per_token for name in ("q", "k", "v", "g", "beta")}
    specs |= {"gate": P(heads), "initial_state": P(rows, heads), "segment_ids": P(rows, sequence or None)}
    given = {name: x for name, x in arrays.items() if x is not None}
    absent = {name: None for name, x in arrays.items() if x is None}
    split = jax.shard_map(
        lambda given: op(**given, **absent, **options),
        mesh=where.mesh,
        in_specs=({name: specs[name] for name in given},),
        out_specs=(per_token, P(rows, heads)),
    )
    return split(given)


def run_step(step: Callable[..., Any], arrays: dict[str, Any], **options: Any) -> Any:
    """``step(**arrays, **options)`` of one token, split over the mesh if `shard_ops` is active.

    Args:
      step: returns o [B, HV, V] and a state [B, HV, K, V].
      arrays: state, q, k, v, beta, and g, gate or None; of `ops.delta_rule_step`'s shapes.
      options: its other arguments.
    """
    where = op_sharding()
    if where is None:
        return step(**arrays, **options)
    rows, _ = where.token_axes(arrays["q"].shape[:1])
    heads = where.split_heads(arrays["q"].shape[1], "query heads")
    given = {name: x for name, x in arrays.items() if x is not None}
    absent = {name: None for name, x in arrays.items() if x is None}
    row_and_head = P(rows or None, heads)  # further axes are whole
    split = jax.shard_map(
        lambda given: step(**given, **absent, **options),
        mesh=where.mesh,
        in_specs=({name: P(heads) if name == "gate" else row_and_head for name in given},),
        out_specs=(row_and_head, row_and_head),
        check_vma=False,  # a kernel that works in place is not allowed inside otherwise
    )
    return split(given)


def run_attention(
    attend: Callable[..., Array],
    arrays: tuple[Array, ...],
    places: tuple[str, ...],
    segment_ids: Int[Array, "B T"] | None,
    head_counts: dict[str, int],
) -> Array:
    """``attend(*arrays, segment_ids, axis_name)``, split over the mesh if `shard_ops` is active.

    Args:
      attend: returns [B, T, H, V]; of a device's own tokens and heads, given the axis that spreads the tokens
        or None.
      arrays: the first is [B, T, H, ...].
      places: what each array's dimensions are, in order: "rows", "sequence", "heads" or "whole", with blanks
        between.
      segment_ids: of the rows, or None.
      head_counts: numbers that the heads' axes must divide, by what an error calls them.
    """
    where = op_sharding()
    if where is None:
        return attend(*arrays, segment_ids, None)
    heads: Axes = None
    for name, count in head_counts.items():
        heads = where.split_heads(count, name)
    rows, sequence = (axes or None for axes in where.token_axes(arrays[0].shape))
    axes = {"rows": rows, "sequence": sequence, "heads": heads, "whole": None}
    ids = () if segment_ids is None else (segment_ids,)

    def local(*given):
        own_ids = given[len(arrays)] if ids else None
        return attend(*given[: len(arrays)], own_ids, where.sequence if sequence else None)

    return jax.shard_map(
        local,
        mesh=where.mesh,
        in_specs=(
            *(P(*(axes[name] for name in place.split())) for place in places),
            *(P(rows, sequence) for _ in ids),
        ),
        out_specs=P(rows, sequence, heads),
    )(*arrays, *ids)


def run_convolution(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D W"],
    *,
    segment_ids: Int[Array, "B T"] | None,
    cache: Float[Array, "B W1 D"] | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W1 D"]]:
    """`short_convolution`, split over the mesh as `shard_ops` says; with a cache, tokens are not."""
    where = op_sharding()
    if where is None:
        return short_convolution(x, weight, segment_ids=segment_ids, cache=cache)
    rows, sequence = where.token_axes(x.shape)
    sequence = () if cache is not None else sequence
    channels = where.dividing(where.heads, x.shape[2]) or None
    per_token, per_row = P(rows or None, sequence or None), P(rows or None, None, channels)
    given = {"segment_ids": (segment_ids, per_token), "cache": (cache, per_row)}
    given = {name: pair for name, pair in given.items() if pair[0] is not None}
    split = jax.shard_map(
        lambda x, weight, others: short_convolution(
            x, weight, axis_name=where.sequence if sequence else None, **others
        ),
        mesh=where.mesh,
        in_specs=(P(*per_token, channels), P(channels), {name: spec for name, (_, spec) in given.items()}),
        out_specs=(P(*per_token, channels), per_row),
    )
    return split(x, weight, {name: array for name, (array, _) in given.items()})


def shard_tokens(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """``x`` with its rows and tokens where `shard_ops` says and its channels whole.

    Between blocks it keeps XLA from carrying the layout of a matrix into the residual stream.
    """
    where = op_sharding()
    if where is None:
        return x
    spec = P(*(axes or None for axes in where.token_axes(x.shape)))
    return jax.lax.with_sharding_constraint(x, NamedSharding(where.mesh, spec))


def accumulator(dtype: DTypeLike) -> Any:
    """The dtype that products of matrices in ``dtype`` are summed in: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)


@dataclasses.dataclass(frozen=True)
class MatrixGradient:
    """How the gradient of a matrix, made by every device for its own tokens, gets to where the matrix lies.

    Attributes:
      scattered: dimensions that lie on axes of the tokens, with these axes.
      summed: the tokens' other axes.
      spec: where the matrix's gradient lies then.
    """

    scattered: tuple[tuple[int, tuple[str, ...]], ...]
    summed: tuple[str, ...]
    spec: P

    @classmethod
    def of(
        cls, tokens: tuple[str, ...], placement: tuple[tuple[str, ...], ...], cut: tuple[tuple[str, ...], ...]
    ) -> "MatrixGradient":
        """Of a matrix with that placement, of which a device makes the gradient cut along the axes `cut`."""
        scattered = tuple((dim, x) for dim, x in enumerate(placement) if x and all(a in tokens for a in x))
        own: list[Any] = [x or None for x in cut]
        for dim, x in scattered:
            own[dim] = x
        summed = tuple(a for a in tokens if not any(a in x for _, x in scattered))
        return cls(scattered, summed, P(*own))

    def reduce(self, gradient: Array) -> Array:
        """Inside `jax.shard_map`: a device's part of the sum over all of them."""
        for dim, axes in self.scattered:
            # One axis after the other, the outermost part first: TPUs sum whole where parts would be thin.
            for axis in axes:
                gradient = jax.lax.psum_scatter(gradient, axis, scatter_dimension=dim, tiled=True)
        return jax.lax.psum(gradient, self.summed)
