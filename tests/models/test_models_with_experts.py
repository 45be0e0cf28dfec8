"""Kimi Linear and Qwen3-Next in small: ragged prefill and decoding are the full forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax.models import get_preset

T = 9
LENGTHS = (5, 1)
SMALL = dict(
    vocab_size=17, hidden_size=16, num_heads=2, head_dim=8, intermediate_size=24, num_experts=4,
    expert_intermediate_size=6, initializer_range=0.3, implementation="scan",
)  # fmt: skip
CONFIGS = {
    # A first layer without experts.
    "tiny_kimi_linear": dict(
        num_layers=2, layer_pattern=("kda", "latent_attention"), kv_lora_rank=6, qk_nope_head_dim=4,
        qk_rope_head_dim=2, latent_v_head_dim=3,
    ),
    "tiny_qwen3_next": dict(
        num_layers=2, layer_pattern=("gated_delta_net", "full_attention"), attn_head_dim=8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_ragged_prefill_and_decoding_equal_the_full_forward_whatever_the_neighbour(name, build, run):
    model = build(get_preset(name).replace(**SMALL, **CONFIGS[name]))
    tokens = jax.random.randint(jax.random.key(0), (2, T), 0, 17)
    want = run(model, tokens)
    prompt = tokens[:, : max(LENGTHS)]
    ids = (jnp.arange(prompt.shape[1]) < jnp.array(LENGTHS)[:, None]).astype(jnp.int32)
    first, cache = run(model, prompt, ids, model.init_cache(2, T))
    rows = [[first[row, :length]] for row, length in enumerate(LENGTHS)]
    place = jnp.array(LENGTHS)
    for _ in range(T - max(LENGTHS)):
        step, cache = run(model, jnp.take_along_axis(tokens, place[:, None], axis=1), None, cache)
        for row in range(2):
            rows[row].append(step[row])
        place = place + 1
    for row, parts in enumerate(rows):
        got = np.concatenate(parts)
        np.testing.assert_allclose(got, want[row, : len(got)], rtol=2e-4, atol=2e-4)
    other = run(model, tokens.at[1].set(tokens[0, 0]))
    np.testing.assert_array_equal(other[0], want[0])
