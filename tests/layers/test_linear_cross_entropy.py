"""The fused LM head and cross entropy against the plain form, and that it holds no logits of all tokens."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax.layers import linear_cross_entropy
from deltajax.layers.linear_cross_entropy import MAX_LOGITS, _chunk_size
from tests import eight_devices

# Sums over some hundred terms in another order, in the dtype of the accumulators.
ROUNDING = {"float64": 1e-13, "float32": 1e-5}
# d_logits are rounded to the operands' dtype before the two products of the gradients: 2^-9 each, averaged.
BFLOAT16 = 5e-3


def problem(shape=(3, 20), hidden=16, vocab=37, dtype="float32", seed=0):
    """Hidden states, kernel, targets, and a mask whose hidden targets are not even in the vocabulary."""
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(*shape, hidden)).astype(dtype)
    w = (rng.normal(size=(hidden, vocab)) / 2).astype(dtype)
    targets, mask = rng.integers(0, vocab, shape), rng.random(shape) < 0.7
    return h, w, np.where(mask, targets, -100).astype(np.int32), mask


def plain(hidden, kernel, targets, mask=None, z_loss=0.0):
    """All logits at once, JAX's own derivative."""
    logits = hidden @ kernel
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    losses = lse - picked + z_loss * lse**2
    return jnp.sum(losses if mask is None else jnp.where(mask, losses, 0))


def value_and_grads(loss, hidden, kernel, *rest, scale=0.7, **options):
    """Value, and gradients under a cotangent that is not one."""
    f = jax.jit(jax.value_and_grad(lambda h, w: scale * loss(h, w, *rest, **options), (0, 1)))
    value, grads = f(hidden, kernel)
    return value, *grads


def assert_equal(got, expected, tolerance):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(np.abs(b).max()))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("chunk_size", [None, 1, 7, 20, 60, 61])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_value_and_gradients_equal_the_plain_form(dtype, chunk_size, z_loss):
    with jax.enable_x64(dtype == "float64"):
        x = problem(dtype=dtype)
        got = value_and_grads(linear_cross_entropy, *x, z_loss=z_loss, chunk_size=chunk_size)
        assert all(a.dtype == dtype for a in got)
        assert_equal(got, value_and_grads(plain, *x, z_loss=z_loss), ROUNDING[dtype])


def test_without_a_mask_every_token_counts():
    h, w, targets, _ = problem()
    targets = np.maximum(targets, 0)
    got = value_and_grads(linear_cross_entropy, h, w, targets, chunk_size=16)
    assert_equal(got, value_and_grads(plain, h, w, targets), ROUNDING["float32"])


def test_a_batch_of_padding_has_no_loss_and_no_gradient():
    h, w, targets, _ = problem()
    got = value_and_grads(linear_cross_entropy, h, w, targets, np.zeros(targets.shape, bool), chunk_size=16)
    assert all(not np.any(a) for a in got)


def test_value_without_derivative_is_the_same():
    x = problem()
    value = jax.jit(partial(linear_cross_entropy, chunk_size=16))(*x)
    assert float(value) == pytest.approx(float(value_and_grads(linear_cross_entropy, *x, scale=1.0)[0]))


def test_tied_head_gets_the_embeddings_gradient():
    h, w, targets, mask = problem()
    tied = lambda loss: lambda h, table, *rest, **o: loss(h, table.T, *rest, **o)  # noqa: E731
    got = value_and_grads(tied(linear_cross_entropy), h, w.T.copy(), targets, mask, chunk_size=16)
    assert got[2].shape == w.T.shape
    assert_equal(got, value_and_grads(tied(plain), h, w.T.copy(), targets, mask), ROUNDING["float32"])


def test_bfloat16_operands_accumulate_in_float32():
    h, w, targets, mask = problem((4, 200), 64, 300)
    h = jnp.asarray(h, jnp.bfloat16)
    value, d_h, d_w = value_and_grads(linear_cross_entropy, h, w, targets, mask, chunk_size=100)
    assert value.dtype == jnp.float32 and d_h.dtype == jnp.bfloat16 and d_w.dtype == jnp.float32
    rounded = jnp.asarray(w, jnp.bfloat16).astype(jnp.float32)
    expected = value_and_grads(plain, h.astype(jnp.float32), rounded, targets, mask)
    # Only the order of float32 sums differs in the value: no logit was rounded.
    assert float(value) == pytest.approx(float(expected[0]), rel=1e-6)
    for a, b in zip((d_h, d_w), expected[1:], strict=True):
        assert np.linalg.norm(np.asarray(a, np.float32) - b) < BFLOAT16 * np.linalg.norm(b)


