import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltajax.models import LanguageModel, abstract_model, generate, stream
from deltajax.models.decoding import Decoding, Options
from deltajax.models.generate import _advance
from deltajax.models.prefill import bucket
from deltajax.models.sampling import Sampling

PROMPT = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [8, 0, 0, 0, 0]])
LENGTHS = jnp.array([5, 3, 1])
KEY = jax.random.key(7)


def by_full_forwards(run, model, prompt, n):
    """Greedy tokens of one unpadded prompt, each from a forward over everything so far."""
    tokens, size = list(map(int, prompt)), len(prompt) + n
    for _ in range(n):
        padded = jnp.array([tokens + [0] * (size - len(tokens))])  # causal: the padding is not seen
        tokens.append(int(jnp.argmax(run(model, padded)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def test_greedy_generation_equals_argmax_over_full_forwards_for_every_ragged_row(hybrid, run):
    got = generate(hybrid, PROMPT, prompt_lengths=LENGTHS, max_new_tokens=6)
    assert got.shape == (3, 6) and got.dtype == jnp.int32
    for row, prompt, length in zip(got, PROMPT, LENGTHS, strict=True):
        assert list(row) == by_full_forwards(run, hybrid, prompt[: int(length)], 6)


def test_a_hybrid_of_kda_and_latent_attention_generates_as_its_full_forwards(tiny, build, run):
    model = build(
        tiny.replace(
            layer_pattern=("kda", "latent_attention"),
            kv_lora_rank=6,
            qk_nope_head_dim=4,
            qk_rope_head_dim=2,
            latent_v_head_dim=3,
            rope_theta=None,
        )
    )
    (cache,) = model.init_cache(3, 11)  # two layers, one scanned unit
    assert cache[1].latent.shape == (1, 3, 11, 6 + 2)
    got = generate(model, PROMPT, prompt_lengths=LENGTHS, max_new_tokens=6)
    for row, prompt, length in zip(got, PROMPT, LENGTHS, strict=True):
        assert list(row) == by_full_forwards(run, model, prompt[: int(length)], 6)


def test_prompts_of_any_lengths_read_in_pieces_are_read_as_a_whole(short):
    """Packed and in equal rows; pieces end inside prompts."""
    prompts = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8]]
    whole = generate(short, prompts, max_new_tokens=6)
    np.testing.assert_array_equal(generate(short, prompts, max_new_tokens=6, prefill_chunk=5), whole)
    rows = jnp.array([prompts[0], prompts[0][::-1], prompts[0]])
    np.testing.assert_array_equal(
        generate(short, rows, max_new_tokens=6, prefill_chunk=9), generate(short, rows, max_new_tokens=6)
    )
    padded = jnp.array([prompt + [0] * (7 - len(prompt)) for prompt in prompts])
    again = generate(short, padded, prompt_lengths=[7, 1, 4], max_new_tokens=6)
    np.testing.assert_array_equal(again, whole)


def test_a_stream_gives_the_same_tokens_as_they_come_while_its_cache_grows(short):
    options = dict(temperature=1.0, key=jax.random.key(27), stop_tokens=(3,), pad_token=16)
    want = np.asarray(generate(short, PROMPT, prompt_lengths=LENGTHS, max_new_tokens=24, **options))
    got = list(stream(short, PROMPT, prompt_lengths=LENGTHS, **options))
    ends = np.array([list(row).index(3) for row in want])
    assert len(set(ends)) == 3 and max(ends) > 11  # beyond the 16 slots of the start
    assert len(got) == max(ends) + 1
    np.testing.assert_array_equal(np.stack([step.tokens for step in got], axis=1), want[:, : len(got)])
    for n, step in enumerate(got):
        np.testing.assert_array_equal(step.finished, n >= ends)


def test_a_streams_cache_grows_to_what_it_will_hold_at_most(short, monkeypatch):
    module, grown = sys.modules["deltajax.models.generate"], []
    monkeypatch.setattr(module, "_grow", lambda graph, params, cache, slots: grown.append(slots))
    monkeypatch.setattr(module, "_advance", lambda graph, params, state, *_: state)
    for options, steps in ((dict(max_length=40), 36), (dict(max_new_tokens=30), 30)):
        assert len(list(stream(short, PROMPT, prompt_lengths=LENGTHS, **options))) == steps
    assert grown == [32, 40, 32, 34]


def test_a_stream_ends_after_its_tokens_or_with_its_cache(short):
    prompt = jnp.array([[3, 1, 4]])
    got = [
        [int(step.tokens[0]) for step in stream(short, prompt, **options)]
        for options in (dict(max_new_tokens=5), dict(max_length=7), dict(max_new_tokens=5, max_length=100))
    ]
    assert len(got[0]) == 5 and got[0] == got[1] == got[2]
    assert len(list(stream(short, prompt, max_length=3))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_length=4), "prompt 0 has 5 tokens: expected at most max_length=4, the cache's"),
        (dict(max_new_tokens=0), "max_new_tokens=0: expected a positive integer or None"),
        (dict(prefill_chunk=0), "prefill_chunk=0: expected a positive integer"),
        (dict(temperature=1.0), "key=None"),
    ],
)
def test_a_stream_refuses_before_its_first_step(short, options, message):
    with pytest.raises(ValueError, match=message):
        stream(short, PROMPT, **options)


