"""Corpus, packing and iterator state."""

import itertools
import json

import numpy as np
import pytest

from deltajax.tokenizer import ByteTokenizer
from tests.train.train_common import write_text
from train.config import ConfigError
from train.corpus import TokenStore, load_corpus, split_documents, tokenize
from train.data import Pieces, eval_batches, merge_states, train_batches
from train.documents import Document
from train.mixture import Group, Mixture, weighted

SEQ = 16
STORE = (40, 5, 1, 17, 16, 33, 2) * 20


def numbered_store(lengths=(40, 5, 1, 17, 16, 33, 2)) -> TokenStore:
    """Documents whose tokens all differ, so that each can be followed through packing."""
    offsets = np.concatenate([[0], np.cumsum(np.array(lengths) + 1)])
    return TokenStore(np.arange(1, offsets[-1] + 1, dtype=np.int32), offsets, int(offsets[-1]))


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_packing_predicts_every_token_once_and_never_across_documents():
    store = numbered_store()
    batches = eval_batches(Mixture.of(store), seq_len=SEQ, batch_size=2, max_batches=100)
    tokens, targets, segments = (
        np.concatenate([b[name] for b in batches]) for name in ("tokens", "targets", "segment_ids")
    )
    assert tokens.shape[1] == SEQ and all(len(b["tokens"]) == 2 for b in batches)
    counted = segments > 0
    opening = store.tokens[store.offsets[:-1]]  # a document's first token has nothing to predict it from
    assert sorted(targets[counted]) == sorted(set(store.tokens) - set(opening))
    # Tokens are numbered in order, and a document's first is never a target: so each pair is one document's.
    assert np.array_equal(targets[counted], tokens[counted] + 1)


def test_packing_numbers_segments_from_one_and_pads_with_zero():
    batches = eval_batches(Mixture.of(numbered_store()), seq_len=SEQ, batch_size=2, max_batches=100)
    for tokens, segments in (
        (t, s) for b in batches for t, s in zip(b["tokens"], b["segment_ids"], strict=True)
    ):
        filled = segments[segments > 0]
        assert np.all(segments[len(filled) :] == 0) and np.all(tokens[len(filled) :] == 0)
        assert np.all(np.isin(np.diff(filled), (0, 1))) and (len(filled) == 0 or filled[0] == 1)
        # Within a segment tokens follow each other; a new one starts where they do not.
        starts = np.flatnonzero(np.diff(tokens[: len(filled)]) != 1)
        assert np.array_equal(starts, np.flatnonzero(np.diff(filled)))


def test_pieces_are_full_but_the_last_of_a_document():
    pieces = Pieces.cut(numbered_store(lengths=(40,)), SEQ)
    assert [len(pieces[i]["tokens"]) for i in range(len(pieces))] == [16, 16, 8]


@pytest.mark.parametrize("before,after", [(0, 0), (2, 2), (0, 2), (2, 0)])
def test_restored_iterator_continues_with_identical_batches(before, after):
    def fresh(prefetch):
        return train_batches(
            Mixture.of(numbered_store(STORE)), seq_len=SEQ, batch_size=4, seed=3, prefetch=prefetch
        )

    a, b = fresh(before), fresh(after)
    list(itertools.islice(a, 37))  # several epochs in, in the middle of a packing buffer
    b.set_state(a.get_state())
    assert all(same(x, y) for x, y in itertools.islice(zip(a, b, strict=True), 40))
    a.close(), b.close()


def test_order_depends_on_the_seed_and_differs_between_epochs():
    def rows(seed, count):
        data = train_batches(
            Mixture.of(numbered_store((15,) * 64)), seq_len=SEQ, batch_size=64, seed=seed, prefetch=0
        )
        return [next(data)["tokens"] for _ in range(count)]

    (first, second), (again,), (other,) = rows(0, 2), rows(0, 1), rows(1, 1)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other) and not np.array_equal(first, second)
    assert sorted(first[:, 0]) == sorted(second[:, 0])  # yet both are the whole text


def test_processes_read_disjoint_shares():
    store = numbered_store((15,) * 64)
    shares = [
        next(
            train_batches(
                Mixture.of(store),
                seq_len=SEQ,
                batch_size=64,
                seed=0,
                process_index=i,
                process_count=2,
                prefetch=0,
            )
        )
        for i in range(2)
    ]
    assert all(share["tokens"].shape == (32, SEQ) for share in shares)
    assert not set(shares[0]["tokens"].flat) - {0} & set(shares[1]["tokens"].flat)


def test_split_holds_out_whole_documents_whatever_their_order():
    documents = [Document(f"d{i}", b"text %d" % i) for i in range(100)]
    train, held_out = split_documents(documents, 0.05)
    assert len(held_out) == 5 and len(train) == 95
    assert {d.name for d in split_documents(documents[::-1], 0.05)[1]} == {d.name for d in held_out}


