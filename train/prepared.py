"""Prepared data: tokens on disk that training reads at random, made by `python -m train.prepare`.

A prepared directory holds

    train-00000.array_record ...      records of token ids, little-endian uint16 or int32
    train.lengths                     tokens of each record, uint32, in the order of the files
    held_out-00000.array_record ...   the same of the held-out split
    held_out.lengths
    tokenizer.json                    what made the ids, unless they are bytes
    dataset.json                      `Metadata`; written last

A record is one document, `eos, its tokens..., eos`. A longer one than `record_tokens` + 1 is cut: its records
overlap by a token, so that every token but the first is predicted once.

Memory grows by 20 bytes a record: the lengths, where each record lies, and the trainer's index of pieces.
"""

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from deltajax.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from train.corpus import Corpus
from train.documents import METADATA, BadData, DataError

FORMAT = 1  # raised by a change that old readers cannot read
LENGTHS = np.dtype("<u4")
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class Shard:
    """One ArrayRecord file: its name, records, and bytes on disk."""

    file: str
    records: int
    size: int


@dataclass(frozen=True)
class Split:
    """One split: documents and bytes of text that went in, tokens (eos included) and files that came out."""

    documents: int
    text_bytes: int
    tokens: int
    shards: tuple[Shard, ...]

    @property
    def records(self) -> int:
        """Records in all shards."""
        return sum(shard.records for shard in self.shards)


@dataclass(frozen=True)
class Metadata:
    """What `dataset.json` holds.

    Attributes:
        format: `FORMAT` of the writer.
        tokenizer: `Tokenizer.fingerprint`.
        vocab_size: every id is below it.
        eos_id: stands at both ends of a document.
        eos_token: its name, where that was given; with `tokenizer.json` it makes the tokenizer again.
        dtype: of the ids, "uint16" or "int32".
        record_tokens: most targets of a record.
        fingerprint: of the documents, as `train.corpus.Fingerprint` gives it.
        held_out_fraction: share of the documents that was held out.
        skipped: bad records that were passed over.
        files: the sources.
        train: the training split.
        held_out: the held-out split.
    """

    format: int
    tokenizer: str
    vocab_size: int
    eos_id: int
    eos_token: str | None
    dtype: str
    record_tokens: int
    fingerprint: str
    held_out_fraction: float
    skipped: int
    files: tuple[str, ...]
    train: Split
    held_out: Split

    def write(self, directory: Path) -> None:
        """Completes a prepared directory."""
        text = json.dumps(dataclasses.asdict(self), indent=2)
        (directory / METADATA).write_text(text + "\n")

    @classmethod
    def read(cls, directory: Path) -> "Metadata":
        """Inverts `write`.

        Raises:
            DataError: another format, or not what `write` wrote.
        """
        path = directory / METADATA
        try:
            values: dict[str, Any] = json.loads(path.read_text())
            if values["format"] != FORMAT:
                raise DataError(
                    f"{path}: format {values['format']}, and this version reads {FORMAT}; prepare it again"
                )
            for split in SPLITS:
                shards = tuple(Shard(**shard) for shard in values[split]["shards"])
                values[split] = Split(**{**values[split], "shards": shards})
            return cls(**{**values, "files": tuple(values["files"])})
        except DataError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not written by train.prepare ({error!r})") from error


