"""Attention of one token a row to keys and values that lie token by token, without a copy of these."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def single_query_attention(
    q: Float[Array, "B H K"],
    key: Float[Array, "B S KV K"],
    value: Float[Array, "B S KV K"],
    mask: Bool[Array, "B S"],
) -> Float[Array, "B H K"]:
    """`softmax(q k^T / sqrt(K)) v`; query head h reads key/value head h // (H / KV).

    A product over rows and key/value heads needs both before the tokens, for which compilers copy the whole
    cache. Here each query is padded with zeros to the channels of all key/value heads, so that both products
    read a row's cache as one matrix [S, KV K], where it lies; of the second, each head keeps its own part.
    That is KV times the arithmetic, which on accelerators costs less time than reading the cache does.
    """
    B, H, K = q.shape
    S, KV = key.shape[1:3]
    own = jnp.eye(KV, dtype=bool)[:, None, :, None]  # [KV, 1, KV, 1]
    q = jnp.where(own, q.reshape(B, KV, H // KV, 1, K), 0).reshape(B, H, KV * K)
    logits = jnp.einsum("bhc,bsc->bhs", q, key.reshape(B, S, -1), preferred_element_type=jnp.float32)
    logits = jnp.where(mask[:, None], logits * K**-0.5, jnp.finfo(jnp.float32).min)
    p = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    o = jnp.einsum("bhs,bsc->bhc", p, value.reshape(B, S, -1)).reshape(B, KV, H // KV, KV, K)
    return jnp.sum(jnp.where(own, o, 0), axis=3).reshape(B, H, K)
