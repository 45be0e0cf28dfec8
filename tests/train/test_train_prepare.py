"""Prepared data holds exactly the documents it was made of, and is made whole or not at all."""

import fcntl
import json
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest

from deltajax.tokenizer import ByteTokenizer, FileTokenizer
from tests.train.train_common import environment, write_text
from train.config import ConfigError
from train.corpus import TokenStore, framed
from train.documents import BadData, DataError, Document, read_documents
from train.preparation import PrepareConfig, prepare, split_stream
from train.prepare import main
from train.prepared import Metadata, open_prepared, prepared_tokenizer


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text.jsonl", documents=300)


def documents_of(*paths):
    return list(read_documents([str(path) for path in paths], "text", BadData()))


def all_records(store):
    return [store.read(i, 0, int(n)) for i, n in enumerate(store.lengths)]


def test_every_document_comes_back_in_its_split(tmp_path, text):
    metadata = prepare(PrepareConfig(str(tmp_path / "out"), (str(text),), held_out_fraction=0.1))
    corpus = open_prepared(tmp_path / "out", ByteTokenizer(), 64, BadData())
    expected: dict[str, list[bytes]] = {"train": [], "held_out": []}
    for document in documents_of(text):
        split = "held_out" if zlib.crc32(document.text) < 0.1 * 2**32 else "train"
        tokens = framed(document, ByteTokenizer().encode(document.text), ByteTokenizer())
        expected[split].append(tokens.tobytes())
    for split in expected:
        store = getattr(corpus, split)
        assert sorted(tokens.tobytes() for tokens in all_records(store)) == sorted(expected[split])
        assert store.num_documents == len(expected[split]) == getattr(metadata, split).documents
        assert store.num_bytes == sum(len(tokens) // 2 - 2 for tokens in expected[split])
    assert 10 < len(expected["held_out"]) < 60
    assert corpus.fingerprint == metadata.fingerprint and metadata.fingerprint.startswith("300-")
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out" / "lock").exists()


def test_files_of_tokens_end_at_their_size(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} word\n" * 150_000)
    metadata = prepare(PrepareConfig(str(tmp_path / "out"), (str(tmp_path / "*.txt"),), shard_mib=1))
    assert len(metadata.train.shards) == 4 and len(metadata.held_out.shards) == 1
    corpus = open_prepared(tmp_path / "out", ByteTokenizer(), 64, BadData())
    text = bytes(np.concatenate(all_records(corpus.train)).astype(np.uint16)[1:1000].astype(np.uint8))
    assert text.startswith(b"a word\na word")


def test_long_documents_are_cut_into_records_that_predict_every_token_once(tmp_path):
    text = bytes(1 + i % 250 for i in range(1000))
    (tmp_path / "a.txt").write_bytes(text)
    prepare(PrepareConfig(str(tmp_path / "out"), (str(tmp_path / "a.txt"),), record_tokens=100))
    store = open_prepared(tmp_path / "out", ByteTokenizer(), 100, BadData()).train
    records = all_records(store)
    assert len(records) > 5 and all(2 <= len(record) <= 101 for record in records)
    assert [256, *text[:950], 256] == [256, *np.concatenate([record[1:] for record in records])]
    assert store.num_targets == 951 and store.num_documents == 1
    with pytest.raises(DataError, match=r"rows of up to 100 tokens, not 128; .*--record-tokens 128"):
        open_prepared(tmp_path / "out", ByteTokenizer(), 128, BadData())


def write_tokenizer(path, extra=()):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["alpha", "beta", "gamma", "delta", "state", "key", "value", "the", "of", "é", "<eos>", *extra]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="the"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


def test_tokenizer_travels_with_the_data_and_another_is_refused(tmp_path, text):
    file = write_tokenizer(tmp_path / "words.json")
    prepare(PrepareConfig(str(tmp_path / "out"), (str(text),), tokenizer=str(file), eos_token="of"))
    file.unlink()
    tokenizer = prepared_tokenizer(tmp_path / "out")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (11, 8)
    store = open_prepared(tmp_path / "out", tokenizer, 64, BadData()).train
    text_of = tokenizer.decode(store.read(0, 1, 20))
    assert set(text_of.split()) <= {"alpha", "beta", "gamma", "delta", "state", "key", "value", "the", "é"}
    for other in (
        ByteTokenizer(),
        FileTokenizer(write_tokenizer(tmp_path / "more.json", ["more"])),
        FileTokenizer(tmp_path / "out" / "tokenizer.json"),  # the same words, another separator
    ):
        with pytest.raises(DataError, match="prepared with another tokenizer than this run's"):
            open_prepared(tmp_path / "out", other, 64, BadData())
    write_tokenizer(tmp_path / "out" / "tokenizer.json", ["more"])
    with pytest.raises(DataError, match=r"tokenizer\.json: not the file that made the tokens"):
        prepared_tokenizer(tmp_path / "out")


def test_bad_records_stop_it_or_are_counted(tmp_path, text):
    text.write_text(text.read_text() + '{"text": cut\n')
    with pytest.raises(DataError, match=r"text\.jsonl:301: not valid JSON"):
        prepare(PrepareConfig(str(tmp_path / "out"), (str(text),)))
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]  # nothing is left behind
    said: list[str] = []
    metadata = prepare(PrepareConfig(str(tmp_path / "out"), (str(text),), on_error="skip"), say=said.append)
    assert said[0].startswith(f"skipped 1 bad records: {text}:301: not valid JSON")
    assert metadata.skipped == 1 and metadata.train.documents + metadata.held_out.documents == 300


