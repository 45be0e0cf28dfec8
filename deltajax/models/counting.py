"""Parameter and floating-point counts, without allocating anything."""

import math

import jax
from flax import nnx

from deltajax.models.abstract import abstract_model
from deltajax.models.config import DELTA_MIXERS, ModelConfig


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters, embedding table and LM head included."""
    state = nnx.state(abstract_model(config), nnx.Param)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


def count_active_parameters(config: ModelConfig) -> int:
    """Number of parameters that a token meets: of a mixture's routed experts, those chosen for it."""
    if config.num_experts is None:
        return count_parameters(config)
    mixtures = sum(kind.mlp == "experts" for kind in config.blocks)
    expert = 3 * config.hidden_size * (config.expert_intermediate_size or 0)
    return count_parameters(config) - mixtures * (config.num_experts - config.experts_per_token) * expert


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Model FLOPs of one training token, forward and backward, for model FLOPs utilisation.

    `3 * (2 * P + mixers)`: backward costs twice the forward, recomputation is not counted.
    P counts the parameters that multiply each token: the active ones but the embedding table (a lookup), or
    with tied embeddings all of these, as the table is then the head. Per layer, `mixers` adds

    - delta rule: `6 HV K V`, the three products of the recurrence (`S^T k`, `k u^T`, `S^T q`) at 2 K V
      each; what a chunked implementation spends beyond is its own overhead;
    - attention: `4 heads head_dim c`, with c the mean number of tokens seen by a causal query:
      `(T + 1) / 2`, or for a window w < T `w - w (w - 1) / (2 T)`;
    - latent attention: `2 heads (key size + value size) c`, the keys' size with the shared part.

    Args:
      config: the model.
      seq_len: T, tokens per sequence.

    Raises:
      ValueError: if `seq_len` is not positive.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len}: expected a positive length")
    multiplied = count_active_parameters(config)
    if not config.tie_embeddings:
        multiplied -= config.vocab_size * config.hidden_size
    return 3.0 * (2.0 * multiplied + sum(_mixer_flops(kind, config, seq_len) for kind in config.layers))


def _mixer_flops(kind: str, config: ModelConfig, seq_len: int) -> float:
    if kind in DELTA_MIXERS:
        return 6.0 * config.value_heads * config.head_dim * config.value_dim
    seen = min(config.window_size, seq_len) if kind == "sliding_window" else seq_len
    mean = seen - seen * (seen - 1) / (2 * seq_len)
    if kind == "latent_attention":
        sizes = config.qk_nope_head_dim + config.qk_rope_head_dim + config.latent_v_head_dim
    else:
        sizes = 2 * config.attention_head_dim
    return 2.0 * config.attention_heads * sizes * mean
