"""Every task's rows against an oracle in plain Python that reads nothing but the tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.tasks import (
    MQAR,
    Compression,
    FuzzyRecall,
    InContextRecall,
    Memorisation,
    Palindrome,
    Parity,
    PermutationGroup,
    Rebinding,
    SelectiveCopying,
    Stacks,
    sample_rows,
)
from train.tasks.source import split_key

ROWS = 64


@functools.cache
def sampler(task, length):
    task.check(length)
    return jax.jit(lambda key: sample_rows(task, length, key, jnp.arange(ROWS, dtype=jnp.uint32)))


def rows(task, length, seed=0, split="train"):
    return jax.tree.map(np.asarray, sampler(task, length)(split_key(seed, split)))


def mqar(task, tokens):
    """Keys asked for are those of the pairs at the row's start."""
    n = task.num_pairs(len(tokens))
    value_of = {tokens[2 * i]: tokens[2 * i + 1] for i in range(n)}
    assert len(value_of) == n
    assert len(set(value_of.values())) == n
    assert all(1 <= k < task.vocabulary // 2 <= v for k, v in value_of.items())
    found = {p: value_of[t] for p, t in enumerate(tokens) if p >= 2 * n and p % 2 == 0 and t in value_of}
    return found, n


def palindrome(task, tokens):
    n = tokens.index(0)
    word = tokens[:n]
    assert 0 not in tokens[n + 1 :] and tokens[n + 1 :] == word[:0:-1]
    return {n + i: x for i, x in enumerate(reversed(word))}, n


def stacks(task, tokens):
    held = {s: [] for s in range(task.stacks)}
    found = {}
    for p in range(0, len(tokens) - len(tokens) % 3, 3):
        operation, stack, x = tokens[p : p + 3]
        stack -= 3
        assert 0 <= stack < task.stacks <= x - 3 < task.stacks + task.symbols
        if operation == 1:
            held[stack].append(x)
            assert len(held[stack]) <= task.depth
        else:
            assert operation == 2
            found[p + 1] = held[stack].pop()
            assert x == found[p + 1]
    assert set(tokens[len(tokens) - len(tokens) % 3 :]) <= {0}
    return found, len(found)


def rebinding(task, tokens):
    held, found = {}, {}
    for p in range(0, len(tokens) - len(tokens) % 3, 3):
        operation, key, value = tokens[p : p + 3]
        assert 3 <= key < 3 + task.keys <= value < task.vocab_size
        if operation == 2:
            found[p + 1] = held[key]
            assert value == held[key]
        else:
            assert operation == 1
            held[key] = value
    return found, len(found)


def parity(task, tokens):
    found, odd = {}, False
    for p, bit in enumerate(tokens):
        odd ^= bool(bit)
        found[p] = int(odd)
    return found, len(tokens)


def permutations(task, tokens):
    # Python's order of permutations, made by hand: the first object's place counts most.
    def of(index):
        left, image = list(range(task.degree)), []
        for size in range(task.degree, 0, -1):
            block = int(np.prod(range(1, size)))
            image.append(left.pop(index // block))
            index %= block
        return image

    everything = {tuple(of(i)): i for i in range(task.vocab_size)}
    assert len(everything) == task.vocab_size
    state, found = list(range(task.degree)), {}
    for p, t in enumerate(tokens):
        if task.moves == "swaps":
            assert sum(x != i for i, x in enumerate(of(t))) in (0, 2)
        move = of(t)
        state = [move[x] for x in state]
        found[p] = everything[tuple(state)]
    return found, len(tokens)


def in_context_recall(task, tokens):
    value_of, found, half = {}, {}, task.symbols // 2
    for p in range(0, len(tokens), 2):
        k, v = tokens[p : p + 2]
        if k >= task.symbols:
            assert v >= task.symbols and task.noise > 0
            continue
        assert k < half <= v < task.symbols
        if k in value_of:
            found[p] = value_of[k]
        assert value_of.setdefault(k, v) == v
    assert len(tokens) - 2 in found
    return found, len(found)


def fuzzy_recall(task, tokens):
    keys, pad = (task.symbols - 1) // 2, task.symbols - 1
    value_of, found, p, asked_last = {}, {}, 0, False
    while p < len(tokens) and tokens[p] != pad:
        start = p
        while tokens[p] < keys:
            p += 1
        middle = p
        while p < len(tokens) and keys <= tokens[p] < pad:
            p += 1
        key, value = tuple(tokens[start:middle]), tokens[middle:p]
        assert 1 <= len(set(key)) == len(key) <= task.longest
        assert 1 <= len(set(value)) == len(value) <= task.longest
        asked_last = key in value_of
        if asked_last:
            assert value_of[key] == value
            found |= {middle - 1 + i: x for i, x in enumerate(value)}
        value_of[key] = value
    assert asked_last and set(tokens[p:]) <= {pad}
    return found, len(found)


def selective_copying(task, tokens):
    mark = tokens.index(task.symbols - 1)
    letters = [t for t in tokens[:mark] if t < task.symbols - 2]
    assert set(tokens[mark + 1 :]) == {task.symbols - 2}
    return {mark + 1 + i: x for i, x in enumerate(letters)}, task.copied


def compression(task, tokens):
    assert tokens[-1] == task.symbols - 1 and max(tokens[:-1]) < task.symbols - 1
    return dict(enumerate(tokens[:-1])), len(tokens) - 1


_dictionary: dict = {}


def memorisation(task, tokens):
    """The dictionary is learnt from the first rows' answers, and must hold in all others."""
    known = _dictionary[task]
    assert set(tokens[1::2]) == {task.symbols - 1}
    return {p + 1: known[tokens[p]] for p in range(0, len(tokens), 2)}, len(tokens) // 2


CASES = [
    (MQAR(vocabulary=64), 32, mqar),
    (MQAR(vocabulary=8192, pairs=20, power=1.0), 80, mqar),
    (Palindrome(symbols=9), 30, palindrome),
    (Stacks(stacks=5, symbols=7), 64, stacks),
    (Stacks(stacks=2, symbols=7, depth=2), 90, stacks),
    (Rebinding(keys=4, values=8), 50, rebinding),
    (Parity(), 33, parity),
    (PermutationGroup(), 20, permutations),
    (PermutationGroup(degree=5), 33, permutations),
    (PermutationGroup(degree=5, moves="swaps"), 20, permutations),
    (InContextRecall(), 32, in_context_recall),
    (InContextRecall(symbols=8, noise_symbols=6, noise=0.5), 24, in_context_recall),
    (FuzzyRecall(), 64, fuzzy_recall),
    (FuzzyRecall(symbols=8, longest=2), 40, fuzzy_recall),
    (SelectiveCopying(copied=6), 40, selective_copying),
    (Compression(), 16, compression),
    (Memorisation(symbols=33), 16, memorisation),
]
IDS = [f"{type(task).__name__}{i}" for i, (task, *_) in enumerate(CASES)]


@pytest.mark.parametrize(("task", "length", "oracle"), CASES, ids=IDS)
def test_answers_are_the_oracles(task, length, oracle):
    x = rows(task, length)
    if oracle is memorisation:
        keys, answers = x.tokens[:, ::2].ravel().tolist(), x.targets[:, 1::2].ravel().tolist()
        _dictionary[task] = known = dict(zip(keys, answers, strict=True))
        assert len(known) == len(set(known.values())) == 16
    assert x.tokens.dtype == x.targets.dtype == np.int32 and x.answers.dtype == bool
    assert x.tokens.min() >= 0 and x.tokens.max() < task.vocab_size
    for tokens, targets, answers in zip(*x, strict=True):
        assert len(tokens) == len(targets) == len(answers) == length
        found, n = oracle(task, tokens.tolist())
        places = np.flatnonzero(answers).tolist()
        assert {p: int(targets[p]) for p in places} | found == found  # no answer but the oracle's
        assert len(places) == n <= task.max_answers(length)
        assert n > 0


@pytest.mark.parametrize(("task", "length", "oracle"), CASES, ids=IDS)
def test_rows_differ_within_and_between_streams(task, length, oracle):
    streams = [rows(task, length), rows(task, length, seed=1), rows(task, length, split="eval")]
    everything = {row.tobytes() for x in streams for row in x.tokens}
    assert len(everything) > 0.98 * len(streams) * ROWS


def test_queries_of_mqar_come_soon_by_the_power_law_and_anywhere_without():
    def mean_place(power):
        task = MQAR(vocabulary=512, pairs=4, power=power)
        return np.argwhere(rows(task, 208).answers)[:, 1].mean() - 8

    # 100 places, two tokens apart: evenly spread their mean is 99.
    assert mean_place(1.0) == pytest.approx(99, abs=12)
    assert mean_place(0.01) < 50


def test_noise_has_its_share_and_parity_is_balanced():
    x = rows(InContextRecall(symbols=8, noise_symbols=6, noise=0.5), 24)
    assert np.mean(x.tokens >= 8) == pytest.approx(0.5 * 10 / 12, abs=0.05)
    assert np.mean(rows(Parity(), 33).targets) == pytest.approx(0.5, abs=0.05)


def test_stacks_are_deep_and_popped():
    x = rows(Stacks(stacks=5, symbols=7), 64)
    operations = x.tokens[:, 0:63:3]
    pops = np.mean(operations == 2)
    assert 0.3 < pops <= 0.5
    depth = np.cumsum(np.where(operations == 1, 1, -1), axis=1)  # of all stacks together
    assert depth.max() >= 8


@pytest.mark.parametrize(
    ("task", "length", "message"),
    [
        (MQAR(pairs=9), 32, "pairs=9: expected at most a quarter of the length 32"),
        (MQAR(vocabulary=16), 128, "vocabulary=16"),
        (Palindrome(), 31, "length 31: expected an even number"),
        (Stacks(), 5, "length 5: expected at least 6"),
        (Rebinding(values=1), 8, "values=1"),
        (PermutationGroup(degree=6), 8, "degree=6: expected 2 to 5"),
        (PermutationGroup(moves="some"), 8, "moves='some'"),
        (InContextRecall(noise=0.2), 8, "noise_symbols=0"),
        (FuzzyRecall(symbols=6), 64, "symbols=6: expected at least 7"),
        (SelectiveCopying(), 32, "length 32: expected at least 33"),
        (Compression(symbols=2), 8, "symbols=2"),
        (Memorisation(), 7, "length 7"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(task, length, message):
    with pytest.raises(ValueError, match=message):
        task.check(length)


def test_tasks_are_values():
    assert MQAR() == MQAR() and hash(MQAR()) == hash(MQAR())
    assert dataclasses.replace(MQAR(), pairs=3) != MQAR()
