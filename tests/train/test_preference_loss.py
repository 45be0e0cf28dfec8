"""DPO and fine-tuning on answers: against NumPy, and that prompts, padding and neighbours have no say."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax.models import get_preset
from train.mesh import ShardingRules, make_mesh
from train.model_state import model_state
from train.preference import loss as losses
from train.preference.data import Pair, all_rows, examples, single_rows, with_reference
from train.preference.loss import dpo, fine_tuning, token_log_probs
from train.step import sums_and_grads

VOCAB, WIDTH, BETA, EOS = 11, 5, 0.7, 10


@dataclass
class Lookup:
    """A model whose hidden state at a position is a parameter: all gradients can be written down."""

    hidden: Any  # [B, T, D]
    kernel: Any  # [D, vocab]

    def hidden_states(self, tokens, *, segment_ids):
        return self.hidden

    def head_kernel(self):
        return self.kernel


def some_pairs(count=5, seed=0, vocab=EOS):
    """Pairs of answers of different lengths, 1 to 6 tokens."""
    rng = np.random.default_rng(seed)
    draw = lambda least: rng.integers(0, vocab, size=rng.integers(least, 7)).astype(np.int32)  # noqa: E731
    return [Pair(draw(0), draw(1), draw(1)) for _ in range(count)]


def with_random_reference(what, seed=1):
    rng = np.random.default_rng(seed)
    return with_reference(what, [[-3 * rng.random(len(r["tokens"])) for r in rows] for rows in what.rows])


def packed(count=5, seq_len=40, rows=3):
    what = with_random_reference(examples(some_pairs(count), EOS))
    (batch,) = all_rows(what, seq_len=seq_len, batch_size=rows)
    return batch, what.per_row(seq_len)


def by_hand(hidden, kernel, batch, normalized):
    """Loss and gradients in float64, pair by pair."""
    logits = hidden @ kernel
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total, accuracy, margins, d_logits = 0.0, 0, 0.0, np.zeros_like(logits)
    for row, segments in enumerate(batch["segment_ids"]):
        for chosen in range(1, segments.max() + 1, 2):
            places, ratio = [], []
            for segment in (chosen, chosen + 1):
                at = np.flatnonzero((segments == segment) & (batch["answers"][row] == 1))
                own = log_p[row, at, batch["targets"][row, at]] - batch["reference"][row, at]
                ratio.append(own.mean() if normalized else own.sum())
                places.append(at)
            margin = BETA * (ratio[0] - ratio[1])
            total += np.log1p(np.exp(-margin))
            margins, accuracy = margins + margin, accuracy + (margin > 0)
            for sign, at in zip((-1, 1), places, strict=True):
                weight = sign * BETA / (1 + np.exp(margin)) / (len(at) if normalized else 1)
                onehot = np.eye(VOCAB)[batch["targets"][row, at]]
                d_logits[row, at] += weight * (onehot - np.exp(log_p[row, at]))
    d_kernel = np.einsum("btd,btv->dv", hidden, d_logits)
    return total, accuracy, margins, d_logits @ kernel.T, d_kernel


@pytest.mark.parametrize("normalized", [False, True])
def test_dpo_and_its_gradients_are_those_written_down(normalized):
    batch, pairs = packed()
    rng = np.random.default_rng(2)
    hidden, kernel = rng.normal(size=(*batch["tokens"].shape, WIDTH)), rng.normal(size=(WIDTH, VOCAB))
    objective = dpo(BETA, pairs, normalized)
    arrays = {name: jnp.asarray(x) for name, x in batch.items()}

    def loss(hidden, kernel):
        return objective(Lookup(hidden, kernel), arrays)

    args = jnp.asarray(hidden, jnp.float32), jnp.asarray(kernel, jnp.float32)
    (total, sums), (d_hidden, d_kernel) = jax.value_and_grad(loss, (0, 1), has_aux=True)(*args)
    expected, accuracy, margin, d_hidden_hand, d_kernel_hand = by_hand(hidden, kernel, batch, normalized)
    assert float(sums["count"]) == 5
    np.testing.assert_allclose(total, expected, rtol=2e-6)
    np.testing.assert_allclose(sums["reward_margin"], margin, rtol=1e-5, atol=1e-5)
    assert float(sums["reward_accuracy"]) == accuracy and 0 < accuracy < 5
    np.testing.assert_allclose(d_hidden, d_hidden_hand, atol=2e-6)
    np.testing.assert_allclose(d_kernel, d_kernel_hand, atol=1e-5)
    # Nothing reaches the positions that predict prompts or padding, and all that predict answers have a say.
    felt = np.abs(np.asarray(d_hidden)).max(-1) > 0
    np.testing.assert_array_equal(felt, batch["answers"] == 1)


def test_normalisation_divides_by_the_answers_own_length():
    """An answer said twice over has half its sum's mean, hence the same normalised log-ratio."""
    once = np.array([3, 4], np.int32)
    for normalized, same in ((True, True), (False, False)):
        margins = []
        for answer in (once, np.tile(once, 2)):
            what = examples([Pair(once, answer, np.array([1], np.int32))], EOS)
            rows = [[np.where(r["answers"], -2.0, 0.0) for r in what.rows[0]]]
            (batch,) = all_rows(with_reference(what, rows), seq_len=20, batch_size=1)
            model = Lookup(jnp.zeros((1, 20, WIDTH)), jnp.zeros((WIDTH, VOCAB)))
            arrays = {name: jnp.asarray(x) for name, x in batch.items()}
            margins.append(float(dpo(BETA, 1, normalized)(model, arrays)[1]["chosen_reward"]))
        assert (abs(margins[0] - margins[1]) < 1e-6) == same


