"""The papers' effects in a size for a CPU, with margins that a broken layer fails."""

import jax.numpy as jnp
import pytest

from deltajax.layers import delta_net
from deltajax.models import ModelConfig
from train.config import OptimizerConfig
from train.experiments.lanes import Lane
from train.experiments.learner import Learner, Plan, Scores
from train.tasks import MQAR, Parity, Rebinding


def learn(task, length, *, steps, rate=1e-2, neg=False, layers=1, rows=32) -> Scores:
    """Accuracy of a small DeltaNet after so many steps."""
    config = ModelConfig(
        vocab_size=task.vocab_size,
        hidden_size=32,
        num_layers=layers,
        layer_pattern=("delta_net",),
        num_heads=1,
        head_dim=32,
        intermediate_size=64,
        allow_neg_eigval=neg,
        scan_layers=False,
    )
    optimizer = OptimizerConfig(learning_rate=1.0, weight_decay=0.0, warmup_steps=20)
    plan = Plan(steps=steps, batch_size=rows, optimizer=optimizer, steps_per_call=steps)
    learner = Learner(config, task, length, plan)
    lanes, _ = learner.advance(learner.init([Lane(rate, 0)]))
    return learner.measure(lanes)


def without_correction(q, k, v, beta, *, normalize_qk, **options):
    """Linear attention: what the memory already returns for a key is not taken away."""
    assert normalize_qk
    q, k = (x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6) for x in (q, k))
    scores = jnp.tril(jnp.einsum("bthd,bshd->bhts", q, k)) * q.shape[-1] ** -0.5
    return jnp.einsum("bhts,bsh,bshd->bthd", scores, beta, v), None


def never_read(q, k, v, beta, **options):
    return jnp.zeros_like(v), None


def test_parity_needs_negative_eigenvalues():
    assert learn(Parity(), 16, steps=150, neg=True).late[0] > 0.95
    assert learn(Parity(), 16, steps=150, neg=False).late[0] < 0.65  # chance is 0.5


@pytest.mark.parametrize(("op", "low", "high"), [(None, 0.97, 1.0), (without_correction, 0.0, 0.85)])
def test_the_latest_value_of_a_key_needs_the_delta_rules_correction(monkeypatch, op, low, high):
    if op is not None:
        monkeypatch.setattr(delta_net, "delta_rule", op)
    assert low <= learn(Rebinding(keys=4, values=8), 96, steps=120, rows=16).answers[0] <= high


@pytest.mark.parametrize(("op", "low", "high"), [(None, 0.95, 1.0), (never_read, 0.0, 0.3)])
def test_recall_is_by_the_state(monkeypatch, op, low, high):
    if op is not None:
        monkeypatch.setattr(delta_net, "delta_rule", op)
    found = learn(MQAR(vocabulary=32, pairs=4), 16, steps=200, rows=64)
    assert low <= found.answers[0] <= high
