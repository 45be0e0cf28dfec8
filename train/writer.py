"""Writes a prepared directory (see `train.prepared` for what is in it), one document at a time."""

import re
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from deltajax.tokenizer import FileTokenizer, Tokenizer
from train.corpus import Fingerprint, framed, token_dtype
from train.documents import METADATA, BadData, DataError, Document
from train.prepared import FORMAT, LENGTHS, SPLITS, TOKENIZER, Metadata, Shard, Split

# A record is read alone, so it is compressed alone.
_OPTIONS = "group_size:1,zstd:3"
_NAMES = re.compile(
    rf"({'|'.join(SPLITS)})(\.lengths|-\d+\.array_record)|{re.escape(TOKENIZER)}|{re.escape(METADATA)}"
)


def is_written(path: Path) -> bool:
    """Whether this is a file of a name that `DatasetWriter` makes."""
    return path.is_file() and _NAMES.fullmatch(path.name) is not None


class _SplitWriter:
    """One split's files.

    Args:
        directory: where they go.
        name: of the split.
        dtype: of the ids, little-endian.
        record_tokens: targets of a record, at most.
        shard_bytes: of tokens, after which a new file begins.
    """

    def __init__(self, directory: Path, name: str, dtype: np.dtype, record_tokens: int, shard_bytes: int):
        self._directory, self._name, self._dtype = directory, name, dtype
        self._record_tokens, self._shard_bytes = record_tokens, shard_bytes
        self._lengths: BinaryIO = open(directory / f"{name}.lengths", "wb")  # noqa: SIM115 (see `close`)
        self._writer: Any = None
        self._shards: list[Shard] = []
        self._documents = self._text_bytes = self._tokens = 0

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        """Writes one document, `eos, its tokens..., eos`."""
        self._documents += 1
        self._text_bytes += text_bytes
        lengths = []
        for start in range(0, len(tokens) - 1, self._record_tokens):
            record = tokens[start : start + self._record_tokens + 1].astype(self._dtype)
            self._write(record.tobytes())
            lengths.append(len(record))
        self._tokens += sum(lengths)
        self._lengths.write(np.array(lengths, LENGTHS).tobytes())

    def _write(self, record: bytes) -> None:
        if self._writer is None:
            self._path = self._directory / f"{self._name}-{len(self._shards):05d}.array_record"
            self._writer = ArrayRecordWriter(str(self._path), _OPTIONS)
            self._records = self._bytes = 0
        self._writer.write(record)
        self._records += 1
        self._bytes += len(record)
        if self._bytes >= self._shard_bytes:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._shards.append(Shard(self._path.name, self._records, self._path.stat().st_size))

    def close(self) -> None:
        """Completes the files."""
        self._end_shard()
        self._lengths.close()

    def split(self) -> Split:
        """What was written."""
        return Split(self._documents, self._text_bytes, self._tokens, tuple(self._shards))


class DatasetWriter:
    """Writes a prepared directory. Enter it to add documents; leave it, and `finish`.

    Args:
        directory: an empty directory.
        tokenizer: what makes the ids.
        record_tokens: targets of a record, at most; longer documents are cut.
        shard_bytes: of tokens, after which a new file begins.
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer, record_tokens: int, shard_bytes: int):
        self._directory, self._tokenizer, self._record_tokens = directory, tokenizer, record_tokens
        self._fingerprint = Fingerprint()
        dtype = token_dtype(tokenizer).newbyteorder("<")
        self._splits = {
            name: _SplitWriter(directory, name, dtype, record_tokens, shard_bytes) for name in SPLITS
        }

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for split in self._splits.values():
            split.close()

    def add(self, split: str, document: Document, ids: np.ndarray) -> None:
        """Writes one document's ids [N] into "train" or "held_out".

        Raises:
            DataError: an id is beyond the tokenizer's vocabulary.
        """
        self._fingerprint.add(document)
        self._splits[split].add(framed(document, ids, self._tokenizer), len(document.text))

    def finish(
        self, *, files: tuple[str, ...], eos_token: str | None, held_out_fraction: float, bad: BadData
    ) -> Metadata:
        """Writes the tokenizer and the metadata, which completes the directory.

        Args:
            files: the sources, for the record.
            eos_token: the tokenizer's separator, where it was named.
            held_out_fraction: share of the documents held out.
            bad: what was skipped.

        Raises:
            DataError: nothing to train on, or nothing held out.
        """
        tokenizer, (train, held_out) = self._tokenizer, (self._splits[name].split() for name in SPLITS)
        where = " ".join(files) or "the standard library"
        if not train.documents and not held_out.documents:
            raise DataError(f"no documents in {where}" + (f"; {bad.summary()}" if bad.count else ""))
        for name, split in (("train on", train), ("hold out", held_out)):
            if not split.documents:
                raise DataError(f"{where}: nothing to {name} at a held-out fraction of {held_out_fraction}")
        if isinstance(tokenizer, FileTokenizer):
            (self._directory / TOKENIZER).write_bytes(tokenizer.json)
        metadata = Metadata(
            format=FORMAT,
            tokenizer=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            eos_token=eos_token,
            dtype=token_dtype(tokenizer).name,
            record_tokens=self._record_tokens,
            fingerprint=str(self._fingerprint),
            held_out_fraction=held_out_fraction,
            skipped=bad.count,
            files=files,
            train=train,
            held_out=held_out,
        )
        metadata.write(self._directory)
        return metadata
