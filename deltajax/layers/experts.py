"""The experts of a mixture: each token through those that were chosen for it, all of them, on any mesh."""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from deltajax.layers import expert_rows
from deltajax.layers.expert_rows import Rows, add_up, take
from deltajax.layers.parameters import INITIALIZER_RANGE, parameter
from deltajax.layers.sharding import MatrixGradient, OpSharding, op_sharding
from deltajax.ops.problem import vary_alike
from deltajax.ops.refusal import on_platforms, refuse, supporting

Kernels = tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]  # gate, up, down
_AXES = ("experts", "embed", "mlp"), ("experts", "embed", "mlp"), ("experts", "mlp", "embed")


class Experts(nnx.Module):
    """E SwiGLU layers of one size: `y_t = sum_j weight_tj * expert_{choice_tj}(x_t)`.

    No token is dropped: rows, one per token and choice, are sorted by expert and multiplied by
    `jax.lax.ragged_dot`; a few rows, no more than experts, each by a copy of its expert's matrices. The
    backward pass keeps the inputs only and makes the two middle products again, for the sorted rows are as
    many times larger as there are choices.

    On Hopper GPUs kernels multiply more rows than experts, of bfloat16 or float16 and widths that are
    multiples of 128; XLA's `ragged_dot` there makes room for every row with every expert.

    Under `shard_ops` with `experts`, a device has its own experts only. It gathers the tokens (and choices)
    of the devices it shares that axis with, adds up what its experts return for each, and the sums go back to
    where the tokens lie. An all-to-all would move fewer bytes where there are more devices than choices, but
    needs a bound on how many rows a device receives, beyond which tokens are dropped; here nothing is. The
    price: a device's sorted rows take room for all tokens of that axis, should all choose its experts.

    Args:
      hidden_size: width D.
      intermediate_size: width F of each expert.
      num_experts: E.
      initializer_range: standard deviation of the kernels.
      dtype: compute dtype; weighted sums are in float32.
      param_dtype: dtype of the kernels, stacked: gate_proj and up_proj [E, D, F], down_proj [E, F, D].
      implementation: "pallas" for the kernels, whatever the number of rows, or an error; None for the choice
        above.
      rngs: parameter randomness.

    Raises:
      ValueError: another implementation.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        initializer_range: float = INITIALIZER_RANGE,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        implementation: Literal["pallas"] | None = None,
        rngs: nnx.Rngs,
    ):
        if implementation not in ("pallas", None):
            raise ValueError(f"implementation={implementation!r}: expected 'pallas' or None")
        self.num_experts = num_experts
        self.dtype = dtype
        self.implementation = implementation
        normal = nnx.initializers.normal(initializer_range)
        wide = (num_experts, hidden_size, intermediate_size)
        self.gate_proj = parameter(normal, wide, _AXES[0], param_dtype, rngs)
        self.up_proj = parameter(normal, wide, _AXES[1], param_dtype, rngs)
        narrow = (num_experts, intermediate_size, hidden_size)
        self.down_proj = parameter(normal, narrow, _AXES[2], param_dtype, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], choice: Int[Array, "B T J"], weight: Float[Array, "B T J"]
    ) -> Float[Array, "B T D"]:
        """The weighted sum of each token's experts.

        Args:
          x: [B, T, D] input.
          choice: int32, J experts per token; `num_experts` chooses none (padding).
          weight: their weights, float32.

        Returns:
          [B, T, D] in the compute dtype.

        Raises:
          ValueError: under `shard_ops`, devices that do not divide the experts.
          NotImplementedError: "pallas", and there is no kernel for the dtype, the widths or the platform.
        """
        kernels = self.gate_proj[...], self.up_proj[...], self.down_proj[...]
        where = op_sharding()
        if where is not None and self.num_experts % where.size(where.experts):
            raise ValueError(
                f"shard_ops(experts={where.experts!r}): {self.num_experts} experts do not split over "
                f"{where.size(where.experts)} devices"
            )
        return _apply(jnp.asarray(x, self.dtype), choice, weight, kernels, where, self.implementation)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _apply(x, choice, weight, kernels: Kernels, where: OpSharding | None, implementation: str | None) -> Any:
    if where is None:
        return _forward(implementation, x, choice, weight, kernels, 0)
    places = _Places.of(where, x, kernels)

    def local(x, choice, weight, *kernels):
        x, choice, weight = (places.gather(a) for a in (x, choice, weight))
        y = _forward(implementation, x, choice, weight, places.whole(kernels, x.dtype), places.first(kernels))
        return places.scatter(y)

    return jax.shard_map(
        local,
        mesh=where.mesh,
        in_specs=(*(places.per_token for _ in range(3)), *places.kernel_specs),
        out_specs=places.per_token,
    )(x, choice, weight, *kernels)


def _apply_fwd(x, choice, weight, kernels, where, implementation):
    return _apply(x, choice, weight, kernels, where, implementation), (x, choice, weight, kernels)


def _apply_bwd(where: OpSharding | None, implementation: str | None, residuals, dy):
    x, choice, weight, kernels = residuals
    if where is None:
        dx, dweight, own = _backward(implementation, x, choice, weight, kernels, 0, dy)
        return dx, None, dweight, tuple(a.astype(b.dtype) for a, b in zip(own, kernels, strict=True))
    places = _Places.of(where, x, kernels)

    def local(x, choice, weight, dy, *kernels):
        first, dtypes = places.first(kernels), [w.dtype for w in kernels]
        x, choice, weight, dy = (places.gather(a) for a in (x, choice, weight, dy))
        whole = places.whole(kernels, x.dtype)
        dx, dweight, own = _backward(implementation, x, choice, weight, whole, first, dy)
        reduced = (g.reduce(a).astype(t) for g, a, t in zip(places.gradients, own, dtypes, strict=True))
        return places.scatter(dx), places.scatter(dweight), tuple(reduced)

    dx, dweight, d_kernels = jax.shard_map(
        local,
        mesh=where.mesh,
        in_specs=(*(places.per_token for _ in range(4)), *places.kernel_specs),
        out_specs=(places.per_token, places.per_token, places.kernel_specs),
    )(x, choice, weight, dy, *kernels)
    return dx, None, dweight, d_kernels


_apply.defvjp(_apply_fwd, _apply_bwd)


class _Places(NamedTuple):
    """Where tokens and kernels lie on a mesh.

    Attributes:
      per_token: the partition of arrays [B, T, ...].
      experts: mesh axes of the experts.
      gathered: those of them that tokens lie on too.
      summed: axes over which devices make parts of the same tokens' sums.
      gradients: of the kernels, see `MatrixGradient`.
    """

    per_token: P
    experts: tuple[str, ...]
    gathered: tuple[str, ...]
    summed: tuple[str, ...]
    gradients: tuple[MatrixGradient, ...]

    @classmethod
    def of(cls, where: OpSharding, x: Array, kernels: Kernels) -> "_Places":
        count, hidden, width = kernels[0].shape
        rows, sequence = where.token_axes(x.shape)
        spread = rows + sequence
        experts = where.dividing(where.experts, count)
        tokens = tuple(axis for axis in spread if axis not in experts)  # of the tokens a device has gathered
        embed = where.dividing(where.embed, hidden)
        embed = embed if all(axis in tokens for axis in embed) else ()  # else every device has all channels
        mlp = tuple(a for a in where.dividing(where.mlp, width) if a not in spread + experts)
        placed = {"experts": experts, "embed": embed, "mlp": mlp}
        gradients = []
        for axes in _AXES:
            placement = tuple(placed[axis] for axis in axes)
            cut = tuple(tuple(a for a in own if a not in tokens) for own in placement)
            gradients.append(MatrixGradient.of(tokens, placement, cut))
        gathered = tuple(axis for axis in experts if axis in spread)
        summed = mlp + tuple(axis for axis in experts if axis not in spread)
        return cls(P(rows or None, sequence or None), experts, gathered, summed, tuple(gradients))

    @property
    def kernel_specs(self) -> tuple[P, ...]:
        """The kernels' partitions."""
        return tuple(g.spec for g in self.gradients)

    def first(self, kernels: tuple[Array, ...]) -> Array | int:
        """The number of this device's first expert."""
        return jax.lax.axis_index(self.experts) * kernels[0].shape[0] if self.experts else 0

    def whole(self, kernels: tuple[Array, ...], dtype: DTypeLike) -> Any:
        """A device's experts in the compute dtype, with all channels of the residual stream."""
        found = []
        for kernel, gradient in zip(kernels, self.gradients, strict=True):
            kernel = kernel.astype(dtype)  # first: what is gathered is small
            for dim, axes in gradient.scattered:
                kernel = jax.lax.all_gather(kernel, axes, axis=dim, tiled=True)
            found.append(kernel)
        return tuple(found)

    def gather(self, a: Array) -> Array:
        """All tokens of the devices among which the experts are split."""
        return jax.lax.all_gather(a, self.gathered, axis=0, tiled=True) if self.gathered else a

    def scatter(self, a: Array) -> Array:
        """The sums over those devices, each with its own tokens."""
        a = jax.lax.psum(a, self.summed) if self.summed else a
        return jax.lax.psum_scatter(a, self.gathered, scatter_dimension=0, tiled=True) if self.gathered else a