def test_lengths_are_rounded_up_to_few_shapes_of_little_padding():
    shapes = {bucket(n) for n in range(1, 4097)}
    assert len(shapes) < 32
    assert all(n <= bucket(n) < n + max(16, n // 4 + 1) for n in range(1, 4097))


def test_a_step_without_a_scan_over_layers_updates_the_caches_where_they_lie(tiny):
    """By the compiled program: beside the caches there is room for one layer's at most (products copy it)."""
    config = tiny.replace(
        layer_pattern=("latent_attention",), num_layers=4, kv_lora_rank=64, stack_layers=False
    )
    graph, params = nnx.split(abstract_model(config))
    cache = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)).init_cache(2, 2**14))
    rows = jax.eval_shape(lambda: (jnp.zeros((2,), jnp.int32), jnp.zeros((2,), bool), jax.random.split(KEY)))
    state = Decoding(jax.ShapeDtypeStruct((), jnp.int32), *rows, ())
    step = _advance.lower(graph, params, state, cache, Options(Sampling(), (), 0)).compile()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    stats = step.memory_analysis()
    assert stats.alias_size_in_bytes == held
    assert stats.temp_size_in_bytes < 0.3 * held


def test_a_step_of_a_hybrid_makes_no_copy_of_keys_and_values(tiny):
    """By the compiled program: less room than a tenth of one cache of keys, logits included."""
    config = tiny.replace(
        layer_pattern=("gated_delta_net", "full_attention"), num_layers=2, attn_num_heads=4,
        attn_num_kv_heads=2, attn_head_dim=64, attn_qk_norm=True, attn_output_gate=True, stack_layers=False,
    )  # fmt: skip
    graph, params = nnx.split(abstract_model(config))
    cache = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)).init_cache(2, 2**14))
    rows = jax.eval_shape(lambda: (jnp.zeros((2,), jnp.int32), jnp.zeros((2,), bool), jax.random.split(KEY)))
    state = Decoding(jax.ShapeDtypeStruct((), jnp.int32), *rows, ())
    stats = (
        _advance.lower(graph, params, state, cache, Options(Sampling(), (), 0)).compile().memory_analysis()
    )
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)]
    assert stats.alias_size_in_bytes == sum(sizes)
    assert stats.temp_size_in_bytes < 0.1 * max(sizes)


def test_a_rows_tokens_do_not_depend_on_its_neighbours(hybrid):
    options = dict(max_new_tokens=6, temperature=1.0, key=KEY)
    got = generate(hybrid, PROMPT, prompt_lengths=LENGTHS, **options)
    other = PROMPT.at[1:].set(7)
    again = generate(hybrid, other, prompt_lengths=jnp.array([5, 5, 2]), **options)
    np.testing.assert_array_equal(got[0], again[0])


