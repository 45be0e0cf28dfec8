"""Corpus, packing and iterator state."""

import itertools

import numpy as np
import pytest

from tests.train.train_common import write_text
from train.corpus import DataError, Document, TokenStore, load_corpus, split_documents, tokenize
from train.data import Pieces, eval_batches, train_batches
from train.tokenizer import ByteTokenizer

SEQ = 16


def numbered_store(lengths=(40, 5, 1, 17, 16, 33, 2)) -> TokenStore:
    """Documents whose tokens all differ, so that each can be followed through packing."""
    offsets = np.concatenate([[0], np.cumsum(np.array(lengths) + 1)])
    return TokenStore(np.arange(1, offsets[-1] + 1, dtype=np.int32), offsets, int(offsets[-1]))


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_packing_predicts_every_token_once_and_never_across_documents():
    store = numbered_store()
    batches = eval_batches(store, seq_len=SEQ, batch_size=2, max_batches=100)
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
    batches = eval_batches(numbered_store(), seq_len=SEQ, batch_size=2, max_batches=100)
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
        return train_batches(numbered_store(), seq_len=SEQ, batch_size=4, seed=3, prefetch=prefetch)

    a, b = fresh(before), fresh(after)
    list(itertools.islice(a, 37))  # several epochs in, in the middle of a packing buffer
    b.set_state(a.get_state())
    assert all(same(x, y) for x, y in itertools.islice(zip(a, b, strict=True), 40))
    a.close(), b.close()


def test_order_depends_on_the_seed_and_differs_between_epochs():
    def rows(seed, count):
        data = train_batches(numbered_store((15,) * 64), seq_len=SEQ, batch_size=64, seed=seed, prefetch=0)
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
                store, seq_len=SEQ, batch_size=64, seed=0, process_index=i, process_count=2, prefetch=0
            )
        )
        for i in range(2)
    ]
    assert all(share["tokens"].shape == (32, SEQ) for share in shares)
    assert not set(shares[0]["tokens"].flat) - {0} & set(shares[1]["tokens"].flat)


def test_split_holds_out_whole_documents_whatever_their_order():
    documents = [Document(f"d{i}", b"text") for i in range(100)]
    train, held_out = split_documents(documents, 0.05)
    assert len(held_out) == 5 and len(train) == 95
    assert {d.name for d in split_documents(documents[::-1], 0.05)[1]} == {d.name for d in held_out}


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


def test_globs_text_and_json_lines_mix(tmp_path):
    (tmp_path / "a.txt").write_text("plain text " * 10)
    write_text(tmp_path / "b.jsonl", documents=3)
    corpus = load_corpus((str(tmp_path / "*"),), "text", 0.1, ByteTokenizer())
    assert corpus.train.num_documents == 4


def load(*patterns):
    return load_corpus([str(p) for p in patterns], "text", 0.05, ByteTokenizer())


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"not found: .*nothing\.txt"):
        load(tmp_path / "nothing.txt")


def test_empty_file_is_named(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"empty: .*empty\.txt"):
        load(tmp_path / "empty.txt")


def test_file_without_documents_is_named(tmp_path):
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"no documents in .*blank\.jsonl"):
        load(tmp_path / "blank.jsonl")


@pytest.mark.parametrize(
    "line", ["{not json", '{"body": "x"}', '["x"]', '{"text": 3}', r'{"text": "\ud83d"}']
)
def test_bad_json_line_is_named_by_file_and_line(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:2: "):
        load(path)
