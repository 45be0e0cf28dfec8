import pytest

from deltajax.models import (
    PRESETS,
    count_active_parameters,
    count_parameters,
    flops_per_token,
    get_preset,
)

# delta_net_1p3b is the published count.
PARAMETERS = {
    "tiny_delta_net": 828_800,
    "tiny_gated_delta_net": 827_792,
    "tiny_kda": 960_904,
    "tiny_hybrid": 874_758,
    "tiny_kda_mla": 928_134,
    "tiny_kimi_linear": 1_395_198,
    "tiny_qwen3_next": 1_667_896,
    "tiny_gated_delta_net_h1": 824_584,
    "delta_net_1p3b": 1_365_677_056,
    "delta_net_swa_1p3b": 1_364_987_392,
    "delta_net_global_1p3b": 1_365_562_112,
    "gated_delta_net_1p3b": 1_387_348_732,
    "gated_delta_net_h1_1p3b": 1_302_965_892,
    "kda_1p3b": 1_390_941_568,
    "kda_hybrid_1p3b": 1_384_280_608,
    "kda_mla_1p3b": 1_366_195_744,
    "kimi_linear_48b_a3b": 49_122_681_728,
    "qwen3_next_80b_a3b": 79_674_391_296,
}


def by_hand(config) -> int:
    """The same count, written out from the layers' shapes."""
    D, H, HV, K, V = (
        config.hidden_size,
        config.num_heads,
        config.value_heads,
        config.head_dim,
        config.value_dim,
    )
    qk, v, taps = H * K, HV * V, config.conv_size
    core = D * (2 * qk + v + HV) + taps * (2 * qk + v) + V + v * D
    n, kv, size = config.attention_heads, config.attention_kv_heads, config.attention_head_dim
    attention = 2 * D * size * (n + kv) + D * size * n * config.attn_output_gate
    attention += 2 * size * config.attn_qk_norm
    rank, rope, nope, value = (
        config.kv_lora_rank,
        config.qk_rope_head_dim,
        config.qk_nope_head_dim,
        config.latent_v_head_dim,
    )
    latent = D * n * (nope + rope) + D * (rank + rope) + rank + rank * n * (nope + value) + n * value * D
    low_rank = D * V + V * HV * K + D * V + V * v + v * config.kda_gate_bias
    mixers = {
        "delta_net": core,
        "gated_delta_net": core + D * HV + 2 * HV + D * v,
        "kda": core + low_rank + HV + HV * K,
        "sliding_window": attention,
        "full_attention": attention,
        "latent_attention": latent,
    }
    E, F, shared = config.num_experts or 0, config.expert_intermediate_size or 0, config.num_shared_experts
    mlps = {
        "dense": 3 * D * config.intermediate_size,
        "experts": 3 * D * F * (E + shared) + D * E + E * config.router_bias + D * config.shared_expert_gate,
    }
    dense = config.num_dense_layers if E else config.num_layers
    blocks = sum(
        mixers[kind] + 2 * D + mlps["dense" if i < dense else "experts"]
        for i, kind in enumerate(config.layers)
    )
    return blocks + D + config.vocab_size * D * (1 if config.tie_embeddings else 2)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_its_parameter_count(name):
    assert count_parameters(get_preset(name)) == PARAMETERS[name] == by_hand(get_preset(name))


@pytest.mark.parametrize(
    "name, embeddings", [("kimi_linear_48b_a3b", 163840 * 2304), ("qwen3_next_80b_a3b", 151936 * 2048)]
)
def test_a_token_meets_three_billion_of_the_published_mixtures(name, embeddings):
    config = get_preset(name)
    active = count_active_parameters(config)
    assert 3e9 < active - embeddings < 3.6e9
    all_chosen = config.replace(experts_per_token=config.num_experts)
    assert count_active_parameters(all_chosen) == count_parameters(config)
    mixers = flops_per_token(config, 512) - 6 * (active - embeddings)
    assert 0 < mixers < 0.1 * flops_per_token(config, 512)
    assert count_active_parameters(get_preset("tiny_kda")) == count_parameters(get_preset("tiny_kda"))


def test_tying_the_embeddings_saves_one_table():
    config = get_preset("tiny_kda")
    tied = config.replace(tie_embeddings=True)
    assert count_parameters(config) - count_parameters(tied) == 260 * 128
    assert flops_per_token(config, 64) == flops_per_token(tied, 64)  # the head multiplies either way


def test_flops_are_six_per_parameter_plus_the_recurrence():
    config = get_preset("delta_net_1p3b")
    matmul = 1_365_677_056 - 32000 * 2048
    assert flops_per_token(config, 4096) == 6 * matmul + 24 * 18 * 16 * 128 * 128


def test_attention_flops_grow_with_the_length_only_up_to_the_window():
    def attention(kind, length):
        config = get_preset("tiny_hybrid").replace(layer_pattern=(kind,), num_layers=1, window_size=8)
        pairs = sum(min(t + 1, 8 if kind == "sliding_window" else length) for t in range(length))
        base = 6 * (count_parameters(config) - 260 * 128)
        return flops_per_token(config, length) - base, 3 * 4 * 128 * pairs / length

    for kind in ("full_attention", "sliding_window"):
        for length in (1, 8, 9, 100):
            got, want = attention(kind, length)
            assert got == pytest.approx(want)


def test_latent_attentions_flops_are_those_of_its_keys_and_values():
    config = get_preset("tiny_kda_mla").replace(layer_pattern=("latent_attention",), num_layers=1)
    base = 6 * (count_parameters(config) - 260 * 128)
    assert flops_per_token(config, 100) - base == pytest.approx(3 * 2 * 4 * (32 + 16 + 32) * 50.5)
    ranked = config.replace(q_lora_rank=24)  # one matrix becomes two with a norm between
    assert count_parameters(ranked) - count_parameters(config) == 128 * 24 + 24 + (24 - 128) * 4 * 48


def test_a_length_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="seq_len=0"):
        flops_per_token(get_preset("tiny_kda"), 0)
