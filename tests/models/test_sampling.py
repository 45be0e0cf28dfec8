import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax.models.sampling import Sampling, sample

PROBABILITY = np.array([0.4, 0.1, 0.3, 0.2])
DRAWS = 4000
KEYS = jax.random.split(jax.random.key(0), DRAWS)
LOGITS = jnp.broadcast_to(jnp.log(PROBABILITY), (DRAWS, 4)).astype(jnp.float32)


def frequency(options):
    return np.bincount(np.asarray(sample(LOGITS, options, KEYS)), minlength=4) / DRAWS


@pytest.mark.parametrize(
    ("options", "want"),
    [
        (Sampling(1.0), PROBABILITY),
        (Sampling(0.5), PROBABILITY**2 / np.sum(PROBABILITY**2)),
        (Sampling(1.0, top_k=2), np.array([4, 0, 3, 0]) / 7),
        (Sampling(1.0, top_p=0.7), np.array([4, 0, 3, 0]) / 7),
        (Sampling(1.0, top_p=0.75), np.array([4, 0, 3, 2]) / 9),
        (Sampling(1.0, top_k=3, top_p=0.5), np.array([4, 0, 3, 0]) / 7),
        (Sampling(0.0), np.array([1, 0, 0, 0])),
    ],
    ids=lambda value: str(tuple(value)) if isinstance(value, Sampling) else "",
)
def test_frequencies_are_the_truncated_and_tempered_probabilities(options, want):
    # Four standard deviations of a frequency over DRAWS draws is at most 0.032.
    np.testing.assert_allclose(frequency(options), want, atol=0.032)
    np.testing.assert_array_equal(frequency(options)[want == 0], 0)


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45, 1e-60])
def test_the_coldest_sampling_takes_the_likeliest(temperature):
    logits = jnp.array([[1.0, 5.0, 3.0, -2.0], [1e-3, 0.0, -1e9, 2e-3]])
    for options in (Sampling(temperature), Sampling(temperature, top_k=2, top_p=0.9)):
        np.testing.assert_array_equal(sample(logits, options, KEYS[:2]), [1, 3])


def test_top_k_keeps_exactly_k_among_equal_logits():
    tokens = sample(jnp.zeros((DRAWS, 4)), Sampling(1.0, top_k=2), KEYS)
    assert len(np.unique(tokens)) == 2