class RecordStore:
    """A split of a prepared directory: a `train.corpus.Store` on disk.

    Args:
        directory: the prepared directory.
        metadata: its metadata.
        split: "train" or "held_out".
        bad: what to do about shards that are not what the metadata says, and records that cannot be read.

    Raises:
        DataError: a shard is missing, truncated or damaged, unless bad data is skipped.
    """

    def __init__(self, directory: Path, metadata: Metadata, split: str, bad: BadData):
        about: Split = getattr(metadata, split)
        self._directory, self._split, self._bad = directory, split, bad
        self._dtype = np.dtype(metadata.dtype).newbyteorder("<")
        self.num_documents, self.num_bytes = about.documents, about.text_bytes
        lengths = self._read_lengths(about)
        self._shards, kept, first = [], [], 0
        for shard in about.shards:
            if problem := _problem(directory / shard.file, shard):
                last = first + shard.records
                bad.found(
                    f"{problem}; its records {first} to {last - 1} of {split} are lost", None, shard.records
                )
            else:
                self._shards.append(shard)
                kept.append(lengths[first : first + shard.records])
            first += shard.records
        self.lengths = np.concatenate(kept) if kept else lengths[:0]
        self.num_targets = int(self.lengths.sum(dtype=np.int64)) - len(self.lengths)
        self._ends = np.cumsum([shard.records for shard in self._shards], dtype=np.int64)

    def _read_lengths(self, about: Split) -> np.ndarray:
        path = self._directory / f"{self._split}.lengths"
        try:
            lengths = np.fromfile(path, LENGTHS)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        tokens = lengths.sum(dtype=np.int64)
        if len(lengths) != about.records or tokens != about.tokens:
            raise DataError(
                f"{path}: {len(lengths):,} records of {tokens:,} tokens where {METADATA} says "
                f"{about.records:,} of {about.tokens:,}; prepare it again"
            )
        return lengths

    @cached_property
    def _source(self) -> Any:
        # The counts are known: Grain need not open every file to learn them.
        names = [f"{self._directory / shard.file}[0:{shard.records}]" for shard in self._shards]
        return grain.sources.ArrayRecordDataSource(names)

    def read(self, index: int, start: int, stop: int) -> np.ndarray | None:
        """Tokens `start:stop` of a record; None if it is damaged and bad data is skipped."""
        try:
            record = self._source[index]
        except Exception as error:  # the reader raises RuntimeError, and whatever a lost disk makes it raise
            self._bad.found(f"{self._where(index)}: cannot be read ({error})", error)
            return None
        wanted = int(self.lengths[index]) * self._dtype.itemsize
        if len(record) != wanted:
            self._bad.found(f"{self._where(index)}: {len(record)} bytes where {wanted} were written")
            return None
        return np.frombuffer(record, self._dtype)[start:stop]

    def _where(self, index: int) -> str:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        record = index - (int(self._ends[shard - 1]) if shard else 0)
        return f"{self._directory / self._shards[shard].file}: record {record}"


def _problem(path: Path, shard: Shard) -> str | None:
    """What is wrong with a shard, as far as its ends tell; the middle is checked as it is read."""
    if not path.is_file():
        return f"{path}: missing"
    if (size := path.stat().st_size) != shard.size:
        return f"{path}: truncated or replaced: {size:,} bytes where {shard.size:,} were written"
    try:
        reader = ArrayRecordReader(str(path))
        records = reader.num_records()  # 0 if the index at the file's end cannot be read; `close` then raises
        reader.close()
    except Exception as error:  # what the reader raises is not documented
        return f"{path}: damaged ({error})"
    if records != shard.records:
        return f"{path}: replaced: {records:,} records where {shard.records:,} were written"
    return None


def prepared_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer that made a prepared directory.

    Raises:
        DataError: the directory's copy is missing or changed.
    """
    metadata, path = Metadata.read(directory), directory / TOKENIZER
    if metadata.tokenizer == ByteTokenizer.fingerprint:
        return ByteTokenizer()
    try:
        tokenizer = FileTokenizer(path, metadata.eos_token)
    except (OSError, ValueError) as error:
        raise DataError(str(error)) from error
    if tokenizer.fingerprint != metadata.tokenizer:
        raise DataError(
            f"{path}: not the file that made the tokens beside it ({METADATA} has another checksum)"
        )
    return tokenizer


def open_prepared(directory: Path, tokenizer: Tokenizer, seq_len: int, bad: BadData) -> Corpus:
    """Opens a prepared directory for training.

    Args:
        directory: made by `python -m train.prepare`.
        tokenizer: the model's.
        seq_len: tokens of a row.
        bad: what to do about damaged shards and records.

    Raises:
        DataError: it was made with another tokenizer or for shorter rows; a file is missing or damaged,
            unless bad data is skipped; or nothing is left then.
    """
    metadata = Metadata.read(directory)
    if (metadata.tokenizer, metadata.vocab_size) != (tokenizer.fingerprint, tokenizer.vocab_size):
        raise DataError(
            f"{directory} was prepared with another tokenizer than this run's: {metadata.tokenizer} of "
            f"{metadata.vocab_size:,} ids, not {tokenizer.fingerprint} of {tokenizer.vocab_size:,}"
        )
    if seq_len > metadata.record_tokens:
        raise DataError(
            f"{directory} was prepared for rows of up to {metadata.record_tokens:,} tokens, not {seq_len:,}; "
            f"prepare it again with --record-tokens {seq_len}"
        )
    train, held_out = (RecordStore(directory, metadata, split, bad) for split in SPLITS)
    for split, store in zip(SPLITS, (train, held_out), strict=True):
        if not store.num_targets:
            raise DataError(f"{directory}: nothing is left of the {split} split; {bad.summary()}")
    return Corpus(train, held_out, metadata.fingerprint)
