"""Speculative decoding: whatever is drafted, the tokens are those of plain greedy decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltajax.models import accept_greedy, generate, keep, verify
from deltajax.models.prefill import prefill

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [8]]
DRAFTED, COUNT = 3, 20


@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def round_(graph, params, cache, last, drafts):
    tokens = jnp.concatenate([last[:, None], drafts], axis=1)
    logits, held = verify(nnx.merge(graph, params), cache, tokens)
    counts, following = accept_greedy(logits, tokens)
    return counts, following, keep(held, counts)


def test_greedy_decoding_from_random_drafts_is_plain_greedy_decoding(short):
    assert [group.repeats for group in short.groups] == [2, 1]
    want = np.asarray(generate(short, PROMPTS, max_new_tokens=COUNT))
    graph, params = nnx.split(short)
    hidden, cache = prefill(short, [np.array(p) for p in PROMPTS], max_length=5 + COUNT + DRAFTED)
    last = jnp.argmax(short.logits(hidden), axis=-1).astype(jnp.int32)
    rng = np.random.default_rng(0)
    got, accepted = [[int(token)] for token in last], []
    while min(map(len, got)) < COUNT:
        drafts = rng.integers(0, 17, (3, DRAFTED))
        for row, tokens in enumerate(got):  # often right, so that all counts occur
            for i in range(DRAFTED):
                if len(tokens) + i < COUNT and rng.random() < 0.7:
                    drafts[row, i] = want[row, len(tokens) + i]
        counts, last, cache = round_(graph, params, cache, last, jnp.asarray(drafts, jnp.int32))
        for row in range(3):
            n = int(counts[row])
            accepted.append(n)
            got[row] += [*map(int, drafts[row, : n - 1]), int(last[row])]
    for row in range(3):
        assert got[row][:COUNT] == list(want[row])
    assert set(accepted) == {1, 2, 3, 4}


def test_padding_is_not_kept_even_where_its_token_is_the_likeliest():
    """Three, one and no drafts, all right, and a row of padding."""
    likeliest = np.tile([4, 5, 6, 7], (4, 1))
    tokens = np.concatenate([np.full((4, 1), 3), likeliest[:, :-1]], axis=1)  # padding too
    ids = np.arange(4) < np.array([[4], [2], [1], [0]])
    counts, following = accept_greedy(
        jax.nn.one_hot(likeliest, 9), jnp.asarray(tokens), segment_ids=jnp.asarray(ids, jnp.int32)
    )
    np.testing.assert_array_equal(counts, [4, 2, 1, 0])
    np.testing.assert_array_equal(following[:3], [7, 5, 4])
