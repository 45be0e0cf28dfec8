"""Delta learning in logistic regression and hard mini-batches: the effects, and what breaks them."""

import dataclasses

import numpy as np
import pytest

from train.experiments import delta_logistic, hard_batches
from train.experiments.delta_logistic import accuracy, preference_tuned
from train.experiments.hard_batches import work
from train.experiments.statistics import mean_and_band

SMALL = delta_logistic.Options(dimension=100, samples=8000, worse=(-0.3, 0.0, 0.6, 0.75), seeds=8)


def test_pairs_of_weaker_teachers_help_by_their_gap_as_predicted():
    results = delta_logistic.run(SMALL, lambda line: None)
    assert results["student_accuracy"] > results["better_accuracy"] + 0.08
    wide, narrow, none, reverse = results["rows"]
    assert wide["gain"] > narrow["gain"] + 0.002 and narrow["gain"] > narrow["band"] + 0.003
    assert none["gain"] < 0 and reverse["gain"] + reverse["band"] < none["gain"]
    for row in results["rows"]:
        assert row["gain"] == pytest.approx(row["predicted"], abs=0.002)
    assert results["sft"]["gain"] + results["sft"]["band"] < -0.05  # as bad as what it was taught


def test_broken_pairs_do_not_help():
    options = dataclasses.replace(SMALL, dimension=400)
    rng = np.random.default_rng(0)
    truth, other = np.zeros(400), rng.normal(size=400)
    truth[0], other[0] = 1.0, 0.0
    student = 0.8 * truth + 0.6 * other / np.linalg.norm(other)
    inputs = rng.normal(size=(options.samples, 400))
    right, wrong = np.sign(inputs[:, 0]), np.sign(inputs[:, 1])

    def tuned(chosen, rejected):
        found = preference_tuned(student, inputs, chosen, rejected, options)
        return accuracy(found @ truth / np.linalg.norm(found)) - accuracy(0.8)

    assert tuned(right, wrong) > 0.01
    assert tuned(wrong, right) < -0.01
    assert tuned(right, right) == pytest.approx(0, abs=1e-9)


def test_training_on_the_hardest_again_takes_fewer_epochs_for_more_work_each():
    pytest.importorskip("sklearn")
    options = hard_batches.Options(seeds=8, epochs=5, deltas=())
    plain, one, most = (
        hard_batches.train(options, mode, count, True).mean()
        for mode, count in (("plain", 1), ("extra", 1), ("extra", 72))
    )
    assert most > plain + 0.01  # 72 of 89 mini-batches once more
    assert one < plain + 0.005  # what too few, or none, make of it
    assert work("plain", 89, 72) < work("extra", 89, 72) == 3 * (89 + 72)
    assert work("select", 89, 72) == 89 + 3 * 72


def test_confidence_intervals_are_those_of_the_tables():
    mean, band = mean_and_band([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and band == pytest.approx(3.18 * np.std([1, 2, 3, 4], ddof=1) / 2)
    assert mean_and_band([3.0]) == (3.0, 0.0)
