"""Where text comes from: the running Python's standard library, text files, or JSON lines.

A corpus is read and tokenised once, up front, into one flat array of ids held in memory (2 bytes a
token for vocabularies below 65,536, else 4).
"""

import glob
import json
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.tokenizer import Tokenizer

# Vendored packages, machine-made tables (codecs, generated grammars) and tests: not the prose we want.
_STDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
# Below this many documents, holding out whole documents would hold out too much or nothing.
_MIN_DOCUMENTS_TO_SPLIT = 20


class DataError(ValueError):
    """The data cannot be used as given; the message names the file, and the line where there is one."""


@dataclass(frozen=True)
class Document:
    """One text: `name` says where it came from, `text` is UTF-8."""

    name: str
    text: bytes


@dataclass(frozen=True)
class TokenStore:
    """Tokenised documents, end to end.

    Attributes:
        tokens: uint16 or int32 [N]; every document is `eos, its tokens..., eos`.
        offsets: int64 [D + 1]; document d is `tokens[offsets[d]:offsets[d + 1]]`.
        num_bytes: bytes of text, for bits per byte.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    num_bytes: int

    @property
    def num_documents(self) -> int:
        """How many documents."""
        return len(self.offsets) - 1

    @property
    def num_targets(self) -> int:
        """Tokens to predict: all but the first of each document."""
        return len(self.tokens) - self.num_documents


@dataclass(frozen=True)
class Corpus:
    """A training and a held-out split, with a fingerprint of the text behind both."""

    train: TokenStore
    held_out: TokenStore
    fingerprint: str


def stdlib_documents() -> Iterator[Document]:
    """The running interpreter's standard library, one document per .py file, in path order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _STDLIB_SKIP.isdisjoint(relative.parts) and (text := path.read_bytes().strip()):
            yield Document(relative.as_posix(), text + b"\n")


def file_documents(patterns: Sequence[str], text_field: str) -> Iterator[Document]:
    """Documents of text files (one each) and of .jsonl files (one per line).

    Args:
        patterns: paths or globs (`**` allowed); a name ending in .jsonl is read as JSON lines.
        text_field: the field of each JSON object that holds the text.

    Raises:
        DataError: nothing matches, a file is empty, or a line is not a JSON object with that field.
    """
    for pattern in patterns:
        names = sorted(name for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
        if not names:
            raise DataError(f"data file not found: {pattern}")
        for name in names:
            if Path(name).stat().st_size == 0:
                raise DataError(f"data file is empty: {name}")
            if name.endswith(".jsonl"):
                yield from _json_lines(name, text_field)
            elif text := Path(name).read_bytes():
                yield Document(name, text)


def _json_lines(name: str, text_field: str) -> Iterator[Document]:
    with open(name, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{name}:{number}: not valid JSON ({error})") from error
            if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
                fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise DataError(f"{name}:{number}: no text in field {text_field!r} (found: {fields})")
            try:
                text = record[text_field].encode("utf-8")
            except UnicodeEncodeError as error:  # JSON may escape half of a surrogate pair
                raise DataError(
                    f"{name}:{number}: text in field {text_field!r} is not Unicode ({error})"
                ) from error
            if text:
                yield Document(f"{name}:{number}", text)


def split_documents(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents.

    Whole documents are held out, those with the lowest checksum of their name, so the choice depends
    neither on order nor on a seed. A corpus of few documents gives up the tail of each instead.
    """
    if len(documents) < _MIN_DOCUMENTS_TO_SPLIT:
        cuts = [len(d.text) - max(1, round(len(d.text) * fraction)) for d in documents]
        head = [Document(d.name, d.text[:cut]) for d, cut in zip(documents, cuts, strict=True)]
        tail = [Document(d.name, d.text[cut:]) for d, cut in zip(documents, cuts, strict=True)]
        return [d for d in head if d.text], tail
    ranked = sorted(documents, key=lambda d: (zlib.crc32(d.name.encode()), d.name))
    held_out = {d.name for d in ranked[: max(1, round(len(documents) * fraction))]}
    return [d for d in documents if d.name not in held_out], [d for d in documents if d.name in held_out]


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer) -> TokenStore:
    """Tokenises documents into one store, an end-of-document id on either side of each.

    Raises:
        DataError: a document has an id beyond the tokenizer's vocabulary.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    eos = np.array([tokenizer.eos_id], dtype)
    parts, lengths = [], []
    for document in documents:
        ids = tokenizer.encode(document.text)
        if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
            raise DataError(
                f"{document.name}: token ids from {ids.min()} to {ids.max()}, beyond the vocabulary of "
                f"{tokenizer.vocab_size}"
            )
        parts += [eos, ids.astype(dtype), eos]
        lengths.append(len(ids) + 2)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    tokens = np.concatenate(parts) if parts else eos[:0]
    return TokenStore(tokens, offsets, sum(len(d.text) for d in documents))


def load_corpus(
    patterns: Sequence[str], text_field: str, held_out_fraction: float, tokenizer: Tokenizer
) -> Corpus:
    """Reads, splits and tokenises a corpus; no patterns means the standard library.

    Raises:
        DataError: see `file_documents`; also when no document, or nothing to train on, is left.
    """
    documents = list(file_documents(patterns, text_field) if patterns else stdlib_documents())
    if not documents:
        raise DataError(f"no documents in {', '.join(patterns) or 'the standard library'}")
    checksum = 0
    for document in documents:
        checksum = zlib.crc32(document.text, checksum)
    train, held_out = split_documents(documents, held_out_fraction)
    if not train:
        raise DataError(f"{documents[0].name}: too short to train on")
    fingerprint = f"{len(documents)}-{sum(len(d.text) for d in documents)}-{checksum:08x}"
    return Corpus(tokenize(train, tokenizer), tokenize(held_out, tokenizer), fingerprint)