def test_the_reference_itself_has_loss_log_2_and_no_margin():
    batch, pairs = packed()
    rng = np.random.default_rng(3)
    model = Lookup(
        *(jnp.asarray(rng.normal(size=s)) for s in ((*batch["tokens"].shape, WIDTH), (WIDTH, VOCAB)))
    )
    arrays = {name: jnp.asarray(x) for name, x in batch.items()}
    arrays["reference"] = losses.batch_log_probs(model, arrays)
    total, sums = dpo(BETA, pairs)(model, arrays)
    np.testing.assert_allclose(total / sums["count"], np.log(2), rtol=1e-6)
    assert float(sums["reward_margin"]) == float(sums["reward_accuracy"]) == 0


def test_fine_tuning_is_the_mean_over_answers_alone():
    (batch,) = all_rows(examples(some_pairs(), EOS, both=False), seq_len=40, batch_size=3)
    rng = np.random.default_rng(2)
    hidden, kernel = rng.normal(size=(3, 40, WIDTH)), rng.normal(size=(WIDTH, VOCAB))
    arrays = {name: jnp.asarray(x) for name, x in batch.items()}
    grad = jax.value_and_grad(lambda h: fine_tuning(Lookup(h, jnp.asarray(kernel)), arrays), has_aux=True)
    (total, sums), d_hidden = grad(jnp.asarray(hidden))
    logits = hidden @ kernel
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(total, -picked[batch["answers"] == 1].sum(), rtol=1e-6)
    assert float(sums["count"]) == batch["answers"].sum() < float(sums["tokens"])
    np.testing.assert_array_equal(np.abs(np.asarray(d_hidden)).max(-1) > 0, batch["answers"] == 1)


