"""The DeltaNet layer."""

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from deltajax.layers.delta_base import DeltaLayer, value_head_size
from deltajax.layers.parameters import INITIALIZER_RANGE, check_sizes
from deltajax.ops import delta_rule


class DeltaNet(DeltaLayer):
    """DeltaNet (arXiv 2406.06484): a matrix memory corrected by what it already returns for a key.

    `q, k, v = silu(conv(proj(x)))`, q and k L2-normalised, `beta = sigmoid(b_proj(x))`, then per head
    `S_t = S_{t-1} + k_t (beta_t (v_t - S_{t-1}^T k_t))^T`, `o_t = K^-1/2 S_t^T q_t`, RMSNorm over V,
    output projection. Kernels and taps start at normal(0, initializer_range), norms at one.

    Args:
      hidden_size: width D.
      num_heads: query/key heads H.
      num_v_heads: value heads HV, a multiple of H; None means H.
      head_dim: query/key head size K; None means D // H.
      head_v_dim: value head size V; None means `expand_v * K`.
      expand_v: see `head_v_dim`.
      conv_size: taps of the short convolutions.
      allow_neg_eigval: beta in [0, 2] (arXiv 2411.12537).
      use_gate: multiply the normalised output by silu(g_proj(x)).
      norm_eps: epsilon of the output norm.
      initializer_range: standard deviation of kernels and taps.
      chunk_size, implementation: passed to `deltajax.ops.delta_rule`.
      dtype: compute dtype; beta and the state are float32.
      param_dtype: parameter dtype.
      rngs: parameter randomness.

    Raises:
      ValueError: on sizes that do not fit together, naming the argument.
    """

    def __init__(
        self,
        *,
        hidden_size: int = 1024,
        num_heads: int = 4,
        num_v_heads: int | None = None,
        head_dim: int | None = None,
        head_v_dim: int | None = None,
        expand_v: float = 1.0,
        conv_size: int = 4,
        allow_neg_eigval: bool = False,
        use_gate: bool = False,
        norm_eps: float = 1e-5,
        initializer_range: float = INITIALIZER_RANGE,
        chunk_size: int | None = None,
        implementation: Literal["pallas", "chunked", "scan"] | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_sizes(num_heads=num_heads)
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(f"hidden_size={hidden_size}: expected a multiple of num_heads={num_heads}")
            head_dim = hidden_size // num_heads
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
        self.use_gate = use_gate
        if use_gate:
            self.g_proj = self._linear(
                hidden_size, self.num_v_heads * self.head_v_dim, ("embed", "heads"), rngs
            )
        self.o_norm = self._norm(rngs, "silu" if use_gate else None)

    def _decay(self, x):
        return None, None

    def _recurrence(self, q, k, v, g, beta, gate, **options) -> tuple[Array, Array]:
        return delta_rule(q, k, v, beta, **options)

    def _output_gate(self, x):
        return self.g_proj(x) if self.use_gate else None