def test_command_says_what_it_made_and_what_is_wrong(tmp_path, text, capsys):
    args = ["--out", str(tmp_path / "out"), "--files", str(text)]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "held out: " in out and f"python -m train --data.files {tmp_path / 'out'}" in out
    for extra, expected in (
        ([], "argument --out: "),
        (["--held-out-fraction", "1"], "argument --held-out-fraction: "),
        (["--record-tokens", "0"], "argument --record-tokens: "),
        (["--eos-token", "x"], "argument --eos-token: goes with --tokenizer"),
        (["--out", str(tmp_path / "b"), "--tokenizer", "none.json"], "argument --tokenizer: "),
        (["--out", str(tmp_path / "b"), "--files", "none.txt"], "data file not found: none.txt"),
        (["--out", str(tmp_path / "b"), "--files", str(tmp_path / "out")], "is prepared already"),
        (["--out", str(text / "b")], "argument --out: "),
    ):
        assert main([*args, *extra]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and expected in err and err.count("\n") == 1
    assert not (tmp_path / "b").exists()


def test_killed_preparation_leaves_nothing_that_looks_whole_and_can_be_run_again(tmp_path):
    pipe = tmp_path / "text.jsonl"
    write_text(pipe, documents=20_000)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    command = [sys.executable, "-c", f"""
import time
from train import preparation as p
def slow(size): time.sleep(0.001)
p.prepare(p.PrepareConfig({str(out)!r}, ({str(pipe)!r},), shard_mib=1), progress=slow)
"""]  # fmt: skip
    process = subprocess.Popen(command, env=environment())
    deadline = time.monotonic() + 60
    while not list(partial.glob("train-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert partial.is_dir() and not out.exists() and not (partial / "dataset.json").exists()
    metadata = prepare(PrepareConfig(str(out), (str(pipe),)))
    assert metadata.train.documents + metadata.held_out.documents == 20_000
    assert not partial.exists() and Metadata.read(out) == metadata


def test_two_preparations_of_one_directory_are_refused(tmp_path, text):
    (tmp_path / "out.partial").mkdir()
    with open(tmp_path / "out.partial" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is preparing data in"):
            prepare(PrepareConfig(str(tmp_path / "out"), (str(text),)))


@pytest.mark.parametrize("name", ["notes.txt", "train-00000.array_record.bak", "folder/x"])
def test_a_partial_directory_of_others_is_left_alone(tmp_path, text, name):
    theirs = tmp_path / "out.partial" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with pytest.raises(ConfigError, match=rf"argument --out: .*out\.partial .*{name.partition('/')[0]}"):
        prepare(PrepareConfig(str(tmp_path / "out"), (str(text),)))
    assert theirs.read_text() == "mine"


def split(documents, fraction):
    found = list(split_stream(documents, fraction))
    return [[d for s, d in found if s == name] for name in ("train", "held_out")]


def test_stream_is_split_by_text_whatever_the_order_and_the_names():
    documents = [Document(f"d{i}", b"%d" % i) for i in range(2000)]
    train, held_out = split(documents, 0.05)
    assert len(train) + len(held_out) == 2000 and 60 < len(held_out) < 140
    renamed = [Document("again", d.text) for d in documents[::-1]]
    assert {d.text for d in split(renamed, 0.05)[1]} == {d.text for d in held_out}


def test_stream_holds_out_at_least_one_document():
    documents = [Document("d", b"%d" % i) for i in range(100)]
    for order in (documents, documents[::-1]):
        train, held_out = split(order, 1e-9)
        assert len(train) == 99
        assert held_out[0].text == min(documents, key=lambda d: zlib.crc32(d.text)).text


def test_stream_of_few_documents_gives_up_their_tails():
    train, held_out = split([Document("d", b"0123456789" * 10)], 0.1)
    assert len(train[0].text) == 90 and held_out[0].text == b"0123456789"


def test_metadata_of_another_format_is_refused(tmp_path, text):
    prepare(PrepareConfig(str(tmp_path / "out"), (str(text),)))
    path = tmp_path / "out" / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(DataError, match=r"dataset\.json: format 99, and this version reads 1"):
        Metadata.read(tmp_path / "out")
    path.write_text("{}")
    with pytest.raises(DataError, match=r"dataset\.json: not written by train\.prepare"):
        Metadata.read(tmp_path / "out")


def test_stores_in_memory_and_on_disk_read_alike(tmp_path, text):
    prepare(PrepareConfig(str(tmp_path / "out"), (str(text),)))
    store = open_prepared(tmp_path / "out", ByteTokenizer(), 64, BadData()).train
    records = all_records(store)
    offsets = np.cumsum([0, *map(len, records)])
    memory = TokenStore(np.concatenate(records), offsets, store.num_bytes)
    assert np.array_equal(memory.lengths, store.lengths) and memory.num_targets == store.num_targets
    assert np.array_equal(memory.read(7, 3, 9), store.read(7, 3, 9))
