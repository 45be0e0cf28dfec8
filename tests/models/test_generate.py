import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax.models import generate

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