def test_split_depends_on_no_names_and_keeps_copies_together():
    documents = [Document(f"d{i}", b"text %d" % (i % 50)) for i in range(100)]
    train, held_out = split_documents(documents, 0.06)
    texts = {d.text for d in held_out}
    assert len(held_out) == 6 and len(texts) == 3 and not texts & {d.text for d in train}
    renamed = [Document(f"elsewhere/{d.name}", d.text) for d in documents]
    assert [d.text for d in split_documents(renamed, 0.06)[1]] == [d.text for d in held_out]


def test_copies_of_one_text_give_up_their_tails():
    train, held_out = split_documents([Document(f"d{i}", b"0123456789") for i in range(30)], 0.1)
    assert {d.text for d in train} == {b"012345678"} and {d.text for d in held_out} == {b"9"}


def test_the_fingerprint_tells_of_another_held_out_set_and_not_of_another_path(tmp_path, monkeypatch):
    path = write_text(tmp_path / "text.jsonl", documents=40)

    def fingerprint(name, fraction=0.1):
        return load_corpus([str(name)], "text", fraction, ByteTokenizer()).fingerprint

    monkeypatch.chdir(tmp_path)
    assert fingerprint(path) == fingerprint("text.jsonl") != fingerprint(path, 0.2)


def test_split_of_a_single_document_holds_out_its_tail():
    train, held_out = split_documents([Document("d", b"0123456789" * 10)], 0.1)
    assert train[0].text + held_out[0].text == b"0123456789" * 10 and len(held_out[0].text) == 10


def test_documents_are_framed_by_end_of_document():
    store = tokenize([Document("a", b"ab"), Document("b", b"c")], ByteTokenizer())
    assert store.tokens.tolist() == [256, 97, 98, 256, 256, 99, 256]
    assert store.offsets.tolist() == [0, 4, 7] and store.num_targets == 5


def test_standard_library_is_the_default_corpus():
    corpus = load_corpus((), "text", 0.05, ByteTokenizer())
    assert corpus.train.num_documents > 100 and corpus.held_out.num_documents > 5
    assert len(corpus.train.tokens) > 1_000_000


def streams(index=0, count=1, batch_size=8):
    return train_batches(
        Mixture.of(numbered_store(STORE)),
        seq_len=SEQ,
        batch_size=batch_size,
        seed=0,
        process_index=index,
        process_count=count,
        prefetch=0,
    )


def global_batches(processes, count):
    """What `count` steps of all processes together read."""
    steps = zip(*(itertools.islice(data, count) for data in processes), strict=True)
    return [{name: np.concatenate([b[name] for b in step]) for name in step[0]} for step in steps]


@pytest.mark.parametrize("count", [2, 4, 8])
def test_global_batches_are_the_same_for_any_number_of_processes(count):
    several = global_batches([streams(i, count) for i in range(count)], 40)
    assert all(same(a, b) for a, b in zip(several, global_batches([streams()], 40), strict=True))


@pytest.mark.parametrize("before,after", [(2, 1), (2, 4), (1, 2), (4, 4)])
def test_positions_of_some_processes_resume_on_others(before, after):
    old = [streams(i, before) for i in range(before)]
    global_batches(old, 13)
    state = merge_states([json.loads(json.dumps(data.get_state())) for data in old])
    new = [streams(i, after) for i in range(after)]
    for data in new:
        data.set_state(state)
    assert all(same(a, b) for a, b in zip(global_batches(old, 30), global_batches(new, 30), strict=True))


def test_streams_that_processes_cannot_share_are_refused():
    with pytest.raises(ConfigError, match="8 streams, which 3 processes cannot share"):
        streams(0, 3, batch_size=12).set_state(streams().get_state())


def test_position_of_a_pipeline_without_streams_is_refused():
    with pytest.raises(ConfigError, match="older version"):
        streams().set_state(merge_states([{"parent": {"next_index": 3}}]))