def _forward(implementation: str | None, x, choice, weight, kernels, first) -> Float[Array, "B T D"]:
    return _by_platform("forward", implementation, x, choice, weight, kernels, jnp.asarray(first))


def _backward(
    implementation: str | None, x, choice, weight, kernels, first, dy
) -> tuple[Array, Array, tuple[Array, ...]]:
    """Gradients of `_forward` to x, the weights and the kernels, these in the accumulators' dtype."""
    return _by_platform("backward", implementation, x, choice, weight, kernels, jnp.asarray(first), dy)


@partial(jax.jit, static_argnums=(0, 1))
def _by_platform(half: str, implementation: str | None, x: Array, choice: Array, *args: Any) -> Any:
    """A half of the derivative, with the platform's kernels where asked for or better."""
    compute = _products if half == "forward" else _gradients
    experts, _, width = args[1][0].shape
    asked = implementation == "pallas"
    reason = expert_rows.blocks_unsupported(x, width)
    if not asked and expert_rows.few(choice.size, experts):
        reason = "few rows"
    reasons = dict.fromkeys(expert_rows.KERNEL_ROWS, reason)
    platforms = supporting(reasons, asked=asked, what="layer of experts")

    def branch(kind, x, *args):
        leaves, tree = jax.tree.flatten(compute(kind, x, *args))
        # Inside a shard_map all branches' results vary as the arguments do.
        return jax.tree.unflatten(tree, vary_alike(*leaves, *jax.tree.leaves((x, args)))[: len(leaves)])

    def without(x, *args):
        return branch(Rows, refuse(x, platforms, "layer of experts") if asked else x, *args)

    kernels = {p: partial(branch, expert_rows.KERNEL_ROWS[p]) for p in platforms}
    return on_platforms(x, choice, *args, default=without, kernels=kernels)


