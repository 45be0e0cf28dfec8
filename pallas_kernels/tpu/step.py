"""One token of the recurrence on a TPU: the state is read once and written once, in place.

Grid (rows, blocks of heads). A head's state is a [K, V] tile, keys in sublanes and values in lanes, that the
vector unit updates while Pallas fetches the next block.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.config import block_heads
from pallas_kernels.tpu.gates import LN2, log2_softplus
from pallas_kernels.tpu.launch import VMEM_LIMIT


def step(
    state: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    g: jax.Array | None,
    rate: jax.Array | None,
    dt_bias: jax.Array | None,
    *,
    lower_bound: float | None,
    normalize: bool,
    scale: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Outputs and the new state.

    Args:
      state: [B, HV, K, V], in place where the caller donates it; K and V multiples of 64.
      q, k: [B, H, K], HV a multiple of H.
      v: [B, HV, V].
      beta: [B, HV].
      g: log decay, or raw where ``rate`` is given: [B, HV, K], [B, HV, 1] (never raw) or None.
      rate, dt_bias: [HV, K] float32 of the gate's activation, exp(A_log) and the bias, or None.
      lower_bound: of the gate.
      normalize: L2-normalise q and k.
      scale: multiplies q.
      interpret: False, or the `InterpretParams` to run with.

    Returns:
      o [B, HV, V] in v's dtype, the state in its own.
    """
    B, HV = state.shape[:2]
    heads = block_heads(q.shape[1], HV)

    def of_row(x: Any) -> Any:
        n = heads * x.shape[1] // HV
        return pl.BlockSpec((1, n, *x.shape[2:]), lambda b, h: (b, h) + (0,) * (x.ndim - 2))

    def of_heads(x: Any) -> Any:
        return None if x is None else pl.BlockSpec((heads, x.shape[1]), lambda b, h: (h, 0))

    arrays = (state, q, k, v, beta[:, :, None], g)
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays if x is not None))
    kind = jax.sharding.ManualAxisType(varying=varying)
    return pl.pallas_call(
        partial(_body, lower_bound=lower_bound, normalize=normalize, scale=scale),
        grid=(B, HV // heads),
        in_specs=[*(None if x is None else of_row(x) for x in arrays), of_heads(rate), of_heads(dt_bias)],
        out_specs=(of_row(v), of_row(state)),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=kind) for x in (v, state)),
        input_output_aliases={0: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret,
        name="delta_step",
    )(*arrays, rate, dt_bias)


def _body(
    state_ref, q_ref, k_ref, v_ref, beta_ref, g_ref, rate_ref, dt_bias_ref, o_ref, out_ref, *, lower_bound,
    normalize, scale,
):  # fmt: skip
    q, k = q_ref[0].astype(jnp.float32), k_ref[0].astype(jnp.float32)  # [key heads, K]
    v, beta = v_ref[0].astype(jnp.float32), beta_ref[0].astype(jnp.float32)
    if normalize:
        q, k = (x * lax.rsqrt(jnp.sum(x * x, axis=1, keepdims=True) + 1e-6) for x in (q, k))
    decay = None
    if g_ref is not None:
        g = g_ref[0].astype(jnp.float32)
        if rate_ref is not None:
            g, rate = g + dt_bias_ref[...], rate_ref[...]
            unbounded = lower_bound is None
            g = -rate * LN2 * log2_softplus(g) if unbounded else lower_bound * jax.nn.sigmoid(rate * g)
        decay = jnp.exp(g)
    # Columns of keys: transposed together, one lane a head.
    q, k = q.T * scale, k.T
    if decay is not None and decay.shape[1] > 1:
        columns = decay.T
        factors = [columns[:, h : h + 1] for h in range(decay.shape[0])]  # [K, 1] of each head
    elif decay is not None:
        factors = [decay[h : h + 1] for h in range(decay.shape[0])]  # [1, 1]
    heads = v.shape[0]
    group = heads // q.shape[1]
    out = []
    for h in range(heads):
        S = state_ref[0, h].astype(jnp.float32)
        if decay is not None:
            S = S * factors[h]
        column = k[:, h // group : h // group + 1]
        u = (v[h : h + 1] - jnp.sum(column * S, axis=0, keepdims=True)) * beta[h : h + 1]
        S = S + column * u
        out_ref[0, h] = S.astype(out_ref.dtype)
        out.append(jnp.sum(q[:, h // group : h // group + 1] * S, axis=0, keepdims=True))
    o_ref[0] = jnp.concatenate(out, axis=0).astype(o_ref.dtype)
