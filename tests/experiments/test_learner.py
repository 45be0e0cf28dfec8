"""The learner: lanes are models of their own, losses are plain cross entropies, accuracies are counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deltajax.models import ModelConfig
from train.config import OptimizerConfig
from train.experiments import readout
from train.experiments.lanes import Lane
from train.experiments.learner import Learner, Plan
from train.tasks import MQAR, Compression, Stacks, sample_rows
from train.tasks.source import split_key

STACKS = Stacks(stacks=2, symbols=3)


def learner(task, length, lanes="together"):
    config = ModelConfig(
        vocab_size=task.vocab_size,
        hidden_size=16,
        num_layers=1,
        layer_pattern=("delta_net",),
        num_heads=1,
        head_dim=16,
        intermediate_size=16,
        scan_layers=False,
        # Large enough that the first losses differ.
        initializer_range=0.3,
    )
    optimizer = OptimizerConfig(learning_rate=1.0, warmup_steps=1)
    plan = Plan(steps=4, batch_size=4, optimizer=optimizer, steps_per_call=2, eval_rows=8, lanes=lanes)
    return Learner(config, task, length, plan)


def test_lanes_are_models_of_their_own():
    lanes = [Lane(1e-2, 0), Lane(1e-2, 1), Lane(3e-2, 0)]

    def run(lanes, how):
        x = learner(STACKS, 24, how)
        state, found = x.init(lanes), []
        for _ in range(2):
            state, losses = x.advance(state)
            found.append(losses)
        assert int(state.step) == 4
        return np.concatenate(found), x.measure(state)

    together, scores = run(lanes, "together")
    in_turn, scores_in_turn = run(lanes, "in_turn")
    assert together.shape == (4, 3)
    np.testing.assert_allclose(together, in_turn, rtol=1e-4)
    np.testing.assert_allclose(scores.answers, scores_in_turn.answers, atol=0.02)
    # The first step's loss is the seed's, those after it the rate's too.
    assert together[0, 0] == pytest.approx(together[0, 2], rel=1e-5)
    assert abs(together[0, 0] - together[0, 1]) > 1e-3
    assert abs(together[2, 0] - together[2, 2]) > 1e-3


@pytest.mark.parametrize("task", [STACKS, Compression(symbols=5)], ids=["each", "last"])
def test_loss_and_accuracy_are_those_of_the_answers(task):
    x = learner(task, 12)
    state = x.init([Lane(1e-2, 3)])
    params = jax.tree.map(lambda p: p[0], state.params)
    model, decoder = x.model.model(params["model"]), params.get("decoder")
    rows = sample_rows(task, 12, split_key(0, "eval"), jnp.arange(8, dtype=jnp.uint32))
    asked = readout.questions(task, rows)

    if task.reads_last:
        everywhere = asked._replace(places=jnp.broadcast_to(jnp.arange(12), (8, 12)))
        logits = model.logits(readout.answer_states(task, model, decoder, everywhere))
        # One state answers for all positions: what follows from another last token differs everywhere.
        other = everywhere._replace(tokens=asked.tokens.at[:, -1].set(0))
        changed = model.logits(readout.answer_states(task, model, decoder, other))
        assert jnp.all(jnp.any(jnp.abs(changed - logits) > 1e-6, axis=-1))
    else:
        logits = model(rows.tokens)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, rows.targets)
    want = jnp.sum(jnp.where(rows.answers, nats, 0)) / jnp.sum(rows.answers)
    assert readout.loss(task, model, decoder, asked) == pytest.approx(float(want), rel=1e-5)

    right = np.asarray((jnp.argmax(logits, axis=-1) == rows.targets) & rows.answers)
    answers = np.asarray(rows.answers)
    number = np.cumsum(answers, axis=1)
    late = answers & (number > 0.75 * number[:, -1:])
    scores = x.measure(state)
    assert scores.answers[0] == pytest.approx(right.sum() / answers.sum())
    assert scores.late[0] == pytest.approx((right & late).sum() / late.sum())
    assert scores.rows[0] == pytest.approx(np.mean((right == answers).all(axis=1)))


def test_other_lengths_are_measured_and_checked():
    x = learner(STACKS, 24)
    state = x.init([Lane(1e-2, 0)])
    assert x.measure(state, 48).answers.shape == (1,)
    with pytest.raises(ValueError, match="length 3"):
        x.measure(state, 3)
    with pytest.raises(ValueError, match="MQAR"):
        learner(MQAR(), 3)