def _products(kind, x, choice, weight, kernels, first) -> Float[Array, "B T D"]:
    gate, up, down = (w.astype(x.dtype) for w in kernels)
    rows = kind.of(choice, first, gate.shape[0])
    own = take(rows, x, choice.shape[2])
    y = rows.times(jax.nn.silu(rows.times(own, gate)) * rows.times(own, up), down)
    y = y.astype(weight.dtype) * weight.reshape(-1)[rows.order][:, None]
    return add_up(rows, y, choice.shape).astype(x.dtype)


def _gradients(kind, x, choice, weight, kernels, first, dy) -> tuple[Array, Array, tuple[Array, ...]]:
    gate, up, down = (w.astype(x.dtype) for w in kernels)
    rows = kind.of(choice, first, gate.shape[0])
    own, dy = (take(rows, a, choice.shape[2]) for a in (x, dy))
    share = weight.reshape(-1)[rows.order][:, None]
    middle, gated = jax.vjp(lambda a, b: jax.nn.silu(a) * b, rows.times(own, gate), rows.times(own, up))
    back = rows.back(dy, down)  # of the unweighted sum
    dweight = jnp.sum(middle.astype(share.dtype) * back.astype(share.dtype), axis=1)[rows.place]
    d_gate, d_up = gated((back.astype(share.dtype) * share).astype(x.dtype))
    dx = add_up(rows, rows.back(d_gate, gate) + rows.back(d_up, up), choice.shape).astype(x.dtype)
    d_down = rows.outer((middle.astype(share.dtype) * share).astype(x.dtype), dy)
    return dx, dweight.reshape(choice.shape), (rows.outer(own, d_gate), rows.outer(own, d_up), d_down)
