"""Properties that every mixer keeps: caches, packing, padding, rows, gradients, axis names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

HIDDEN = 24
T = 9
# Float32 sums in another order (chunked against one token at a time).
TOLERANCE = dict(rtol=1e-4, atol=2e-5)

# Where a property is the same code for the others.
ONE_OF_EACH = ("delta_net", "gated_delta_net_grouped", "kda", "sliding_window", "latent_attention")


def inputs(batch: int, length: int = T, seed: int = 0):
    return np.random.default_rng(seed).standard_normal((batch, length, HIDDEN), np.float32)


def decode(mixer, x, cache):
    outputs = []
    for t in range(x.shape[1]):
        y, cache = mixer(x[:, t : t + 1], cache=cache)
        outputs.append(y)
    return np.concatenate(outputs, axis=1), cache


def twice(row):
    """One row as a batch of two, so that the calls compiled for other tests serve."""
    return np.concatenate([row, row])


@pytest.mark.parametrize("prefix", [0, 1, 4])
def test_cached_decode_from_any_prefix_equals_the_full_forward(mixer, prefix):
    x = inputs(2)
    cache = mixer.cache(2)
    if prefix:
        _, cache = mixer(x[:, :prefix], cache=cache)
    y, _ = decode(mixer, x[:, prefix:], cache)
    np.testing.assert_allclose(y, mixer(x)[:, prefix:], **TOLERANCE)


@pytest.mark.parametrize("split", [1, 4])
def test_splitting_at_any_point_with_caches_equals_no_splitting(mixer, split):
    x = inputs(2)
    y1, cache = mixer(x[:, :split], cache=mixer.cache(2))
    y2, cache = mixer(x[:, split:], cache=cache)
    y, whole = mixer(x, cache=mixer.cache(2))
    np.testing.assert_allclose(np.concatenate([y1, y2], axis=1), y, **TOLERANCE)
    np.testing.assert_allclose(y, mixer(x), **TOLERANCE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), cache, whole)


def test_splits_and_cached_decode_equal_the_full_forward_with_the_default_implementation(default_mixer):
    x = inputs(2)
    full = default_mixer(x)
    whole, cache_of_whole = default_mixer(x, cache=default_mixer.cache(2))
    y1, cache = default_mixer(x[:, :4], cache=default_mixer.cache(2))
    y2, cache_of_split = default_mixer(x[:, 4:], cache=cache)
    decoded, cache_of_steps = decode(default_mixer, x[:, 4:], cache)
    for y in (whole, np.concatenate([y1, y2], axis=1), np.concatenate([y1, decoded], axis=1)):
        np.testing.assert_allclose(y, full, **TOLERANCE)
    for cache in (cache_of_split, cache_of_steps):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), cache, cache_of_whole)


def test_packed_segments_equal_sequences_run_alone_in_outputs_and_gradients(mixer):
    x, weight = inputs(1), inputs(1, seed=1)
    ids = np.array([[7, 7, 7, 7, 2, 2, 2, 2, 0]])
    pieces = [(0, 4), (4, 8)]

    y, got = mixer.gradients(x, ids, weight)
    alone = [mixer.gradients(x[:, a:b], None, weight[:, a:b]) for a, b in pieces]
    for (a, b), (piece, _) in zip(pieces, alone, strict=True):
        np.testing.assert_allclose(y[:, a:b], piece, **TOLERANCE)
    np.testing.assert_array_equal(y[:, 8], 0)
    want = jax.tree.map(np.add, alone[0][1][0], alone[1][1][0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got[0], want)
    for (a, b), (_, grads) in zip(pieces, alone, strict=True):
        np.testing.assert_allclose(got[1][:, a:b], grads[1], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(got[1][:, 8], 0)


@pytest.mark.parametrize("side", ["trailing", "leading"])
def test_ragged_rows_equal_each_row_alone_through_prefill_and_decode(mixer, side):
    x, more = inputs(3), inputs(3, 3, seed=1)
    lengths = [9, 1, 4]
    real = np.arange(T) < np.array(lengths)[:, None]
    ids = (real if side == "trailing" else real[:, ::-1]).astype(np.int32)
    y, cache = mixer(x, ids, mixer.cache(3))
    z, _ = decode(mixer, more, cache)
    for i, n in enumerate(lengths):
        a, b = (0, n) if side == "trailing" else (T - n, T)
        alone, row = mixer(twice(x[i : i + 1, a:b]), cache=mixer.cache(2))
        np.testing.assert_allclose(y[i, a:b], alone[0], **TOLERANCE)
        np.testing.assert_allclose(z[i], decode(mixer, twice(more[i : i + 1]), row)[0][0], **TOLERANCE)


def test_after_a_packed_prefill_the_cache_continues_the_last_segment(mixer):
    x = inputs(2)
    ids = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0]] * 2)
    _, cache = mixer(x, ids, mixer.cache(2))
    _, alone = mixer(x[:, 3:7], cache=mixer.cache(2))
    more = inputs(2, 2, seed=1)
    np.testing.assert_allclose(decode(mixer, more, cache)[0], decode(mixer, more, alone)[0], **TOLERANCE)


@pytest.mark.parametrize("mixer", ONE_OF_EACH[1:], indirect=True)
def test_a_packed_call_continues_every_sequence_by_its_own_cache(mixer):
    x, rows = inputs(1), inputs(4, seed=1)
    # What each has seen, and the new tokens: out of order, one without any, padding between.
    seen = (np.arange(T) < np.array([9, 1, 4, 0])[:, None]).astype(np.int32)
    ids = np.array([[4, 4, 4, 1, 1, 0, 0, 2, 0]])
    _, before = mixer(rows, seen, mixer.cache(4))
    y, cache = mixer(x, ids, before, num_segments=4)
    np.testing.assert_array_equal(y[0, ids[0] == 0], 0)
    padded, own = np.zeros_like(rows[:, :3]), np.zeros((4, 3), np.int32)
    for n in (4, 1, 2):
        count = (ids[0] == n).sum()
        padded[n - 1, :count], own[n - 1, :count] = x[0, ids[0] == n], 1
    want, after = mixer(padded, own, before)
    for n in (4, 1, 2):
        np.testing.assert_allclose(y[0, ids[0] == n], want[n - 1, own[n - 1] == 1], **TOLERANCE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), cache, after)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[2], b[2]), cache, before)


@pytest.mark.parametrize(
    ("mixer", "length"),
    [*((name, 4) for name in ONE_OF_EACH), ("sliding_window", 1)],
    indirect=["mixer"],
)
def test_tokens_on_hold_are_kept_up_to_any_count(mixer, length):
    x, counts = inputs(3, length), np.array([length, 0, length // 2])
    _, before = mixer(inputs(3, seed=1), cache=mixer.cache(3))
    y, pending = mixer(x, cache=before, hold=True)
    whole, _ = mixer(x, cache=before)
    np.testing.assert_allclose(y, whole, **TOLERANCE)
    got = mixer.keep(pending, counts)
    _, want = mixer(x, (np.arange(length) < counts[:, None]).astype(np.int32), before)
    assert type(got) is type(before)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), got, want)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), got, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_segments=2), "num_segments=2: expected a cache with as many rows, got none"),
        (dict(num_segments=2, rows=3), "one row of tokens and a cache of 2 rows, got 1 and 3"),
        (dict(num_segments=2, rows=2, batch=2), "one row of tokens and a cache of 2 rows, got 2 and 2"),
        (dict(hold=True), "hold=True: expected a cache, and num_segments=None"),
        (dict(hold=True, num_segments=2, rows=2), "hold=True: expected a cache, and num_segments=None"),
        (dict(rows=3), "cache: expected one of 1 rows, as many as the input's, got 3"),
    ],
)
@pytest.mark.parametrize("mixer", ["kda", "full_attention", "latent_attention"], indirect=True)
def test_arguments_that_do_not_go_together_are_named(mixer, options, message):
    options = dict(options)
    batch, rows = options.pop("batch", 1), options.pop("rows", None)
    cache = None if rows is None else mixer.cache(rows)
    with pytest.raises(ValueError, match=message):
        mixer.layer(inputs(batch), segment_ids=np.ones((batch, T), np.int32), cache=cache, **options)


@pytest.mark.parametrize("length", [1, 4])
def test_a_row_of_padding_outputs_zero_and_leaves_its_cache_alone(mixer, length):
    _, cache = mixer(inputs(2), cache=mixer.cache(2))
    ids = np.array([[1] * length, [0] * length])
    y, after = mixer(inputs(2, length, seed=1), ids, cache)
    np.testing.assert_array_equal(y[1], 0)
    assert np.abs(y[0]).max() > 0
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), cache, after)


def test_outputs_do_not_depend_on_batch_neighbours(mixer):
    x = inputs(2)
    other = np.stack([x[0], np.full_like(x[0], 100.0)])
    ids = np.array([[1] * T, [1] * 4 + [0] * (T - 4)])
    np.testing.assert_array_equal(mixer(x)[0], mixer(other)[0])
    np.testing.assert_array_equal(mixer(x, ids)[0], mixer(other, np.ones_like(ids))[0])


def test_outputs_do_not_depend_on_later_tokens(mixer):
    x, other = inputs(2), inputs(2)
    other[:, 5:] = 9.0
    np.testing.assert_allclose(mixer(x)[:, :5], mixer(other)[:, :5], **TOLERANCE)


def test_gradients_are_finite_and_reach_every_parameter(mixer):
    _, (grads, _) = mixer.gradients(inputs(1), np.ones((1, T), np.int32), inputs(1, seed=1))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all(), path
        assert np.abs(grad).max() > 0, path


def test_gradients_are_finite_at_zero_inputs(mixer):
    zeros = np.zeros((1, T, HIDDEN), np.float32)
    _, grads = mixer.gradients(zeros, np.ones((1, T), np.int32), inputs(1))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_the_default_implementation_equals_the_recurrence(default_and_scan):
    x, ids = inputs(2), np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0]] * 2)
    default, scan = default_and_scan
    np.testing.assert_allclose(default(x, ids), scan(x, ids), **TOLERANCE)


def test_bfloat16_compute_keeps_float32_parameters_state_and_gradients(bfloat16_mixer):
    mixer = bfloat16_mixer
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(mixer.state))
    x = inputs(2)
    y, cache = mixer(x, cache=mixer.cache(2))
    assert y.dtype == jnp.bfloat16
    if hasattr(cache, "state"):
        assert cache.state.dtype == jnp.float32 and cache.q_conv.dtype == jnp.bfloat16
    _, (grads, _) = mixer.gradients(x, None, x)
    assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_every_parameter_has_one_logical_axis_name_per_dimension(mixer):
    known = {"embed", "heads", "kv_heads", "head_dim", "conv", "latent"}
    for path, param in nnx.to_flat_state(mixer.state):
        axes = param.get_metadata("out_sharding")
        assert len(axes) == param.ndim and set(axes) <= known and len(set(axes)) == len(axes), path
    specs = nnx.get_partition_spec(mixer.state)
    assert jax.tree.structure(specs) == jax.tree.structure(mixer.state)
