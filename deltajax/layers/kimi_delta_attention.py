"""The Kimi Delta Attention layer."""

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
from deltajax.ops import Gate, kimi_delta_attention


class KimiDeltaAttention(DeltaLayer):
    """Kimi Delta Attention (arXiv 2510.26692): the delta rule with a decay for every key channel.

    As `DeltaNet`, with `S~_t = Diag(exp(g_t)) S_{t-1}` before each update. In float32,
    `g_t = -exp(A_log) softplus(f_t + dt_bias)`, or with a bound
    `g_t = lower_bound * sigmoid(exp(A_log) (f_t + dt_bias))`, where `f_t = f_b_proj(f_a_proj(x_t))`, in R^K
    per value head, passes a bottleneck of size V. Output: `RMSNorm(o) * sigmoid(g_b_proj(g_a_proj(x)))`,
    of the same bottleneck, `g_b_proj` with a bias unless `gate_bias` is off, as in Kimi Linear. `A_log`
    starts at log Uniform(1, 16) (zero with a bound, where it only sets the sigmoid's slope), `dt_bias` as in
    `GatedDeltaNet`; both stay float32.

    Args:
      hidden_size: width D.
      num_heads: query/key heads H.
      num_v_heads: value heads HV, a multiple of H; None means H.
      head_dim: query/key head size K.
      head_v_dim: value head size V; None means `expand_v * K`.
      expand_v: see `head_v_dim`.
      conv_size: taps of the short convolutions.
      allow_neg_eigval: beta in [0, 2] (arXiv 2411.12537).
      lower_bound: bound (< 0) of the log decay of one token, or None.
      gate_bias: whether `g_b_proj` has a bias.
      norm_eps: epsilon of the output norm.
      initializer_range: standard deviation of kernels and taps.
      chunk_size, implementation: passed to `deltajax.ops.kimi_delta_attention`.
      dtype: compute dtype; beta, the decay and the state are float32.
      param_dtype: dtype of the other parameters.
      rngs: parameter randomness.

    Raises:
      ValueError: on sizes that do not fit together or a bound that is not negative, naming the argument.
    """

    def __init__(
        self,
        *,
        hidden_size: int = 2048,
        num_heads: int = 16,
        num_v_heads: int | None = None,
        head_dim: int = 128,
        head_v_dim: int | None = None,
        expand_v: float = 1.0,
        conv_size: int = 4,
        allow_neg_eigval: bool = False,
        lower_bound: float | None = None,
        gate_bias: bool = True,
        norm_eps: float = 1e-5,
        initializer_range: float = INITIALIZER_RANGE,
        chunk_size: int | None = None,
        implementation: Literal["pallas", "chunked", "scan"] | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if lower_bound is not None and not lower_bound < 0:
            raise ValueError(f"lower_bound={lower_bound}: expected a negative number or None")
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
        self.lower_bound = lower_bound
        HV, K, V = self.num_v_heads, self.head_dim, self.head_v_dim
        rate = nnx.initializers.zeros_init() if lower_bound is not None else log_uniform_rate(1, 16)
        self.f_a_proj = self._linear(hidden_size, V, ("embed", "head_dim"), rngs)
        self.f_b_proj = self._linear(V, HV * K, ("head_dim", "heads"), rngs)
        self.A_log = parameter(rate, (HV,), ("heads",), jnp.float32, rngs)
        self.dt_bias = parameter(inverse_softplus_step(), (HV, K), ("heads", "head_dim"), jnp.float32, rngs)
        self.g_a_proj = self._linear(hidden_size, V, ("embed", "head_dim"), rngs)
        self.g_b_proj = self._linear(V, HV * V, ("head_dim", "heads"), rngs, use_bias=gate_bias)
        self.o_norm = self._norm(rngs, "sigmoid")

    def _decay(self, x):
        g = self.f_b_proj(self.f_a_proj(x))
        g = g.reshape(*x.shape[:2], self.num_v_heads, self.head_dim)
        return g, Gate(self.A_log[...], self.dt_bias[...], self.lower_bound)

    def _recurrence(self, q, k, v, g, beta, gate, **options) -> tuple[Array, Array]:
        return kimi_delta_attention(q, k, v, g, beta, gate=gate, **options)

    def _output_gate(self, x):
        return self.g_b_proj(self.g_a_proj(x))
