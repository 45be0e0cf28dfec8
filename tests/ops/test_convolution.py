"""The short convolution: definition, segments, cache, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from deltajax.ops import short_convolution
from tests import cases


@pytest.fixture
def rng():
    return np.random.default_rng(cases.SEED)


def draw(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def test_it_is_a_causal_depthwise_convolution(rng):
    x, weight, bias = draw(rng, 2, 9, 5), draw(rng, 5, 4), draw(rng, 5)
    y, cache = short_convolution(x, weight, bias=bias)
    padded = np.concatenate([np.zeros((2, 3, 5)), x], axis=1)
    expected = np.stack([np.einsum("bwd,dw->bd", padded[:, t : t + 4], weight) for t in range(9)], 1) + bias
    np.testing.assert_allclose(y, expected / (1 + np.exp(-expected)), atol=1e-5)
    np.testing.assert_array_equal(cache, x[:, -3:])
    linear, _ = short_convolution(x, weight, activation=None)
    np.testing.assert_allclose(linear, expected - bias, atol=1e-5)


@pytest.mark.parametrize("T", (1, 2, 3, 12))
def test_token_by_token_with_a_cache_equals_the_whole(rng, T):
    x, weight = draw(rng, 2, T, 5), draw(rng, 5, 4)
    whole, last = short_convolution(x, weight)
    cache, parts = jnp.zeros((2, 3, 5)), []
    for t in range(T):
        y, cache = short_convolution(x[:, t : t + 1], weight, cache=cache)
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-6)
    np.testing.assert_array_equal(cache, last)


def packed_ids():
    return jnp.array([[0, 0, 1, 1, 1, 1, 0, 2, 3, 3, 3, 3, 3, 0], [1] * 2 + [2] * 3 + [5] * 9], jnp.int32)


def test_packed_rows_equal_their_sequences_alone_in_outputs_and_gradients(rng):
    x, weight, ids = draw(rng, 2, 14, 5), draw(rng, 5, 4), packed_ids()
    dy = draw(rng, 2, 14, 5)
    run = lambda x, ids: jax.vjp(lambda x, w: short_convolution(x, w, segment_ids=ids)[0], x, weight)  # noqa: E731
    y, pull = run(x, ids)
    dx, dweight = pull(dy)
    total = 0
    for b in range(2):
        for n in np.unique(ids[b]):
            where = np.flatnonzero(ids[b] == n)
            if n == 0:
                assert not np.any(y[b, where]) and not np.any(dx[b, where])
                continue
            part = slice(where[0], where[-1] + 1)
            y1, pull = run(x[b : b + 1, part], None)
            dx1, dw1 = pull(dy[b : b + 1, part])
            np.testing.assert_allclose(y[b, part], y1[0], atol=1e-6)
            np.testing.assert_allclose(dx[b, part], dx1[0], atol=1e-6)
            total = total + dw1
    np.testing.assert_allclose(dweight, total, atol=1e-5)


def test_the_cache_holds_the_last_segments_last_inputs_without_padding(rng):
    x, weight = draw(rng, 3, 8, 5), draw(rng, 5, 4)
    ids = jnp.array([[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0, 2, 2], [0] * 8], jnp.int32)
    before = draw(rng, 3, 3, 5)
    _, cache = short_convolution(x, weight, segment_ids=ids, cache=before)
    np.testing.assert_array_equal(cache[0], x[0, 2:5])
    np.testing.assert_array_equal(cache[1], jnp.concatenate([jnp.zeros((1, 5)), x[1, 6:8]]))
    np.testing.assert_array_equal(cache[2], before[2])


@pytest.mark.parametrize("activation", ("silu", None))
@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("cached", (False, True))
def test_gradients_are_those_of_finite_differences(rng, activation, packed, cached):
    ids = packed_ids() if packed else None
    with jax.enable_x64(True):
        x, weight, bias, before = (
            jnp.asarray(rng.normal(size=shape)) for shape in ((2, 14, 5), (5, 4), (5,), (2, 3, 5))
        )

        def run(x, weight, bias, before):
            cache = before if cached else None
            return short_convolution(
                x, weight, bias=bias, activation=activation, segment_ids=ids, cache=cache
            )

        check_grads(run, (x, weight, bias, before), order=1, modes=["rev"])


def test_what_stands_at_padding_reaches_nothing(rng):
    x, weight, bias, ids = draw(rng, 2, 14, 5), draw(rng, 5, 4), draw(rng, 5), packed_ids()

    def run(x):
        y, pull = jax.vjp(lambda x, w, b: short_convolution(x, w, bias=b, segment_ids=ids), x, weight, bias)
        return y, pull(y)

    jax.tree.map(np.testing.assert_array_equal, run(x), run(jnp.where((ids == 0)[..., None], jnp.nan, x)))


@pytest.mark.parametrize("dtype", (np.uint8, np.int8, np.int32))
def test_many_segments_do_not_wrap_around_in_small_id_types(rng, dtype):
    x, weight = draw(rng, 1, 600, 2), draw(rng, 2, 4)
    ids = (1 + np.arange(600)[None] % 2).astype(dtype)  # 600 segments of one token
    y, _ = short_convolution(x, weight, segment_ids=jnp.asarray(ids), activation=None)
    np.testing.assert_allclose(y, x * weight[:, -1], atol=1e-6)


def test_leading_padding_does_not_come_between_a_cache_and_its_sequence(rng):
    x, weight, before = draw(rng, 1, 4, 5), draw(rng, 5, 4), draw(rng, 1, 3, 5)
    padded = jnp.concatenate([draw(rng, 1, 3, 5), x], axis=1)
    ids = jnp.array([[0, 0, 0, 1, 1, 1, 1]], jnp.int32)
    plain, plain_cache = short_convolution(x, weight, cache=before)
    y, cache = short_convolution(padded, weight, segment_ids=ids, cache=before)
    np.testing.assert_allclose(y[:, 3:], plain, atol=1e-6)
    np.testing.assert_array_equal(cache, plain_cache)


def test_a_decoding_step_scatters_nothing():
    """GPUs take 0.7 ms for a scatter of a few numbers."""
    shapes = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 1, 64), (64, 4), (2, 3, 64)))
    ids = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    step = jax.jit(lambda x, weight, cache, ids: short_convolution(x, weight, cache=cache, segment_ids=ids))
    assert "scatter" not in step.lower(*shapes, ids).as_text()


def test_half_precision_inputs_are_summed_in_float32(rng):
    x, weight = draw(rng, 1, 50, 8).astype(jnp.bfloat16), draw(rng, 8, 4)
    y, cache = short_convolution(x, weight)
    assert y.dtype == jnp.bfloat16 and cache.dtype == jnp.bfloat16
    exact, _ = short_convolution(x.astype(jnp.float32), weight)
    assert cases.relative_error(y.astype(jnp.float32), exact) < 2**-8


BAD = {
    "x must have 3 axes": dict(x=np.ones((3, 4), np.float32)),
    "x must have a floating dtype": dict(x=np.ones((1, 3, 4), np.int32)),
    r"weight must have shape \[D, W\]": dict(weight=np.ones((5, 4), np.float32)),
    "weight must have at least W = 2 taps": dict(weight=np.ones((4, 1), np.float32)),
    "bias must have shape": dict(bias=np.ones(3, np.float32)),
    "activation must be 'silu' or None, got 'gelu'": dict(activation="gelu"),
    "segment_ids must have an integer dtype": dict(segment_ids=np.ones((1, 3), np.float32)),
    "cache must have shape": dict(cache=np.ones((1, 4, 4), np.float32)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    good = dict(x=np.ones((1, 3, 4), np.float32), weight=np.ones((4, 4), np.float32))
    call = good | BAD[message]
    with pytest.raises((ValueError, TypeError), match=message):
        short_convolution(call.pop("x"), call.pop("weight"), **call)


def test_a_cache_of_spread_rows_is_refused(rng):
    x, weight = draw(rng, 2, 9, 5), draw(rng, 5, 4)
    with pytest.raises(ValueError, match="cache must be None with axis_name='context'"):
        short_convolution(x, weight, cache=jnp.zeros((2, 3, 5)), axis_name="context")
