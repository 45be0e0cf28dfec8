"""The Hopper kernels as an implementation of the op: from `Inputs` and `Options` to `pallas_kernels.gpu`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deltajax.ops import chunked, gates, segments
from deltajax.ops.problem import Inputs, Options
from pallas_kernels.gpu import delta_rule
from pallas_kernels.gpu.tiles import CHUNK

# exp of it is 0 in float32 beside any other term, and a chunk's sum of 64 keeps three digits of its exponent.
MIN_LOG_DECAY = -100.0
HEAD_SIZES = (64, 128)
HALF = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))

backward = chunked.backward


def unsupported(inputs: Inputs, options: Options) -> str | None:
    """Why the kernels cannot run this call, or None if they can."""
    dtypes = {x.dtype for x in (inputs.q, inputs.k, inputs.v)}
    if len(dtypes) != 1 or not dtypes <= set(HALF):
        return f"q, k and v must be all bfloat16 or all float16, got {', '.join(sorted(map(str, dtypes)))}"
    if (K := inputs.q.shape[-1]) > HEAD_SIZES[-1]:
        return f"head size K is at most {HEAD_SIZES[-1]}, got {K}"
    if options.num_segments is not None:
        return "num_segments is not supported, only segment_ids that reset the state"
    if options.chunk_size not in (None, CHUNK):
        return f"chunk_size is {CHUNK}, got {options.chunk_size}"
    if options.gate_kind == "channel":
        return "per-channel gates are not supported yet"
    return None


def forward(inputs: Inputs, options: Options) -> tuple[Float[Array, "B T HV V"], Array]:
    """Outputs and final state; see `unsupported` for what it takes."""
    q, k, v = inputs.q, inputs.k, inputs.v
    T, V, K = v.shape[1], v.shape[-1], q.shape[-1]
    beta = inputs.beta.astype(jnp.float32)  # [B, T, HV]
    g = _log_decay(inputs, options)
    if inputs.segment_ids is not None:
        real = inputs.segment_ids != 0

        def keep(x):
            return jnp.where(real.reshape(real.shape + (1,) * (x.ndim - 2)), x, 0)

        q, k, v, beta = keep(q), keep(k), keep(v), keep(beta)
        reset = segments.resets(inputs.segment_ids)[..., None]  # [B, T, 1]
        g = jnp.zeros_like(beta) if g is None else keep(g)
        g = jnp.where(reset, MIN_LOG_DECAY, g)

    q, k, v = _pad(q, 8, HEAD_SIZES), _pad(k, 8, HEAD_SIZES), _pad(v, 8, None)
    state = inputs.initial_state
    if state is not None:  # transposed, [B, HV, V, K]
        state = jnp.pad(
            state.astype(jnp.float32).mT,
            ((0, 0), (0, 0), (0, v.shape[-1] - V), (0, q.shape[-1] - K)),
        )
    o, state = delta_rule.forward(
        q, k, v, beta, g, state, normalize=options.normalize_qk, scale=options.scale
    )
    return o[:, :T, :, :V], state[:, :, :V, :K].mT


def _log_decay(inputs: Inputs, options: Options) -> Array | None:
    """Activated per-head log decay in float32, at least `MIN_LOG_DECAY`."""
    if inputs.g is None:
        return None
    g = inputs.g.astype(jnp.float32)
    if inputs.A_log is not None:
        g = gates.activate(g, inputs.A_log, inputs.dt_bias, options.lower_bound, per_channel=False)
    return jnp.maximum(g, MIN_LOG_DECAY)


def _pad(x: jax.Array, multiple: int, sizes: tuple[int, ...] | None) -> jax.Array:
    """[B, T, H, D] with zeros up to a multiple of T and up to one of the sizes (or a multiple of 64) of D."""
    T, D = x.shape[1], x.shape[3]
    size = -(-D // 64) * 64 if sizes is None else min(s for s in sizes if s >= D)
    return jnp.pad(x, ((0, 0), (0, -T % multiple), (0, 0), (0, size - D)))
