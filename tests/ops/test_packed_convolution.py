"""Packed sequences with caches of their own: each is the short convolution of itself alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax.ops.packed_convolution import packed_convolution
from tests import cases


def draw(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def test_every_segment_continues_its_own_cache_as_if_alone():
    rng = np.random.default_rng(cases.SEED)
    x, weight, past = draw(rng, 2, 14, 5), draw(rng, 5, 4), draw(rng, 2, 4, 3, 5)
    # Out of order, absent, one and two tokens, padding before, between and after.
    ids = jnp.array([[0, 3, 3, 1, 0, 2, 2, 2, 2, 2, 0, 0, 0, 0], [4] * 8 + [1] * 6])
    x[0, 0] = np.nan
    y, cache = jax.jit(packed_convolution)(x, weight, segment_ids=ids, cache=past)
    for b in range(2):
        assert not np.any(y[b, np.asarray(ids[b]) == 0])
        for n in range(1, 5):
            where = np.flatnonzero(ids[b] == n)
            if len(where) == 0:
                np.testing.assert_array_equal(cache[b, n - 1], past[b, n - 1])
                continue
            inputs = np.concatenate([past[b, n - 1], x[b, where]])
            total = sum(inputs[j : j + len(where)] * weight[:, j] for j in range(4))
            np.testing.assert_allclose(y[b, where], total / (1 + np.exp(-total)), atol=1e-6)
            np.testing.assert_array_equal(cache[b, n - 1], inputs[-3:])


def test_wrong_arguments_are_named():
    x, weight, ids = jnp.ones((1, 4, 5)), jnp.ones((5, 4)), jnp.array([[1, 1, 2, 2]])
    for change, message in (
        (dict(cache=jnp.ones((1, 1, 3, 5))), r"segment_ids must lie in 0\.\.1"),
        (dict(cache=jnp.ones((1, 3, 5))), r"cache must have 4 axes \[B, N, W-1, D\]"),
        (dict(cache=jnp.ones((2, 2, 3, 5))), r"cache must have shape \[B, N, W-1, D\] = \(1, 2, 3, 5\)"),
        (dict(cache=jnp.ones((1, 2, 2, 5))), r"weight must have shape \[D, W\] = \(5, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            packed_convolution(x, weight, segment_ids=ids, **change)
