"""The bigram baseline is the model it says it is."""

import itertools

import numpy as np
import pytest

from train import baseline
from train.corpus import TokenStore
from train.data import eval_batches
from train.mixture import Mixture


def store(documents):
    offsets = np.concatenate([[0], np.cumsum([len(d) for d in documents])])
    return TokenStore(np.concatenate(documents).astype(np.int32), offsets, int(offsets[-1]))


@pytest.mark.parametrize("dense_cells", [2**24, 0], ids=["dense", "sparse"])
def test_matches_counting_by_hand(monkeypatch, dense_cells):
    monkeypatch.setattr(baseline, "_DENSE_CELLS", dense_cells)
    rng = np.random.default_rng(0)
    train = [rng.integers(0, 5, size=n) for n in (30, 4, 50)]
    held_out = [rng.integers(0, 6, size=20)]  # token 5 was never seen
    vocab = 6
    pairs = [(a, b) for d in train for a, b in itertools.pairwise(d)]

    def nll(a, b):
        unigram = (sum(y == b for _, y in pairs) + 1) / (len(pairs) + vocab)
        joint, context = sum(p == (a, b) for p in pairs), sum(x == a for x, _ in pairs)
        return -np.log((joint + unigram) / (context + 1))

    expected = np.mean([nll(a, b) for a, b in zip(held_out[0][:-1], held_out[0][1:], strict=True)])
    batches = eval_batches(Mixture.of(store(held_out)), seq_len=8, batch_size=2, max_batches=10)
    assert baseline.bigram_loss(store(train), batches, vocab) == pytest.approx(expected, rel=1e-12)