@pytest.mark.parametrize("batch_size", [4, 6, 16])
def test_another_batch_size_goes_on_with_the_same_rows(batch_size):
    old, new = streams(), streams(batch_size=batch_size)
    global_batches([old], 3)
    new.set_state(old.get_state())

    def rows(data, count):
        return sorted(row.tobytes() for b in global_batches([data], count) for row in b["tokens"])

    assert rows(old, 48 // 8) == rows(new, 48 // batch_size)


def test_mixture_weighs_tokens_not_documents():
    long, short = numbered_store((300,) * 40), numbered_store((3,) * 400)
    short = TokenStore(short.tokens + 1_000_000, short.offsets, short.num_bytes)
    mixture = Mixture((Group("long", (long,), 0.25), Group("short", (short,), 0.75)))
    data = train_batches(mixture, seq_len=SEQ, batch_size=8, seed=0, prefetch=0)
    targets = np.concatenate([b["targets"][b["segment_ids"] > 0] for b in itertools.islice(data, 200)])
    assert (targets > 1_000_000).mean() == pytest.approx(0.75, abs=0.02)
    # Batches have both, rather than one and then the other (which would deviate by 0.43).
    shares = [(b["targets"] > 1_000_000)[b["segment_ids"] > 0].mean() for b in itertools.islice(data, 200)]
    assert np.std(shares) < 0.25


def test_evaluation_of_a_mixture_is_not_cut_short_by_its_smallest_part():
    large, small = numbered_store((SEQ,) * 300), numbered_store((SEQ,) * 4)
    small = TokenStore(small.tokens + 1_000_000, small.offsets, small.num_bytes)
    mixture = Mixture((Group("large", (large,), 0.5), Group("small", (small,), 0.5)))
    batches = eval_batches(mixture, seq_len=SEQ, batch_size=4, max_batches=20)
    targets = np.concatenate([b["targets"][b["segment_ids"] > 0] for b in batches])
    assert len(targets) == 20 * 4 * SEQ and (targets > 1_000_000).mean() == pytest.approx(0.5, abs=0.02)
    assert len(eval_batches(mixture, seq_len=SEQ, batch_size=4, max_batches=999)) == 304 // 4


def test_mixture_without_weights_is_in_proportion_to_size():
    large, small = numbered_store((60,) * 90), numbered_store((60,) * 10)
    small = TokenStore(small.tokens + 1_000_000, small.offsets, small.num_bytes)
    data = train_batches(Mixture.of(large, small), seq_len=SEQ, batch_size=8, seed=0, prefetch=0)
    targets = np.concatenate([b["targets"] for b in itertools.islice(data, 200)])
    assert (targets > 1_000_000).mean() == pytest.approx(0.1, abs=0.02)


def test_restored_mixture_continues_with_identical_batches():
    mixture = Mixture(
        (Group("a", (numbered_store(STORE),), 0.3), Group("b", (numbered_store((20,) * 99),), 0.7))
    )
    a, b = (train_batches(mixture, seq_len=SEQ, batch_size=4, seed=1, prefetch=n) for n in (0, 2))
    list(itertools.islice(a, 29))
    b.set_state(json.loads(json.dumps(a.get_state())))
    assert all(same(x, y) for x, y in itertools.islice(zip(a, b, strict=True), 90))
    a.close(), b.close()


def test_sample_is_drawn_as_the_mixture_weighs():
    a, b = numbered_store((100,) * 300), numbered_store((50,) * 400)
    b = TokenStore(b.tokens + 1_000_000, b.offsets, b.num_bytes)
    sample = Mixture((Group("a", (a,), 0.5), Group("b", (b,), 0.5))).sample(10_000)
    assert len(sample.tokens) == pytest.approx(10_000, rel=0.1)
    assert (sample.tokens > 1_000_000).mean() == pytest.approx(0.5, abs=0.1)
    assert Mixture.of(a).sample(10) is a


def test_sample_of_a_large_corpus_in_memory_is_drawn_too(monkeypatch):
    monkeypatch.setattr("train.mixture._WHOLE_TOKENS", 10_000)
    monkeypatch.setattr("train.mixture._PART_TOKENS", 100)
    small, many, one = (numbered_store(lengths) for lengths in ((99,) * 100, (99,) * 1000, (10**6, 9)))
    assert Mixture.of(small).sample(1000) is small
    for store in (many, one):
        tokens = Mixture.of(store).sample(1000).tokens
        assert len(tokens) == pytest.approx(1000, rel=0.1) and len(set(tokens)) == len(tokens)


def test_weights_are_normalised():
    assert weighted(["a", "b"]) == [(("a", "b"), 1.0)]
    assert weighted(["a@3", "b*.txt@1"]) == [(("a",), 0.75), (("b*.txt",), 0.25)]
    assert weighted(["me@home.txt"]) == [(("me@home.txt",), 1.0)]


def test_name_that_reads_as_a_weight_is_a_name(tmp_path):
    (tmp_path / "web@2").write_text("x")
    assert weighted([str(tmp_path / "web@2")]) == [((str(tmp_path / "web@2"),), 1.0)]


@pytest.mark.parametrize("files", [["a@1", "b"], ["a@0"], ["a@-1", "b@1"], ["a@inf", "b@1"], ["a@nan"]])
def test_wrong_weights_are_refused(files):
    with pytest.raises(ConfigError, match=r"argument --data\.files"):
        weighted(files)
