"""Tokenised documents, and a corpus held in memory.

A corpus of text is read and tokenised once, up front, into one flat array of ids (2 bytes a token for
vocabularies of up to 65,536, else 4). One that is too large for that is prepared first: see `train.prepared`.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from deltajax.tokenizer import Tokenizer
from train.documents import BadData, DataError, Document, expand, read_documents, stdlib_documents

# Below this many documents, holding out whole documents would hold out too much or nothing.
MIN_DOCUMENTS_TO_SPLIT = 20


class Store(Protocol):
    """Tokenised documents, wherever they lie. Each is `eos, its tokens..., eos`."""

    @property
    def num_bytes(self) -> int:
        """Bytes of text, for bits per byte."""
        ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, [D]."""
        ...

    @property
    def num_documents(self) -> int:
        """How many documents."""
        ...

    @property
    def num_targets(self) -> int:
        """Tokens to predict: all but the first of each document."""
        ...

    def read(self, index: int, start: int, stop: int) -> np.ndarray | None:
        """Tokens `start:stop` of a document; None if it cannot be read and bad data is skipped."""
        ...


@dataclass(frozen=True)
class TokenStore:
    """A `Store` in memory: documents end to end.

    Attributes:
        tokens: uint16 or int32 [N].
        offsets: int64 [D + 1]; document d is `tokens[offsets[d]:offsets[d + 1]]`.
        num_bytes: bytes of text.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    num_bytes: int

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [D]."""
        return np.diff(self.offsets)

    @property
    def num_documents(self) -> int:
        """How many documents."""
        return len(self.offsets) - 1

    @property
    def num_targets(self) -> int:
        """Tokens to predict: all but the first of each document."""
        return len(self.tokens) - self.num_documents

    def read(self, index: int, start: int, stop: int) -> np.ndarray:
        """Tokens `start:stop` of a document."""
        begin = int(self.offsets[index])
        return self.tokens[begin + start : begin + stop]


@dataclass(frozen=True)
class Corpus:
    """A training and a held-out split, with a fingerprint of the text behind both and of how it was split."""

    train: Store
    held_out: Store
    fingerprint: str


class Fingerprint:
    """Of documents, as they come: how many, their bytes, and a checksum over all."""

    def __init__(self) -> None:
        self.documents = self.bytes = self._checksum = 0

    @classmethod
    def of(cls, documents: Iterable[Document]) -> "Fingerprint":
        """Of all of them."""
        fingerprint = cls()
        for document in documents:
            fingerprint.add(document)
        return fingerprint

    def add(self, document: Document) -> None:
        """Takes the next document in."""
        self.documents += 1
        self.bytes += len(document.text)
        self._checksum = zlib.crc32(document.text, self._checksum)

    def __str__(self) -> str:
        return f"{self.documents}-{self.bytes}-{self._checksum:08x}"


def split_documents(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents.

    Whole documents are held out, those with the lowest checksum of their text: the choice depends neither on
    order, nor on names, nor on a seed, and copies of a text stay together. A corpus of few different texts
    gives up the tail of each instead.
    """
    checksums = [zlib.crc32(d.text) for d in documents]
    if len(set(checksums)) < MIN_DOCUMENTS_TO_SPLIT:
        cuts = [len(d.text) - max(1, round(len(d.text) * fraction)) for d in documents]
        head = [Document(d.name, d.text[:cut]) for d, cut in zip(documents, cuts, strict=True)]
        tail = [Document(d.name, d.text[cut:]) for d, cut in zip(documents, cuts, strict=True)]
        return [d for d in head if d.text], tail
    last = sorted(checksums)[max(1, round(len(documents) * fraction)) - 1]
    splits: tuple[list[Document], list[Document]] = ([], [])
    for document, checksum in zip(documents, checksums, strict=True):
        splits[checksum <= last].append(document)
    return splits


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest dtype that holds every id: uint16 or int32."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32)


def framed(document: Document, ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """A document's ids [N] with an end-of-document id on either side, [N + 2] of `token_dtype`.

    Raises:
        DataError: an id is beyond the tokenizer's vocabulary.
    """
    if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        raise DataError(
            f"{document.name}: token ids from {ids.min()} to {ids.max()}, beyond the vocabulary of "
            f"{tokenizer.vocab_size}"
        )
    framed = np.full(len(ids) + 2, tokenizer.eos_id, token_dtype(tokenizer))
    framed[1:-1] = ids
    return framed


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer) -> TokenStore:
    """Tokenises documents into one store, an end-of-document id on either side of each.

    Raises:
        DataError: a document has an id beyond the tokenizer's vocabulary.
    """
    parts, num_bytes = [np.empty(0, token_dtype(tokenizer))], 0
    for document in documents:
        parts.append(framed(document, tokenizer.encode(document.text), tokenizer))
        num_bytes += len(document.text)
    lengths = [len(part) for part in parts]
    return TokenStore(np.concatenate(parts), np.cumsum(lengths, dtype=np.int64), num_bytes)


def load_corpus(
    patterns: Sequence[str],
    text_field: str,
    held_out_fraction: float,
    tokenizer: Tokenizer,
    bad: BadData | None = None,
) -> Corpus:
    """Reads, splits and tokenises a corpus; no patterns means the standard library.

    Args:
        patterns: paths or globs of text, .jsonl and .parquet files.
        text_field: field or column that holds the text.
        held_out_fraction: share of the documents to hold out.
        tokenizer: what to tokenise with.
        bad: what to do about bad data; by default it raises.

    Raises:
        DataError: nothing matches a pattern, or no document, or nothing to train on, is left.
    """
    bad = bad or BadData()
    documents = list(read_documents(expand(patterns), text_field, bad) if patterns else stdlib_documents())
    if not documents:
        raise DataError(f"no documents in {', '.join(patterns) or 'the standard library'}")
    train, held_out = split_documents(documents, held_out_fraction)
    if not train:
        raise DataError(f"{documents[0].name}: too short to train on")
    # A run that is resumed must notice if text it had held out is among what it would train on.
    fingerprint = f"{Fingerprint.of(documents)} (held out: {Fingerprint.of(held_out)})"
    return Corpus(tokenize(train, tokenizer), tokenize(held_out, tokenizer), fingerprint)
