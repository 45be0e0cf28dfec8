"""Tokenizers give back the text they were given."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel

from deltajax.tokenizer import ByteTokenizer, FileTokenizer
from train.corpus import tokenize
from train.documents import DataError, Document

TEXT = "def f(x):\n\treturn x  # naïve Δ 漢字 🙂\n"


@pytest.fixture
def bpe(tmp_path):
    """A byte-level BPE tokenizer file trained on a few bytes, with an end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<stop>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 10, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_bytes_round_trip():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(TEXT.encode())
    assert tokenizer.decode([tokenizer.eos_id, *ids, 259]) == TEXT


def test_file_tokenizer_round_trips_and_finds_its_separator(bpe):
    tokenizer = FileTokenizer(bpe)
    ids = tokenizer.encode(TEXT.encode())
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == TEXT
    assert tokenizer.eos_id == 0 and ids.max() < tokenizer.vocab_size


def test_separator_can_be_named_and_must_exist(bpe):
    assert FileTokenizer(bpe, "<stop>").eos_id == 1
    with pytest.raises(ValueError, match="no token '<nope>'"):
        FileTokenizer(bpe, "<nope>")


def test_tokenizer_without_separator_gets_one(tmp_path):
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "t.json"))
    tokenizer = FileTokenizer(tmp_path / "t.json")
    assert tokenizer.eos_id == 2 and tokenizer.vocab_size == 3


def test_vocabulary_with_holes_ends_after_its_largest_id(tmp_path):
    vocabulary = {"a": 0, "b": 9, "c": 70_000}
    hf = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    hf.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.save(str(tmp_path / "t.json"))
    tokenizer = FileTokenizer(tmp_path / "t.json")
    assert tokenizer.eos_id == 70_001 and tokenizer.vocab_size == 70_002
    store = tokenize([Document("d", b"a b c")], tokenizer)
    assert store.tokens.tolist() == [70_001, 0, 9, 70_000, 70_001]
    assert tokenizer.decode([70_001, 0, 5, 9, 70_000, 70_080]) == "a b c"  # ids of no token vanish


@pytest.mark.parametrize("largest", [299, 2**16 + 5])
def test_ids_beyond_the_vocabulary_are_refused(largest):
    class Wrong(ByteTokenizer):
        vocab_size = 257

        def encode(self, text):
            return np.array([1, largest], np.int32)

    with pytest.raises(DataError, match=rf"doc\.txt: token ids from 1 to {largest}, beyond .* 257"):
        tokenize([Document("doc.txt", b"a")], Wrong())


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        FileTokenizer(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json"):
        FileTokenizer(tmp_path / "broken.json")