def test_a_finished_row_is_frozen_and_the_others_go_on(hybrid):
    free = generate(hybrid, PROMPT, prompt_lengths=LENGTHS, max_new_tokens=6)
    stop = int(free[0, 1])
    got = generate(
        hybrid, PROMPT, prompt_lengths=LENGTHS, max_new_tokens=6, stop_tokens=(stop,), pad_token=16
    )
    for row, want in zip(np.asarray(got), np.asarray(free), strict=True):
        end = list(want).index(stop) + 1 if stop in want else 6
        np.testing.assert_array_equal(row[:end], want[:end])
        np.testing.assert_array_equal(row[end:], 16)


def test_sampling_is_reproducible_and_follows_the_key(hybrid):
    def draw(key):
        return generate(hybrid, PROMPT, max_new_tokens=6, temperature=2.0, key=key)

    np.testing.assert_array_equal(draw(KEY), draw(KEY))
    assert not jnp.array_equal(draw(KEY), draw(jax.random.key(8)))


@pytest.mark.parametrize(
    "options", [dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-4)], ids=["top_k", "top_p", "cold"]
)
def test_the_narrowest_sampling_is_greedy(hybrid, options):
    greedy = generate(hybrid, PROMPT, max_new_tokens=6)
    got = generate(hybrid, PROMPT, max_new_tokens=6, key=KEY, **({"temperature": 1.0} | options))
    np.testing.assert_array_equal(got, greedy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=-1.0), r"temperature=-1.0: expected a finite number >= 0"),
        (dict(temperature=float("nan")), r"temperature=nan"),
        (dict(temperature=1.0), r"key=None: expected a PRNG key"),
        (dict(top_k=0), r"top_k=0: expected 1 to vocab_size=17"),
        (dict(top_k=18), r"top_k=18"),
        (dict(top_p=0.0), r"top_p=0.0: expected a number in \(0, 1\]"),
        (dict(top_p=1.5), r"top_p=1.5"),
        (dict(max_new_tokens=0), r"max_new_tokens=0"),
        (
            dict(prompt_lengths=jnp.array([0, 1, 1])),
            r"prompt_lengths=\[0, 1, 1\]: expected 3 integers from 1 to 5",
        ),
        (dict(prompt_lengths=jnp.array([6, 1, 1])), r"prompt_lengths=\[6, 1, 1\]"),
    ],
)
def test_invalid_options_raise(hybrid, options, message):
    with pytest.raises(ValueError, match=message):
        generate(hybrid, PROMPT, **({"max_new_tokens": 2} | options))


def test_sequences_that_are_no_ids_raise(short):
    with pytest.raises(
        ValueError, match=r"expected non-empty sequences of ids, got shapes \[\(2,\), \(0,\)\]"
    ):
        generate(short, [[1, 2], []], max_new_tokens=1)
    with pytest.raises(TypeError, match="expected integer ids, got float64"):
        generate(short, [[1.5]], max_new_tokens=1)
    with pytest.raises(TypeError, match="prompt_lengths: expected integers, got float64"):
        generate(short, [[1, 2, 3]], prompt_lengths=[1.5], max_new_tokens=1)


def test_an_empty_prompt_raises(hybrid):
    with pytest.raises(ValueError, match=r"prompt_tokens: expected a non-empty"):
        generate(hybrid, jnp.zeros((2, 0), jnp.int32), max_new_tokens=1)


@pytest.mark.parametrize(
    ("tokens", "seen"),
    [([[3, 17]], "3 to 17"), ([[-1, 3]], "-1 to 3"), (np.array([[2**32, 1]]), f"1 to {2**32}")],
)
def test_prompt_ids_outside_the_vocabulary_raise(hybrid, tokens, seen):
    message = rf"prompt_tokens: expected ids from 0 to vocab_size - 1 = 16, got values from {seen}"
    with pytest.raises(ValueError, match=message):
        generate(hybrid, tokens, max_new_tokens=1)
