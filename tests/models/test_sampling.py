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


def test_top_k_keeps_exactly_k_among_equal_logits():
    tokens = sample(jnp.zeros((DRAWS, 4)), Sampling(1.0, top_k=2), KEYS)
    assert len(np.unique(tokens)) == 2