def test_large_logits_stay_finite():
    h, w, targets, mask = problem()
    got = value_and_grads(linear_cross_entropy, 100 * h, 10 * w, targets, mask, chunk_size=16)
    assert all(np.isfinite(a).all() for a in got)
    assert_equal(got, value_and_grads(plain, 100 * h, 10 * w, targets, mask), 1e-4)


def test_works_under_vmap_and_remat():
    h, w, targets, mask = problem()
    fused = jax.checkpoint(partial(linear_cross_entropy, chunk_size=16))
    sums = lambda loss: lambda h, w, *rest: jax.vmap(lambda h, *r: loss(h[None], w, *r))(h, *rest).sum()  # noqa: E731
    rows = (targets[:, None], mask[:, None])
    got = value_and_grads(sums(fused), h, w, *rows)
    assert_equal(got, value_and_grads(plain, h, w, targets, mask), ROUNDING["float32"])


@pytest.mark.parametrize("differentiated", [False, True])
def test_no_buffer_holds_the_logits_of_all_tokens(differentiated):
    tokens, D, vocab, chunk = 1024, 8, 512, 128
    h, w, targets, mask = problem((2, tokens // 2), D, vocab)

    def compile(loss):
        loss = jax.value_and_grad(loss, (0, 1)) if differentiated else loss
        return jax.jit(loss).lower(h, w, targets, mask).compile()

    def largest(compiled):  # of all shapes in the program
        shapes = re.findall(r"\w+\[([\d,]+)\]", compiled.as_text())
        return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)

    fused, whole = compile(partial(linear_cross_entropy, chunk_size=chunk)), compile(plain)
    assert largest(whole) == tokens * vocab
    assert largest(fused) == chunk * vocab
    all_logits = tokens * vocab * 4
    assert whole.memory_analysis().temp_size_in_bytes >= all_logits
    assert fused.memory_analysis().temp_size_in_bytes < all_logits


def test_gradients_take_three_products_and_the_value_one():
    x = problem()
    fused = partial(linear_cross_entropy, chunk_size=16)
    count = lambda f: str(jax.make_jaxpr(f)(*x)).count("dot_general")  # noqa: E731
    assert count(fused) == 1 and count(jax.grad(fused, (0, 1))) == 3


def test_chunks_are_even_tiled_and_hold_few_logits():
    assert _chunk_size(16384, 32000, None) == 2048
    assert _chunk_size(16385, 32000, None) == 1920  # 9 chunks, not 8 and one of a single token
    assert _chunk_size(100, 260, None) == 100
    assert _chunk_size(10, 2 * MAX_LOGITS, None) == 1
    for tokens in (1, 127, 4096, 100_003):
        for vocab in (2, 50_257, 262_144):
            size = _chunk_size(tokens, vocab, None)
            assert size * vocab <= MAX_LOGITS and 1 <= size <= tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hidden=jnp.ones((2, 3), jnp.int32)), "hidden: expected a float dtype, got int32"),
        (dict(hidden=jnp.ones(4)), r"hidden: expected shape .* got \(4,\)"),
        (dict(kernel=jnp.ones((5, 7))), r"kernel: expected shape \[D, vocab\] .* got \(5, 7\)"),
        (dict(targets=jnp.ones((2, 3))), "targets: expected integers of shape .* got float32"),
        (dict(targets=jnp.ones((2, 4), jnp.int32)), r"targets: .* got int32 \(2, 4\)"),
        (dict(mask=jnp.ones((2, 3))), "mask: expected bool of shape .* got float32"),
        (dict(z_loss=-1.0), "z_loss: expected 0 or more and finite, got -1.0"),
        (dict(chunk_size=0), "chunk_size: expected a positive number .* got 0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    good = dict(hidden=jnp.ones((2, 3, 4)), kernel=jnp.ones((4, 7)), targets=jnp.ones((2, 3), jnp.int32))
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(good | change))


def test_sharded_loss_equals_one_devices_and_gathers_no_activation():
    eight_devices.check("tests.layers.sharded_loss", least=6)
