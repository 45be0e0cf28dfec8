"""Latent attention of one new token a sequence: a kernel that reads the cache once, or plain JAX."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from deltajax.layers.sharding import op_sharding
from deltajax.ops import pallas_gpu
from deltajax.ops.problem import vary_alike
from deltajax.ops.refusal import on_platforms
from pallas_kernels.gpu.limits import CHUNK, SHARED_KEY

PLATFORMS = ("cuda",)  # that programs may be lowered for with the kernel

# (q, latent, length) -> o, as `attend_held` has them.
Plain = Callable[[Array, Array, Array], Array]


class _Call(NamedTuple):
    plain: Plain
    rank: int
    scale: float
    platforms: tuple[str, ...]


def attend_held(
    q: Float[Array, "B 1 H C+R"],
    latent: Float[Array, "B L C+R"],
    length: Int[Array, " B"],
    *,
    rank: int,
    scale: float,
    plain: Plain,
) -> Float[Array, "B 1 H C"]:
    """Attention of one token a row to the latents that the row's slots hold, its own among them.

    Lowered for a Hopper GPU, a kernel runs where it takes the call, each device having its rows and heads if
    `shard_ops` is active; everywhere else `plain`.

    Args:
      q: [B, 1, H, C + R].
      latent: [B, L, C + R]: key of all heads; the first C channels are their value, too.
      length: int32 [B], tokens seen so far.
      rank: C.
      scale: multiplies the logits.
      plain: the same in JAX, of the first three arguments, also for the derivative.
    """
    call = _Call(plain, rank, scale, () if _unsupported(q, latent, rank) else PLATFORMS)
    where = op_sharding()
    if where is None or not call.platforms:
        return _attend(call, q, latent, length)
    rows, _ = where.token_axes(q.shape[:1])
    heads = where.dividing(where.heads, q.shape[2]) or None
    per_head = P(rows or None, None, heads)
    split = jax.shard_map(
        functools.partial(_attend, call),
        mesh=where.mesh,
        in_specs=(per_head, P(rows or None), P(rows or None)),
        out_specs=per_head,
        check_vma=False,  # kernels are not allowed inside otherwise
    )
    return split(q, latent, length)


def _unsupported(q: Array, latent: Array, rank: int) -> str | None:
    """Why the kernel cannot run here, or None if it can."""
    if q.dtype != latent.dtype or q.dtype not in pallas_gpu.HALF:
        return f"q and the latents must be both bfloat16 or both float16, got {q.dtype} and {latent.dtype}"
    shared = latent.shape[2] - rank
    if shared != SHARED_KEY or rank % 128 or rank > 512:
        return f"channels must be 128, 256, 384 or 512 and 64 of the shared key, got {rank} and {shared}"
    if latent.shape[1] < CHUNK:
        return f"a cache must have {CHUNK} slots, got {latent.shape[1]}"
    if any(jax.typeof(x).manual_axis_type.varying for x in (q, latent)):
        return "inside jax.shard_map it needs check_vma=False"
    return pallas_gpu.other_gpu()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, q: Array, latent: Array, length: Array) -> Array:
    if not call.platforms:
        return call.plain(q, latent, length)

    def kernel(q, latent, length):
        from pallas_kernels.gpu import latent_decode  # here: Mosaic GPU is slow to import

        o = latent_decode.attend(q[:, 0], latent, length, rank=call.rank, scale=call.scale)
        return vary_alike(o[:, None], q)[0]

    @jax.custom_batching.custom_vmap
    def dispatched(q, latent, length):
        kernels = dict.fromkeys(call.platforms, kernel)
        return on_platforms(q, latent, length, default=call.plain, kernels=kernels)

    @dispatched.def_vmap
    def _many(n, batched, *given):  # a mapped axis joins the rows
        arrays = [x if b else jnp.broadcast_to(x, (n, *x.shape)) for x, b in zip(given, batched, strict=True)]
        o = dispatched(*(x.reshape(-1, *x.shape[2:]) for x in arrays))
        return o.reshape(n, -1, *o.shape[1:]), True

    return dispatched(q, latent, length)


def _forward(call: _Call, *arrays: Array) -> tuple[Array, Any]:
    return _attend(call, *arrays), arrays


def _backward(call: _Call, arrays: Any, do: Array) -> Any:
    q, latent, length = arrays
    return *jax.vjp(lambda q, latent: call.plain(q, latent, length), q, latent)[1](do), None


_attend.defvjp(_forward, _backward)
