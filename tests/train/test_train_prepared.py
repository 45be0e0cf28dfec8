"""Training from prepared data: damage is named or skipped; mixtures train and resume."""

import itertools
import json

import numpy as np
import pytest

from deltajax.tokenizer import ByteTokenizer
from tests.train.train_common import TINY, losses, write_text
from train.__main__ import main
from train.data import train_batches
from train.documents import BadData, DataError
from train.mixture import Mixture
from train.preparation import PrepareConfig, prepare
from train.prepared import open_prepared


@pytest.fixture
def dataset(tmp_path):
    """300 documents in one shard a split, and some more in the same place as text."""
    text = write_text(tmp_path / "text.jsonl", documents=300)
    prepare(PrepareConfig(str(tmp_path / "tokens"), (str(text),)))
    return tmp_path / "tokens"


@pytest.fixture
def shards(tmp_path):
    """Three megabytes in shards of one."""
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"{i} text\n" * 9000)
    prepare(PrepareConfig(str(tmp_path / "tokens"), (str(tmp_path / "*.txt"),), shard_mib=1))
    return tmp_path / "tokens"


def opened(directory, bad=None):
    return open_prepared(directory, ByteTokenizer(), 64, bad or BadData())


def batches(store, count=20):
    data = train_batches(Mixture.of(store), seq_len=64, batch_size=4, seed=0, prefetch=2)
    try:
        return list(itertools.islice(data, count))
    finally:
        data.close()


def damage(path, how):
    content = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    else:  # the end, where the reader finds its index, at the same size
        path.write_bytes(content[: -(2**16)] + bytes(2**16))


@pytest.mark.parametrize(
    "how,message",
    [
        ("removed", r"train-00001\.array_record: missing"),
        ("cut", r"train-00001\.array_record: truncated or replaced: [\d,]+ bytes where [\d,]+"),
        ("emptied", r"train-00001\.array_record: truncated or replaced: 0 bytes where [\d,]+"),
        ("end overwritten", r"train-00001\.array_record: damaged \(Corrupted .*\)"),
    ],
)
def test_damaged_file_is_named_with_its_records_or_skipped(shards, how, message):
    whole = opened(shards).train
    damage(shards / "train-00001.array_record", how)
    with pytest.raises(DataError, match=message + r".*; its records \d+ to \d+ of train are lost"):
        opened(shards)
    bad = BadData("skip")
    rest = opened(shards, bad).train
    assert bad.count == len(whole.lengths) - len(rest.lengths) > 0
    # What is left is read from the right files.
    texts = {whole.read(i, 0, 10).tobytes() for i in range(len(whole.lengths)) if i < 3}
    assert texts <= {rest.read(i, 0, 10).tobytes() for i in range(len(rest.lengths))}
    batches(rest)


def test_nothing_left_is_an_error_even_if_damage_is_skipped(dataset):
    damage(dataset / "train-00000.array_record", "cut")
    with pytest.raises(DataError, match=r"nothing is left of the train split; skipped \d+ bad records"):
        opened(dataset, BadData("skip"))


def overwrite_middle(path):
    content = bytearray(path.read_bytes())
    for i in range(len(content) // 3, len(content) // 3 + 50):
        content[i] ^= 0xFF
    path.write_bytes(content)


def test_record_damaged_inside_a_file_is_named_or_skipped(dataset):
    overwrite_middle(dataset / "train-00000.array_record")
    with pytest.raises(DataError, match=r"train-00000\.array_record: record \d+: cannot be read"):
        batches(opened(dataset).train, 300)
    bad = BadData("skip")
    read = batches(opened(dataset, bad).train, 300)
    assert len(read) == 300 and bad.count > 0
    assert all(np.all(batch["tokens"] <= 256) for batch in read)


def test_lengths_that_are_not_the_datas_are_refused(dataset):
    lengths = np.fromfile(dataset / "train.lengths", np.uint32)
    lengths[3] += 1
    lengths.tofile(dataset / "train.lengths")
    with pytest.raises(DataError, match=r"train\.lengths: [\d,]+ records of [\d,]+ tokens where"):
        opened(dataset)
    lengths[4] -= 1  # the sum is right again: what is read tells
    lengths.tofile(dataset / "train.lengths")
    with pytest.raises(DataError, match=r"record [34]: \d+ bytes where \d+ were written"):
        batches(opened(dataset).train, 300)
    (dataset / "train.lengths").unlink()
    with pytest.raises(DataError, match=r"train\.lengths: cannot be read"):
        opened(dataset)


def test_restored_iterator_over_files_continues_with_identical_batches(dataset):
    def fresh():
        store = opened(dataset).train
        return train_batches(Mixture.of(store), seq_len=64, batch_size=4, seed=0)

    a, b = fresh(), fresh()
    list(itertools.islice(a, 11))
    b.set_state(json.loads(json.dumps(a.get_state())))
    for x, y in itertools.islice(zip(a, b, strict=True), 30):
        assert all(np.array_equal(x[name], y[name]) for name in x)
    a.close(), b.close()


def mixture_args(tmp_path, dataset):
    more = write_text(tmp_path / "more.jsonl", documents=40, seed=1)
    return [*TINY, "--data.files", f"{dataset}@3", f"{more}@1"]


def test_mixture_of_prepared_data_and_text_trains_and_shows_its_shares(tmp_path, dataset, capsys):
    args = mixture_args(tmp_path, dataset)
    assert main([*args, "--steps", "3", "--run-dir", str(tmp_path / "r")]) == 0
    out = capsys.readouterr().out
    assert f"75.0% {dataset}: " in out and f"25.0% {tmp_path / 'more.jsonl'}: " in out


@pytest.mark.slow  # three runs, each of which compiles
def test_mixture_of_prepared_data_and_text_resumes_to_the_same_curve(tmp_path, dataset):
    # Bit for bit the same rate at any length: the start of a fall would round otherwise than the peak.
    args = [
        *mixture_args(tmp_path, dataset),
        "--optimizer.schedule",
        "wsd",
        "--optimizer.final-fraction",
        "1",
    ]
    assert main([*args, "--steps", "8", "--run-dir", str(tmp_path / "whole")]) == 0
    for steps in ("4", "8"):
        assert main([*args, "--steps", steps, "--run-dir", str(tmp_path / "parts")]) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_damage_met_in_training_stops_it_or_is_reported(tmp_path, dataset, capsys):
    overwrite_middle(dataset / "train-00000.array_record")
    (tmp_path / "empty.jsonl").touch()
    args = [*TINY, "--data.files", str(dataset), "--steps", "20", "--eval.every", "20"]
    assert main([*args, "--run-dir", str(tmp_path / "a")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "train-00000.array_record: record" in err
    args += [str(tmp_path / "empty.jsonl"), str(tmp_path / "text.jsonl"), "--data.on-error", "skip"]
    index = args.index("--steps")
    args = [*args[:index], *args[index + 4 :], "--steps", "20", "--eval.every", "20"]
    assert main([*args, "--run-dir", str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert f"skipped 1 bad records: data file is empty: {tmp_path / 'empty.jsonl'}\n" in out
    assert out.count("skipped") == 2 and "train-00000.array_record: record" in out


def test_another_tokenizer_than_the_datas_is_refused(tmp_path, dataset, capsys):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "t.json"))
    args = [*TINY, "--data.files", str(dataset), "--run-dir", str(tmp_path / "r")]
    assert main([*args, "--data.tokenizer", str(tmp_path / "t.json")]) == 2
    assert "was prepared with another tokenizer than this run's: bytes of 257 ids" in capsys.readouterr().err
