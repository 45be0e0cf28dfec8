"""Second moments in bfloat16: unbiased rounding, moments that fall, curves of float32 moments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.config import ConfigError, OptimizerConfig, TrainConfig
from train.config_checks import check
from train.optimizer import make_optimizer, state_layout
from train.rounding import bfloat16_second_moments, round_stochastically

BOTH = dict(moment_dtype="bfloat16", second_moment_dtype="bfloat16")


def test_rounding_goes_to_a_neighbour_and_is_right_in_the_mean():
    drawn = np.exp(np.random.default_rng(0).normal(size=16) * 20)
    x = jnp.asarray([*drawn, *-drawn, 0.0, 1.0, 1e-41], jnp.float32)
    rounded = jax.vmap(lambda key: round_stochastically(x, key))(jax.random.split(jax.random.key(0), 4096))
    assert rounded.dtype == jnp.bfloat16
    values = np.asarray(rounded, np.float64)
    spacing = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(np.asarray(x, np.float64)), 2**-126))) - 7)
    assert np.all(np.abs(values - np.asarray(x)) < spacing)
    # Standard error of the mean: at most half a spacing over sqrt(4096) = 64.
    np.testing.assert_array_less(np.abs(values.mean(0) - np.asarray(x)) / spacing, 4 * 0.5 / 64)
    assert np.all(values[:, -3:-1] == (0.0, 1.0)) and np.ptp(values[:, 0]) > 0


def test_what_is_not_finite_stays_what_it_is():
    x = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, jnp.finfo(jnp.float32).max])
    for seed in range(8):
        rounded = np.asarray(round_stochastically(x, jax.random.key(seed)), np.float32)
        assert np.array_equal(rounded[:3], x[:3], equal_nan=True) and rounded[3] > 3e38


def test_moments_fall_as_in_float32_where_rounding_to_nearest_would_stop_them():
    b2, n = 0.999, 4096
    plain = optax.scale_by_adam(b2=b2)
    wrapped = bfloat16_second_moments(plain)

    def run(optimizer, steps, gradient):
        state = optimizer.init(jnp.ones(n))
        grads = jnp.where(jnp.arange(steps)[:, None] < steps // 2, gradient, 0.0) * jnp.ones(n)
        return jax.jit(lambda s, g: jax.lax.scan(lambda s, g: (optimizer.update(g, s)[1], None), s, g)[0])(
            state, grads
        )

    exact = run(plain, 1000, 1.0).nu
    found = run(wrapped, 1000, 1.0).inner.nu
    assert found.dtype == jnp.bfloat16
    relative = np.asarray(found, np.float32) / np.asarray(exact) - 1
    assert abs(relative.mean()) < 4 * 0.07 / np.sqrt(n) and 0.01 < relative.std() < 0.07
    one = jnp.ones((), jnp.bfloat16)
    assert (one * b2).astype(jnp.bfloat16) == one  # to nearest, it would stay where it is


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_the_curve_is_that_of_float32_moments_and_the_state_half(name):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(256, 16)), jnp.float32)
    y = jnp.tanh(x @ jnp.asarray(rng.normal(size=(16, 8)), jnp.float32))
    shapes = {"embedding": (16, 32), "groups": {"q_proj": {"kernel": (32, 8)}}}
    axes = {"embedding": ("vocab", "embed"), "groups": {"q_proj": {"kernel": ("embed", "heads")}}}
    start = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s) / 4, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )

    def loss(params):
        hidden = jax.nn.silu(x @ params["embedding"])
        return jnp.mean((hidden @ params["groups"]["q_proj"]["kernel"] - y) ** 2)

    def curve(**options):
        optimizer = make_optimizer(
            OptimizerConfig(name=name, weight_decay=0.0, b2=0.999, **options),
            optax.constant_schedule(3e-3),
            axes,
        )

        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        (_, state), losses = jax.jit(lambda s: jax.lax.scan(step, s, None, length=300))(
            (start, optimizer.init(start))
        )
        return np.asarray(losses), sum(x.nbytes for x in jax.tree.leaves(state) if x.size > 3)

    (full, size), (half, half_size) = curve(), curve(**BOTH)
    assert full[-1] < 0.1 * full[0]
    np.testing.assert_allclose(half, full, rtol=0.03)
    assert half_size * 2 == size


def test_draws_repeat_and_differ_between_updates_and_parameters():
    optimizer = bfloat16_second_moments(optax.scale_by_adam())
    grads = {"a": jnp.full(256, 0.3), "b": jnp.full(256, 0.3)}
    state = optimizer.init(grads)
    (_, one), (_, again) = optimizer.update(grads, state), optimizer.update(grads, state)
    _, two = optimizer.update(grads, one)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.all(x == y)), one, again))
    ups = [nu == nu.max() for nu in (one.inner.nu["a"], one.inner.nu["b"], two.inner.nu["a"])]
    assert all(up.any() and not up.all() for up in ups)
    assert (ups[0] != ups[1]).any() and (ups[0] != ups[2]).any()


def test_layouts_differ_and_adafactor_refuses():
    plain = state_layout(OptimizerConfig())
    assert state_layout(OptimizerConfig(**BOTH)) == plain | BOTH and "second_moment_dtype" not in plain
    config = TrainConfig(optimizer=OptimizerConfig(name="adafactor", second_moment_dtype="bfloat16"))
    with pytest.raises(ConfigError, match=r"--optimizer.second-moment-dtype: bfloat16, expected float32"):
        check(config)
