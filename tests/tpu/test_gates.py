"""Sums of per-channel log decays."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.tpu import gates, relations
from pallas_kernels.tpu.config import Config
from tests import cases

CONFIG = Config("channel", "softplus", None, 1.0, True)


def test_sums_around_the_middles_of_blocks_equal_differences_of_sums():
    g = -np.random.default_rng(cases.SEED).exponential(size=(64, 128)).astype(np.float32)
    got = gates.around_middles(jnp.asarray(g), 8)
    sums = np.cumsum(g.astype(np.float64), axis=0)
    middles = np.arange(64) // 8 * 8 + 4
    np.testing.assert_allclose(got, sums - (sums - g / 2)[middles], atol=2e-4)


def test_capped_decays_stay_finite_about_a_middle_and_leave_next_to_nothing():
    """-100 on every token: both factors are finite numbers, and a neighbour's weight is below 2e-10."""
    g = jnp.full((64, 128), -100.0)
    cap = relations.CAP * gates.LOG2E
    near = gates.around_middles(jnp.maximum(g, cap), relations.CAPPED)
    since, until = relations.Decays(gates.cumulative(g), near, CONFIG, passes=1).inside()
    assert np.isfinite(since).all() and np.isfinite(until).all() and (since > 0).all() and (until > 0).all()
    weights = np.asarray(since[1:] * until[:-1])
    assert weights[np.arange(63) % 8 != 7].max() < 2e-10
    np.testing.assert_allclose(since * until, 1, rtol=1e-5)


def test_bounded_gates_and_float32_operands_have_no_cap():
    bounded = Config("channel", "bounded", -5.0, 1.0, True)
    assert relations.capped(CONFIG, passes=1)
    assert not relations.capped(CONFIG, passes=3)
    assert not relations.capped(bounded, passes=1)
    assert relations.middle_block(CONFIG, passes=3) == 1
    assert relations.middle_block(bounded, passes=1) == relations.middle_block(bounded, passes=3) == 32