def test_log_probabilities_in_parts_are_those_of_the_whole(monkeypatch):
    rng = np.random.default_rng(4)
    hidden, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 7, WIDTH), (WIDTH, VOCAB)))
    targets, weights = jnp.asarray(rng.integers(0, VOCAB, (2, 7))), jnp.asarray(rng.normal(size=(2, 7)))

    def run():
        return jax.value_and_grad(lambda h, k: (token_log_probs(h, k, targets) * weights).sum(), (0, 1))(
            hidden, kernel
        )

    whole = run()
    monkeypatch.setattr(losses, "MAX_LOGITS", 2 * VOCAB * 3)
    assert "while" in jax.jit(lambda: token_log_probs(hidden, kernel, targets)).lower().as_text()
    for a, b in zip(jax.tree.leaves(run()), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def model():
    config = get_preset("tiny_gated_delta_net").replace(
        num_layers=1, hidden_size=32, num_heads=1, head_dim=16, intermediate_size=48, implementation="scan"
    )
    return model_state(config, make_mesh(1, 1), ShardingRules())


@pytest.mark.parametrize("objective", ["dpo", "sft"])
def test_packed_pairs_in_micro_batches_are_as_if_alone(model, objective):
    """Rows that hold several pairs, in micro-batches, and rows of one: one loss, the same gradients."""
    pairs, eos = some_pairs(6, seed=5, vocab=256), 256
    what = examples(pairs, eos, both=objective == "dpo")
    what = with_random_reference(what) if objective == "dpo" else what
    params, found = model.init(0), []
    for seq_len, rows, parts in ((int(what.lengths.max()), 6, 1), (64, 4, 2)):
        (batch,) = all_rows(what, seq_len=seq_len, batch_size=rows)
        per_row = what.per_row(seq_len)
        chosen = dpo(0.3, per_row) if objective == "dpo" else fine_tuning
        batch = {name: jnp.asarray(x) for name, x in batch.items()}
        run = jax.jit(
            lambda p, b, chosen=chosen, parts=parts: sums_and_grads(
                model.model, p, b, parts, model.mesh, ShardingRules(), chosen
            )
        )
        found.append(run(params, batch))
    most = max(int(b["segment_ids"].max()) for b in all_rows(what, seq_len=64, batch_size=4))
    assert most > (2 if objective == "dpo" else 1)  # rows did hold several
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(found[0][2]))
    for other in found[1:]:
        for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * max(scale, 1))


def test_neighbours_and_padding_have_no_say(model):
    """A pair's log-ratios are the same whatever stands in the rest of its row."""
    what = with_random_reference(examples(some_pairs(3, seed=6, vocab=256), 256))
    (batch,) = all_rows(what, seq_len=64, batch_size=1)
    segments = batch["segment_ids"]
    assert segments.max() == 6 and segments[0, -1] == 0
    params, pairs = model.init(1), what.per_row(64)

    @jax.jit
    def ratios(tokens, targets, reference):
        own = {**batch, "tokens": tokens, "targets": targets, "reference": reference}
        log_probs = losses.batch_log_probs(model.model(params), own)
        return losses.pair_log_ratios(log_probs, own, pairs, False)[0]

    names = ("tokens", "targets", "reference")
    before = np.asarray(ratios(*(batch[name] for name in names)))
    pair = (segments == 3) | (segments == 4)
    changed = {name: np.where(pair, batch[name], (batch[name] + 7) % 250) for name in names}
    after = np.asarray(ratios(*(changed[name] for name in names)))
    np.testing.assert_allclose(after[0, 1], before[0, 1], rtol=1e-5, atol=1e-5)
    assert np.abs(after[0, [0, 2]] - before[0, [0, 2]]).min() > 1e-2
    prompt = pair & (batch["answers"] == 0)
    targets = np.where(prompt, 0, batch["targets"])
    np.testing.assert_array_equal(ratios(batch["tokens"], targets, batch["reference"]), before)


def test_single_rows_hold_every_answer_in_order():
    what = examples(some_pairs(4), EOS)
    batches = single_rows(what, seq_len=20, batch_size=3)
    flat = [row for rows in what.rows for row in rows]
    tokens = np.concatenate([b["tokens"] for b in batches])
    lengths = np.concatenate([(b["segment_ids"] > 0).sum(1) for b in batches])
    assert [len(r["tokens"]) for r in flat] == lengths[: len(flat)].tolist() and lengths[
        len(flat) :
    ].sum() == 0
    for row, given in zip(flat, tokens[: len(flat)], strict=True):
        np.testing.assert_array_equal(given[: len(row["tokens"])], row["tokens"])


@pytest.mark.parametrize(
    ("beta", "pairs", "name"), [(0.0, 1, "beta"), (float("inf"), 1, "beta"), (1.0, 0, "pairs")]
)
def test_options_that_cannot_work_are_named(beta, pairs, name):
    with pytest.raises(ValueError, match=name):
        dpo(beta, pairs)
