"""The Gated DeltaNet layer."""

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from deltajax.layers.delta_base import DeltaLayer, value_head_size
from deltajax.layers.parameters import (
    INITIALIZER_RANGE,
    inverse_softplus_step,
    log_uniform_rate,
    parameter,
)
from deltajax.ops import Gate, gated_delta_rule


class GatedDeltaNet(DeltaLayer):
    """Gated DeltaNet (arXiv 2412.06464): the delta rule on a memory that each head decays.

    As `DeltaNet`, with `S~_t = exp(g_t) S_{t-1}` before each update,
    `g_t = -exp(A_log) softplus(a_proj(x) + dt_bias)` a scalar per value head in float32, and the output
    `RMSNorm(o) * silu(g_proj(x))`. `A_log` starts at log Uniform(0, 16), `dt_bias` where softplus gives
    exp(Uniform(log 1e-3, log 0.1)); both stay float32.

    Args:
      hidden_size: width D.
      num_heads: query/key heads H.
      num_v_heads: value heads HV, a multiple of H; None means H.
      head_dim: query/key head size K.
      head_v_dim: value head size V; None means `expand_v * K`.
      expand_v: see `head_v_dim`.
      conv_size: taps of the short convolutions.
      allow_neg_eigval: beta in [0, 2] (arXiv 2411.12537).
      use_gate: multiply the normalised output by silu(g_proj(x)).
      norm_eps: epsilon of the output norm.
      initializer_range: standard deviation of kernels and taps.
      chunk_size, implementation: passed to `deltajax.ops.gated_delta_rule`.
      dtype: compute dtype; beta, the decay and the state are float32.
      param_dtype: dtype of the other parameters.
      rngs: parameter randomness.

    Raises:
      ValueError: on sizes that do not fit together, naming the argument.
    """

    def __init__(
        self,
        *,
        hidden_size: int = 2048,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        head_dim: int = 256,
        head_v_dim: int | None = None,
        expand_v: float = 2.0,
        conv_size: int = 4,
        allow_neg_eigval: bool = False,
        use_gate: bool = True,
        norm_eps: float = 1e-5,
        initializer_range: float = INITIALIZER_RANGE,
        chunk_size: int | None = None,
        implementation: Literal["pallas", "chunked", "scan"] | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_v_heads=num_heads if num_v_heads is None else num_v_heads,
            head_dim=head_dim,
            head_v_dim=value_head_size(head_dim, head_v_dim, expand_v),
            conv_size=conv_size,
            allow_neg_eigval=allow_neg_eigval,
            norm_eps=norm_eps,
            initializer_range=initializer_range,
            chunk_size=chunk_size,
            implementation=implementation,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        heads = (self.num_v_heads,)
        self.a_proj = self._linear(hidden_size, self.num_v_heads, ("embed", "heads"), rngs)
        self.A_log = parameter(log_uniform_rate(0, 16), heads, ("heads",), jnp.float32, rngs)
        self.dt_bias = parameter(inverse_softplus_step(), heads, ("heads",), jnp.float32, rngs)
        self.use_gate = use_gate
        if use_gate:
            self.g_proj = self._linear(
                hidden_size, self.num_v_heads * self.head_v_dim, ("embed", "heads"), rngs
            )
        self.o_norm = self._norm(rngs, "silu" if use_gate else None)

    def _decay(self, x):
        return self.a_proj(x), Gate(self.A_log[...], self.dt_bias[...])

    def _recurrence(self, q, k, v, g, beta, gate, **options) -> tuple[Array, Array]:
        return gated_delta_rule(q, k, v, g, beta, gate=gate, **options)

    def _output_gate(self, x):
        return self.g_proj(x) if self.use_gate else None
