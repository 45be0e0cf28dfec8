"""Multi-head latent attention (MLA): softmax attention whose keys and values come from one small latent."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from deltajax.layers.attention_blocks import Source, one_size
from deltajax.layers.attention_cache import LatentCache, NewTokens, held, layout_after
from deltajax.layers.blockwise import attend, blockwise_attention, many_logits
from deltajax.layers.fused_attention import attend_own, check_implementation
from deltajax.layers.head_swap import (
    heads_of,
    outputs_by_tokens,
    queries_by_heads,
    swaps,
    whole_ids,
    whole_rows,
)
from deltajax.layers.latent_decode import attend_held
from deltajax.layers.layout import Layout, causal_mask, layouts_on_axis, packs_sequences, without_padding
from deltajax.layers.norm import RMSNorm
from deltajax.layers.parameters import INITIALIZER_RANGE, linear
from deltajax.layers.rotary import RotaryEmbedding
from deltajax.layers.sharding import run_attention
from deltajax.ops.problem import vary_like


class LatentAttention(nnx.Module):
    """Causal attention of DeepSeek-V2 (arXiv 2405.04434) and Kimi Linear; projections without bias.

    With c_s = RMSNorm(the first C channels of kv_a_proj(x_s)) and r_s its last R channels, head h has keys
    [k_s | r_s] and values v_s with [k_s | v_s] = kv_b_proj(c_s), queries [q | q_r] of N + R channels, and the
    scale (N + R)^-1/2. Token t sees tokens s <= t of its own segment. With `rope_theta`, q_r and r are
    rotated (channels d and d + R/2 as a pair), positions restarting with every segment; with None (Kimi
    Linear) they are not.

    Only [c | r] is cached. A call computes keys and values from it, or, where that is more work than it
    saves (a few tokens against many, as in decoding), moves kv_b_proj to the queries and the outputs, which
    then meet the latents themselves. Both are the same function. On Hopper GPUs, one token of each row meets
    the latents in a kernel (bfloat16 or float16, C a multiple of 128 up to 512, R = 64).

    Where `shard_ops` spreads a row's tokens over devices, each gathers the latents of all of them and swaps
    tokens for heads: it makes keys and values, and attends, for its share of the heads (`layers.head_swap`);
    where the heads do not divide, for all heads with its own tokens as queries.

    Speed and memory: in a call without a cache, in bfloat16 or float16, that is lowered for NVIDIA GPUs,
    cuDNN's fused kernel runs where it can (`layers.fused_attention`), on keys and values that are made of the
    latents once more for the derivative. Else attention holds a device's logits of T tokens with each other,
    and with every slot of a cache, where these are few, else it goes block by block, in bounded memory, and
    makes keys and values of the latents block by block too, also for the derivative (`layers.blockwise`).

    Args:
      hidden_size: width D.
      num_heads: heads H.
      kv_lora_rank: latent channels C.
      q_lora_rank: channels of the queries' low-rank projection, normalised too; None for one full matrix.
      qk_nope_head_dim: N, channels of a head's queries and keys that have no position.
      qk_rope_head_dim: R, channels of the key that all heads share, and of each head's queries for it.
      v_head_dim: value head size V.
      rope_theta: base of the rotary embedding; None for no position embedding.
      norm_eps: epsilon of the norms.
      initializer_range: standard deviation of the kernels.
      implementation: of calls without a cache. None: cuDNN where a program is lowered for NVIDIA GPUs and it
        takes the call, else plain JAX; "xla": never cuDNN; "cudnn": an error where it does not run.
      dtype: compute dtype (the softmax is in float32).
      param_dtype: parameter dtype.
      rngs: parameter randomness.

    Raises:
      ValueError: on a size that is not a positive integer, an odd `qk_rope_head_dim` with `rope_theta`, or
        another implementation.
    """

    def __init__(
        self,
        *,
        hidden_size: int = 2304,
        num_heads: int = 32,
        kv_lora_rank: int = 512,
        q_lora_rank: int | None = None,
        qk_nope_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        v_head_dim: int = 128,
        rope_theta: float | None = None,
        norm_eps: float = 1e-6,
        initializer_range: float = INITIALIZER_RANGE,
        implementation: Literal["xla", "cudnn"] | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        sizes = dict(
            hidden_size=hidden_size,
            num_heads=num_heads,
            kv_lora_rank=kv_lora_rank,
            qk_nope_head_dim=qk_nope_head_dim,
            qk_rope_head_dim=qk_rope_head_dim,
            v_head_dim=v_head_dim,
        )
        if q_lora_rank is not None:
            sizes["q_lora_rank"] = q_lora_rank
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name}={size!r}: expected a positive integer")
        check_implementation(implementation)
        if rope_theta is not None and qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim={qk_rope_head_dim}: expected an even size, to be rotated")
        self.num_heads = num_heads
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self._scale = (qk_nope_head_dim + qk_rope_head_dim) ** -0.5
        self.rotary = None if rope_theta is None else RotaryEmbedding(qk_rope_head_dim, theta=rope_theta)
        self.implementation = implementation
        self.dtype = dtype

        common: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        def project(n_in, n_out, axes):
            return linear(n_in, n_out, axes, std=initializer_range, **common)

        queries = num_heads * (qk_nope_head_dim + qk_rope_head_dim)
        self.low_rank_queries = q_lora_rank is not None
        if q_lora_rank is None:
            self.q_proj = project(hidden_size, queries, ("embed", "heads"))
        else:
            self.q_a_proj = project(hidden_size, q_lora_rank, ("embed", "latent"))
            self.q_a_norm = RMSNorm(q_lora_rank, eps=norm_eps, axis="latent", **common)
            self.q_b_proj = project(q_lora_rank, queries, ("latent", "heads"))
        self.kv_a_proj = project(hidden_size, kv_lora_rank + qk_rope_head_dim, ("embed", "latent"))
        self.kv_a_norm = RMSNorm(kv_lora_rank, eps=norm_eps, axis="latent", **common)
        self.kv_b_proj = project(
            kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), ("latent", "heads")
        )
        self.o_proj = project(num_heads * v_head_dim, hidden_size, ("heads", "embed"))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: LatentCache | None = None,
        num_segments: int | None = None,
        hold: bool = False,
    ) -> Any:
        """Mixes tokens along T.

        Args:
          x: [B, T, D] input.
          segment_ids: int32 [B, T] for packed rows: nothing is seen across ids; id 0 is padding, which
            outputs 0 and does not enter the cache. Padding stands between segments or at a row's ends, not
            inside a segment.
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
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x))) if self.low_rank_queries else self.q_proj(x)
        q = q.reshape(B, T, self.num_heads, -1)
        latent, shared_key = jnp.split(self.kv_a_proj(x), [self.kv_lora_rank], axis=-1)
        latent = jnp.concatenate([self.kv_a_norm(latent), shared_key], axis=-1)
        kernel = self.kv_b_proj.kernel[...].reshape(self.kv_lora_rank, self.num_heads, -1)
        if cache is None:
            o = run_attention(
                self._attend_alone,
                (q, latent, kernel),
                ("rows sequence heads", "rows sequence", "whole heads"),
                segment_ids,
                {"heads": self.num_heads},
            )
            return self._output(o, segment_ids)

        layout = layout_after(x.shape, segment_ids, cache.length, packed)
        q, latent = self._rotate(q, latent, layout)
        sources, after = NewTokens(cache, (latent,), layout).enter(packed=packed, hold=hold)
        if T == 1 and not packed and not hold and self._absorbs(T):
            o = self._attend_held(q, after, kernel)
        else:
            attention = self._attend_latents if self._absorbs(T) else self._attend_expanded
            o = attention(q, layout, sources, kernel)
        return self._output(o, segment_ids), after

    def init_cache(self, batch: int, max_length: int) -> LatentCache:
        """An empty cache for `batch` rows of at most `max_length` tokens."""
        return LatentCache(
            latent=jnp.zeros((batch, max_length, self.kv_lora_rank + self.qk_rope_head_dim), self.dtype),
            length=jnp.zeros((batch,), jnp.int32),
        )

    def _rotate(self, q, latent, layout: Layout) -> tuple[Array, Array]:
        """The last R channels of both, turned by their positions."""
        if self.rotary is None:
            return q, latent
        q, q_rope = jnp.split(q, [self.qk_nope_head_dim], axis=-1)
        latent, key = jnp.split(latent, [self.kv_lora_rank], axis=-1)
        key = self.rotary(key[:, :, None], layout.position)[:, :, 0]
        return (
            jnp.concatenate([q, self.rotary(q_rope, layout.position)], axis=-1),
            jnp.concatenate([latent, key], axis=-1),
        )

    def _attend_alone(self, q, latent, kernel, segment_ids, axis_name: str | None) -> Float[Array, "B T H V"]:
        """Attention among a call's own tokens; with `axis_name`, a device's part of rows on that axis."""
        if axis_name is not None and swaps(q, axis_name):
            # Each device adds its heads' part to the gradient of the kernel, which all have in whole.
            kernel = heads_of(vary_like(kernel, q), axis_name)
            q, ids = queries_by_heads(q, axis_name), whole_ids(segment_ids, axis_name)
            o = self._attend_alone(q, whole_rows(latent, axis_name), kernel, ids, None)
            return outputs_by_tokens(o, axis_name)
        own, whole = layouts_on_axis(q.shape[0], q.shape[1], segment_ids, axis_name)
        q, latent = self._rotate(q, latent, own)
        if axis_name is not None:
            latent = whole_rows(latent, axis_name)
        kernel = vary_like(kernel, q)  # before its cast: gradients are summed in the parameter's dtype

        def plain(q, arrays, params):
            if many_logits(q, whole.run.shape[1]):
                sources = [Source(arrays, whole)]
                return blockwise_attention(q, own, sources, self._expand, params=params, scale=self._scale)
            seen = None if axis_name is None and segment_ids is None else causal_mask(own, whole)
            return self._softmax(q, *self._expand(*arrays, *params), seen)

        if axis_name is not None:
            return plain(q, (latent,), (kernel,))
        return attend_own(
            q,
            (latent,),
            None if segment_ids is None else own,
            keys_values=self._expand,
            params=(kernel,),
            scale=self._scale,
            implementation=self.implementation,
            plain=plain,
        )

    def _absorbs(self, queries: int) -> bool:
        """Whether that many queries multiply less with the latents than with keys and values made of them."""
        C, R, N, V = self.kv_lora_rank, self.qk_rope_head_dim, self.qk_nope_head_dim, self.v_head_dim
        return queries * (2 * (C + R)) <= C * (N + V) + queries * (N + R + V)

    def _expand(self, latent: Float[Array, "B S C+R"], kernel: Array) -> tuple[Array, Array]:
        """Each head's own keys [B, S, H, N + R] and values [B, S, H, V]."""
        latent, shared_key = jnp.split(latent, [self.kv_lora_rank], axis=-1)
        made = jnp.einsum("bsc,chn->bshn", latent, kernel.astype(self.dtype))
        key, value = jnp.split(made, [self.qk_nope_head_dim], axis=-1)
        shared_key = jnp.broadcast_to(shared_key[:, :, None], (*key.shape[:3], self.qk_rope_head_dim))
        return jnp.concatenate([key, shared_key], axis=-1), value

    def _attend_expanded(self, q, layout: Layout, sources: list[Source], kernel) -> Float[Array, "B T H V"]:
        """Attention with each head's own keys and values, made of the latents."""
        return attend(q, layout, sources, self._expand, self._softmax, params=(kernel,), scale=self._scale)

    def _attend_latents(self, q, layout: Layout, sources: list[Source], kernel) -> Float[Array, "B T H V"]:
        """The same with the latents as the one key and value of all heads."""
        q, values = self._absorbed(q, kernel)
        return values(self._meet(q, layout, sources))

    def _attend_held(self, q, cache: LatentCache, kernel) -> Float[Array, "B 1 H V"]:
        """`_attend_latents` of each row's last token, which the cache holds already."""

        def plain(q, latent, length):
            last = Layout(jnp.ones((len(length), 1), jnp.int32), length[:, None] - 1)
            return self._meet(q, last, [held(LatentCache(latent, length), packed=False)])

        q, values = self._absorbed(q, kernel)
        return values(attend_held(q, *cache, rank=self.kv_lora_rank, scale=self._scale, plain=plain))

    def _absorbed(self, q, kernel) -> tuple[Float[Array, "B T H C+R"], Callable[[Array], Array]]:
        """Queries for latents, and what makes values [B, T, H, V] of weighed latents [B, T, H, C]."""
        N = self.qk_nope_head_dim
        kernel = kernel.astype(self.dtype)
        q_latent = jnp.einsum("bthn,chn->bthc", q[..., :N], kernel[..., :N])
        q = jnp.concatenate([q_latent, q[..., N:]], axis=-1)
        return q, lambda o: jnp.einsum("bthc,chv->bthv", o, kernel[..., N:])

    def _meet(self, q, layout: Layout, sources: list[Source]) -> Float[Array, "B T H C"]:
        """Weighed latents of queries for latents."""
        # The shared key is weighted too and cut off after: a cut before would copy the cache.
        both = lambda latent: (latent[:, :, None], latent[:, :, None])  # noqa: E731
        return attend(q, layout, sources, both, self._softmax, scale=self._scale)[..., : self.kv_lora_rank]

    def _softmax(self, q, key, value, mask) -> Float[Array, "B T H V"]:
        """`jax.nn.dot_product_attention`, which wants one head size: zeros fill the smaller."""
        V = value.shape[-1]
        q, key, value = one_size(q, key, value)
        o = jax.nn.dot_product_attention(q, key, value, mask=mask, scale=self._scale, is_causal=mask is None)
        return o[..., :V]

    def _output(self, o, segment_ids) -> Float[Array, "B T D"]:
        o = without_padding(o, segment_ids)
        return self.o_proj(o.reshape(*o.shape[:2], -1))
