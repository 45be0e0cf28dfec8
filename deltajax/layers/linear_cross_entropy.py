"""The LM head and its cross entropy in one, so that the logits of all tokens never exist at once.

Per token with hidden state h, target t and kernel W (columns w_j):

    l = W^T h,   lse = log sum_j exp(l_j),   loss = lse - l_t + z_loss lse^2
    dl = (1 + 2 z_loss lse) softmax(l) - onehot(t),   dh = W dl,   dW = h dl^T

A chunk of tokens at a time has logits. When the loss is differentiated its gradients are made right there, in
the forward pass: three products with W's size in all, where making the logits again would take four.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from deltajax.layers.sharding import MatrixGradient, OpSharding, accumulator, op_sharding
from deltajax.ops.problem import vary_alike

# Numbers of logits held at a time on a device: 256 MiB in float32, enough rows to fill a chip's matrix units.
MAX_LOGITS = 2**26
_ROWS = 128  # chunks are multiples of it: a tile of every chip's matrix units


@dataclasses.dataclass(frozen=True)
class _Options:
    z_loss: float
    chunk_size: int | None
    where: OpSharding | None


def linear_cross_entropy(
    hidden: Float[Array, "*B D"],
    kernel: Float[Array, "D vocab"],
    targets: Int[Array, "*B"],
    mask: Bool[Array, "*B"] | None = None,
    *,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
) -> Float[Array, ""]:
    """The summed cross entropy of `softmax(hidden @ kernel)`, in nats, without the logits.

    Products take operands in `hidden`'s dtype and accumulate in float32; the rest is float32 (float64 if
    `hidden` is). Under `shard_ops` each device works on its own tokens and, where `vocab` lies on mesh axes
    that they do not use, on its own part of the vocabulary; only the kernel and its gradient move.

    Args:
      hidden: hidden states [tokens, D] or [rows, tokens, D]; float32, bfloat16, float16 or float64.
      kernel: the LM head, any float dtype (an embedding table's transpose, where tied).
      targets: integers in [0, vocab) where the mask is True; anything elsewhere.
      mask: which tokens count; None for all.
      z_loss: weight of the squared log normaliser added to each token's loss, which keeps logits from
        drifting (arXiv 2204.02311 uses 1e-4).
      chunk_size: tokens of a device that have logits at a time; None chooses so that they hold at most
        `MAX_LOGITS` numbers.

    Returns:
      A scalar, float32 or float64; divide by the number of tokens for the mean. Differentiable, once, in
      `hidden` and `kernel`.

    Raises:
      ValueError: on shapes, dtypes or options that do not fit, naming the argument.
    """
    _check(hidden, kernel, targets, mask, z_loss, chunk_size)
    if mask is None:
        mask = jnp.ones(targets.shape, bool)
    arrays = hidden, kernel, targets, mask
    where = op_sharding()
    if where is None:
        arrays = vary_alike(*arrays)
    return _loss(*arrays, _Options(float(z_loss), chunk_size, where))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(hidden, kernel, targets, mask, options: _Options) -> Array:
    return _compute(hidden, kernel, targets, mask, options, grads=False)[0]


def _loss_fwd(hidden, kernel, targets, mask, options):
    loss, d_hidden, d_kernel = _compute(hidden, kernel, targets, mask, options, grads=True)
    # An empty array carries the kernel's dtype.
    return loss, (d_hidden, d_kernel, jnp.zeros(0, kernel.dtype))


def _loss_bwd(options, residuals, cotangent):
    d_hidden, d_kernel, like = residuals
    d_hidden = (cotangent * d_hidden.astype(cotangent.dtype)).astype(d_hidden.dtype)
    return d_hidden, (cotangent * d_kernel).astype(like.dtype), None, None


_loss.defvjp(_loss_fwd, _loss_bwd)


def _compute(hidden, kernel, targets, mask, options: _Options, *, grads: bool) -> Any:
    """Loss and, if asked for, its gradients (the kernel's in the accumulators' dtype), else None each."""
    kernel = kernel.astype(hidden.dtype)
    if options.where is None:
        return _chunked(hidden, kernel, targets, mask, options, (), grads)
    return _sharded(hidden, kernel, targets, mask, options, options.where, grads)


def _sharded(hidden, kernel, targets, mask, options, where: OpSharding, grads) -> Any:
    """`_chunked` on every device's tokens; the kernel's gradient is summed to where the kernel lies."""
    rows, sequence = where.token_axes(targets.shape)
    spread = rows + sequence
    embed = where.dividing(where.embed, kernel.shape[0])
    vocab = where.dividing(where.vocab, kernel.shape[1])
    # Pinned where it lay, so that the rounded kernel is what a gather moves.
    kernel = jax.lax.with_sharding_constraint(
        kernel, NamedSharding(where.mesh, P(embed or None, vocab or None))
    )
    # Along an axis of the tokens a device needs the whole kernel; along others it can do with its columns.
    columns = tuple(axis for axis in vocab if axis not in spread)
    gradient = MatrixGradient.of(spread, (embed, vocab), ((), columns))

    def local(hidden, kernel, targets, mask):
        loss, d_hidden, d_kernel = _chunked(hidden, kernel, targets, mask, options, columns, grads)
        loss = jax.lax.psum(loss, spread)
        if not grads:
            return loss, None, None
        return loss, d_hidden, gradient.reduce(d_kernel)

    per_token = P(rows or None, sequence or None) if sequence else P(rows or None)
    return jax.shard_map(
        local,
        mesh=where.mesh,
        in_specs=(per_token, P(None, columns or None), per_token, per_token),
        out_specs=(P(), per_token if grads else None, gradient.spec if grads else None),
    )(hidden, kernel, targets, mask)


def _chunked(hidden, kernel, targets, mask, options: _Options, columns: tuple[str, ...], grads: bool) -> Any:
    """All chunks of a device's tokens; `columns` are the mesh axes over which the vocabulary is split."""
    D, vocab = kernel.shape
    shape, tokens = hidden.shape, targets.size
    size = _chunk_size(tokens, vocab, options.chunk_size)
    parts = -(-tokens // size)

    def cut(x: Array) -> Array:  # [*B, ...] -> [parts, size, ...]; the last chunk's end does not count
        x = x.reshape(tokens, *x.shape[targets.ndim :])
        x = jnp.pad(x, [(0, parts * size - tokens)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(parts, size, *x.shape[1:])

    dtype = accumulator(hidden.dtype)
    first = jax.lax.axis_index(columns) * vocab if columns else 0
    chunk = partial(_chunk, kernel, columns, first, options.z_loss, grads)
    chunks = (cut(hidden), cut(targets), cut(mask))
    if parts == 1:
        loss, d_hidden, d_kernel = chunk(*(x[0] for x in chunks))
    else:

        def step(d_kernel, xs):
            loss, d_hidden, d_own = chunk(*xs)
            return None if d_own is None else d_kernel + d_own, (loss, d_hidden)

        start = vary_alike(jnp.zeros((D, vocab), dtype), hidden, kernel)[0] if grads else None
        d_kernel, (losses, d_hidden) = jax.lax.scan(step, start, chunks)
        loss = jnp.sum(losses)
    if not grads:
        return loss, None, None
    return loss, d_hidden.reshape(parts * size, D)[:tokens].reshape(shape), d_kernel


def _chunk(kernel, columns, first, z_loss: float, grads: bool, hidden, targets, mask) -> Any:
    """One chunk: hidden [n, D], targets and mask [n] -> loss, d_hidden [n, D], d_kernel [D, vocab]."""
    dtype = accumulator(hidden.dtype)
    logits = jnp.matmul(hidden, kernel, preferred_element_type=dtype)  # [n, vocab]
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    if columns:
        largest = jax.lax.pmax(largest, columns)
    # A comparison rather than a gather: it fuses with the sum over the vocabulary.
    hit = jnp.arange(kernel.shape[1])[None] == (targets - first)[:, None]  # [n, vocab]
    normaliser = jnp.sum(jnp.exp(logits - largest[:, None]), axis=-1)
    picked = jnp.sum(jnp.where(hit, logits, 0), axis=-1)
    if columns:
        normaliser, picked = jax.lax.psum((normaliser, picked), columns)
    lse = largest + jnp.log(normaliser)  # [n]
    loss = jnp.sum(jnp.where(mask, lse - picked + z_loss * lse**2, 0))
    if not grads:
        return loss, None, None
    d_logits = jnp.exp(logits - lse[:, None]) * (1 + 2 * z_loss * lse)[:, None] - hit
    d_logits = jnp.where(mask[:, None], d_logits, 0).astype(hidden.dtype)
    d_kernel = jnp.einsum("nd,nv->dv", hidden, d_logits, preferred_element_type=dtype)
    d_hidden = jnp.einsum("nv,dv->nd", d_logits, kernel, preferred_element_type=dtype)
    if columns:
        d_hidden = jax.lax.psum(d_hidden, columns)
    return loss, d_hidden.astype(hidden.dtype), d_kernel


def _chunk_size(tokens: int, vocab: int, chunk_size: int | None) -> int:
    """Tokens of a chunk: as asked, else even chunks of at most `MAX_LOGITS` logits, in multiples of 128."""
    if chunk_size is not None:
        return max(1, min(chunk_size, tokens))
    limit = max(MAX_LOGITS // vocab, 1)
    if tokens <= limit:
        return max(tokens, 1)
    tile = _ROWS if limit >= _ROWS else 1
    limit -= limit % tile
    parts = -(-tokens // limit)
    return -(-tokens // (parts * tile)) * tile


def _check(hidden, kernel, targets, mask, z_loss, chunk_size) -> None:
    for name, x in (("hidden", hidden), ("kernel", kernel)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name}: expected a float dtype, got {x.dtype}")
    if hidden.ndim < 2:
        raise ValueError(f"hidden: expected shape [tokens, D] or [B, T, D], got {hidden.shape}")
    if kernel.ndim != 2 or kernel.shape[0] != hidden.shape[-1]:
        raise ValueError(
            f"kernel: expected shape [D, vocab] with D the last axis of hidden {hidden.shape}, "
            f"got {kernel.shape}"
        )
    if targets.shape != hidden.shape[:-1] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"targets: expected integers of shape {hidden.shape[:-1]}, got {targets.dtype} {targets.shape}"
        )
    if mask is not None and (mask.shape != targets.shape or mask.dtype != bool):
        raise ValueError(f"mask: expected bool of shape {targets.shape}, got {mask.dtype} {mask.shape}")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss: expected 0 or more and finite, got {z_loss}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected a positive number of tokens or None, got {chunk_size}")
