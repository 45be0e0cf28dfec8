"""Causal softmax attention, full or in a sliding window, for hybrids with delta-rule layers."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from deltajax.layers.attention_blocks import Source
from deltajax.layers.attention_cache import AttentionCache, NewTokens, layout_after
from deltajax.layers.blockwise import attend, blockwise_attention, many_logits
from deltajax.layers.fused_attention import attend_own, check_implementation
from deltajax.layers.head_swap import (
    keys_by_heads,
    outputs_by_tokens,
    queries_by_heads,
    swaps,
    whole_ids,
    whole_rows,
)
from deltajax.layers.layout import Layout, causal_mask, layouts_on_axis, packs_sequences, without_padding
from deltajax.layers.norm import RMSNorm
from deltajax.layers.parameters import INITIALIZER_RANGE, check_sizes, linear
from deltajax.layers.rotary import RotaryEmbedding, rotated_channels
from deltajax.layers.sharding import run_attention
from deltajax.layers.single_query import single_query_attention
from deltajax.ops.halo import left_halo


class Attention(nnx.Module):
    """`softmax(q k^T / sqrt(K)) v` over the tokens before, within one segment; projections without bias.

    Token t sees tokens s <= t of its own segment, and only t - s < window_size where a window is set.
    Rotary positions restart with every segment. With `qk_norm`, each head's queries and keys pass an RMSNorm
    before they are rotated; with `output_gate`, q_proj makes [query | gate] for each head, and what a head
    returns is multiplied by sigmoid(gate) before o_proj.

    Where `shard_ops` spreads a row's tokens over devices, these swap tokens for heads: each attends among all
    tokens with its share of the query heads (`layers.head_swap`). Where the heads do not divide, each device
    gathers the keys and values of all tokens instead; with a window it receives as many as that reaches.

    Speed and memory: in a call without a cache, in bfloat16 or float16, that is lowered for NVIDIA GPUs,
    cuDNN's fused kernel runs where it can (`layers.fused_attention`). Elsewhere, where a device's logits are
    few (at most `layers.blockwise.MAX_LOGITS`, 1 GiB in float32) all are held at once, by
    `jax.nn.dot_product_attention`: of T tokens with each other, at most T x 2 window_size with a window, and
    with every slot of a cache. Else attention goes block by block, in bounded memory, forward and backward
    (`layers.blockwise`). One token a row reads the cache where it lies (`layers.single_query`), whatever the
    `implementation`.

    Args:
      hidden_size: width D.
      num_heads: query heads.
      num_kv_heads: key/value heads, a divisor of `num_heads`; None means `num_heads`.
      head_dim: head size K; None means D // num_heads.
      window_size: tokens seen, the current one included; None for all.
      rope_theta: base of the rotary embedding; None for no position embedding.
      rope_fraction: share of a head's channels, its first ones, that are rotated.
      qk_norm: normalise queries and keys per head.
      qk_norm_joint: with `qk_norm`, normalise over the channels of all heads together.
      output_gate: gate the output.
      norm_eps, zero_centered_norm: epsilon and form of these norms, see `RMSNorm`.
      initializer_range: standard deviation of the kernels.
      implementation: None: cuDNN where a program is lowered for NVIDIA GPUs and it takes the call, else plain
        JAX; "xla": never cuDNN; "cudnn": an error where it does not run. Calls with a cache, or with rows
        spread over devices whose heads are not swapped, pass it to `jax.nn.dot_product_attention`.
      dtype: compute dtype (the softmax is in float32).
      param_dtype: parameter dtype.
      rngs: parameter randomness.

    Raises:
      ValueError: on sizes that do not fit together, or another implementation, naming the argument.
    """

    def __init__(
        self,
        *,
        hidden_size: int = 2048,
        num_heads: int = 32,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window_size: int | None = None,
        rope_theta: float | None = 10000.0,
        rope_fraction: float = 1.0,
        qk_norm: bool = False,
        qk_norm_joint: bool = False,
        output_gate: bool = False,
        norm_eps: float = 1e-6,
        zero_centered_norm: bool = False,
        initializer_range: float = INITIALIZER_RANGE,
        implementation: Literal["xla", "cudnn"] | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_sizes(num_heads=num_heads, num_kv_heads=num_kv_heads)
        check_implementation(implementation)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads={num_kv_heads}: expected a divisor of num_heads={num_heads}")
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(f"hidden_size={hidden_size}: expected a multiple of num_heads={num_heads}")
            head_dim = hidden_size // num_heads
        check_sizes(head_dim=head_dim)
        if window_size is not None and window_size < 1:
            raise ValueError(f"window_size={window_size}: expected at least 1, or None")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.window_size = window_size
        self.rotary = None
        if rope_theta is not None:
            self.rotary = RotaryEmbedding(rotated_channels(head_dim, rope_fraction), theta=rope_theta)
        self.output_gate = output_gate
        self.implementation = implementation
        self.dtype = dtype

        def project(n_in, n_out, axes):
            return linear(
                n_in, n_out, axes, std=initializer_range, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        queries = num_heads * head_dim * (2 if output_gate else 1)
        self.q_proj = project(hidden_size, queries, ("embed", "heads"))
        self.k_proj = project(hidden_size, num_kv_heads * head_dim, ("embed", "kv_heads"))
        self.v_proj = project(hidden_size, num_kv_heads * head_dim, ("embed", "kv_heads"))
        self.o_proj = project(num_heads * head_dim, hidden_size, ("heads", "embed"))
        self.qk_norm, self.qk_norm_joint = qk_norm, qk_norm_joint
        if qk_norm:
            self.q_norm, self.k_norm = (
                RMSNorm(
                    heads * head_dim if qk_norm_joint else head_dim,
                    eps=norm_eps,
                    zero_centered=zero_centered_norm,
                    axis=axis if qk_norm_joint else "head_dim",
                    dtype=dtype,
                    param_dtype=param_dtype,
                    rngs=rngs,
                )
                for heads, axis in ((num_heads, "heads"), (num_kv_heads, "kv_heads"))
            )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: AttentionCache | None = None,
        num_segments: int | None = None,
        hold: bool = False,
    ) -> Any:
        """Mixes tokens along T.

        Args:
          x: [B, T, D] input.
          segment_ids: int32 [B, T] for packed rows: nothing is seen across ids; id 0 is padding, which
            outputs 0 and does not enter the cache. Padding stands between segments or at a row's ends, not
            inside a segment (a window would then reach less far back).
          cache: what earlier calls returned (or `init_cache`); it belongs to the row's first segment.
          num_segments: static N: B = 1, and the row packs tokens of sequences 1..N, each together, which
            continue the N rows of `cache`.
          hold: return `NewTokens`, whose `keep` makes the cache after some of the tokens, instead of a cache.

        Returns:
          y [B, T, D] in the compute dtype; `(y, cache)` when a cache is given.

        Raises:
          TypeError, ValueError: on segment ids that are not integers of shape [B, T], or arguments that do
            not go together.
        """
        B, T, _ = x.shape
        packed = packs_sequences(
            x.shape, segment_ids, num_segments, hold, None if cache is None else cache.length.shape[0]
        )
        q, gate = self.q_proj(x).reshape(B, T, self.num_heads, -1), None
        if self.output_gate:
            q, gate = jnp.split(q, 2, axis=-1)
        k = self.k_proj(x).reshape(B, T, self.num_kv_heads, self.head_dim)
        v = self.v_proj(x).reshape(B, T, self.num_kv_heads, self.head_dim)
        if self.qk_norm:
            q, k = self._normalize(q, self.q_norm), self._normalize(k, self.k_norm)
        if cache is None:
            place = "rows sequence heads"
            o = run_attention(
                self._attend_alone,
                (q, k, v),
                (place, place, place),
                segment_ids,
                {"query heads": self.num_heads, "key/value heads": self.num_kv_heads},
            )
            return self._output(o, gate, segment_ids)

        layout = layout_after(x.shape, segment_ids, cache.length, packed)
        q, k = self._rotate(q, k, layout)
        flat = tuple(x.reshape(B, T, -1) for x in (k, v))
        sources, after = NewTokens(cache, flat, layout).enter(packed=packed, hold=hold)
        o = attend(
            q,
            layout,
            sources,
            lambda *kept: tuple(x.reshape(*x.shape[:2], self.num_kv_heads, -1) for x in kept),
            self._attend_cached,
            window=self.window_size,
            scale=self.head_dim**-0.5,
        )
        return self._output(o, gate, segment_ids), after

    def init_cache(self, batch: int, max_length: int) -> AttentionCache:
        """An empty cache for `batch` rows of at most `max_length` tokens (a window needs no more slots)."""
        slots = max_length if self.window_size is None else min(max_length, self.window_size)
        shape = (batch, slots, self.num_kv_heads * self.head_dim)
        return AttentionCache(
            key=jnp.zeros(shape, self.dtype),
            value=jnp.zeros(shape, self.dtype),
            length=jnp.zeros((batch,), jnp.int32),
        )

    def _mask(self, queries: Layout, keys: Layout) -> Bool[Array, "B 1 T S"]:
        return causal_mask(queries, keys, self.window_size)

    def _normalize(self, x: Float[Array, "B T N K"], norm: RMSNorm) -> Float[Array, "B T N K"]:
        return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape) if self.qk_norm_joint else norm(x)

    def _rotate(self, q, k, layout: Layout) -> tuple[Array, Array]:
        if self.rotary is None:
            return q, k
        return self.rotary(q, layout.position), self.rotary(k, layout.position)

    def _attend_alone(self, q, k, v, segment_ids, axis_name: str | None) -> Float[Array, "B T N K"]:
        """Attention among a call's own tokens; in a window, by blocks once that makes fewer logits.

        With `axis_name`, they are this device's part of rows spread over that axis: tokens are swapped for
        heads, or else keys and values come from all devices, or from those that a window reaches.
        """
        if axis_name is not None and self.window_size is None and swaps(q, axis_name):
            q, ids = queries_by_heads(q, axis_name), whole_ids(segment_ids, axis_name)
            k, v = keys_by_heads(k, axis_name), keys_by_heads(v, axis_name)
            o = self._attend_alone(q, k, v, ids, None)
            return outputs_by_tokens(o, axis_name)
        packed = segment_ids is not None
        own, whole = layouts_on_axis(q.shape[0], q.shape[1], segment_ids, axis_name)
        q, k = self._rotate(q, k, own)
        if axis_name is None:
            return attend_own(
                q,
                (k, v),
                own if packed else None,
                keys_values=_as_given,
                window=self.window_size,
                scale=self.head_dim**-0.5,
                implementation=self.implementation,
                plain=lambda q, kv, params: self._attend_plain(q, kv[0], kv[1], own, own, packed, None),
            )
        return self._attend_plain(q, k, v, own, whole, packed, axis_name)

    def _attend_plain(
        self, q, k, v, own: Layout, whole: Layout, packed: bool, axis_name: str | None
    ) -> Array:
        """`_attend_alone` in plain JAX, of rotated queries and keys."""
        B, T = q.shape[:2]
        window = self.window_size
        span = T if window is None else window  # by blocks of as many tokens where there are more
        elsewhere = 0 if axis_name is None else T * (jax.lax.axis_size(axis_name) - 1)
        reach = elsewhere if window is None else min(window - 1, elsewhere)
        many = self.implementation != "cudnn" and many_logits(q, T + reach if 2 * span >= T else 2 * span)
        if many or 2 * span >= T:
            keys = own
            if axis_name is not None and window is None:
                k, v = (whole_rows(x, axis_name) for x in (k, v))
                keys = whole
            elif axis_name is not None:
                k, v, keys = jax.tree.map(lambda a: _after(left_halo(a, reach, axis_name), a), (k, v, own))
            if many:
                sources, scale = [Source((k, v), keys)], self.head_dim**-0.5
                return blockwise_attention(q, own, sources, _as_given, window=window, scale=scale)
            plain = axis_name is None and not packed
            return self._attend(q, k, v, None if plain else self._mask(own, keys))

        def with_previous(x: Array) -> Array:  # every block after the one before it, zeros (padding) at first
            before = jnp.zeros_like(x[:, :span]) if axis_name is None else left_halo(x, span, axis_name)
            x = _blocks(_after(before, x), span)
            return _after(x[:, :-1], x[:, 1:], axis=2)

        q, queries = jax.tree.map(lambda a: _fold(_blocks(a, span)), (q, own))
        k, v, keys = jax.tree.map(lambda a: _fold(with_previous(a)), (k, v, own))
        o = self._attend(q, k, v, self._mask(queries, keys))
        return o.reshape(B, -1, *o.shape[2:])[:, :T]

    def _attend(self, q, k, v, mask) -> Float[Array, "B T N K"]:
        if mask is not None:
            return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=self.implementation)
        window = None if self.window_size is None else (self.window_size - 1, 0)
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, local_window_size=window, implementation=self.implementation
        )

    def _attend_cached(self, q, k, v, mask) -> Float[Array, "B T N K"]:
        if q.shape[1] > 1:
            return self._attend(q, k, v, mask)
        return single_query_attention(q[:, 0], k, v, mask[:, 0, 0])[:, None]

    def _output(self, o, gate, segment_ids) -> Float[Array, "B T D"]:
        o = without_padding(o, segment_ids)
        if gate is not None:
            o = o * jax.nn.sigmoid(gate)
        return self.o_proj(o.reshape(*o.shape[:2], -1))


def _blocks(x: Array, size: int) -> Array:
    """[B, T, ...] as [B, N, size, ...]; zeros (in a layout: padding) fill the last block."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def _as_given(key: Array, value: Array) -> tuple[Array, Array]:
    return key, value


def _after(before: Array, x: Array, axis: int = 1) -> Array:
    return jnp.concatenate([before, x], axis=axis)


def _fold(x: Array) -> Array:
    """[B, N, ...] to [B N, ...]."""
    return x.reshape(-1, *x.shape[2:])
