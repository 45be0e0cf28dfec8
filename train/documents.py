"""Documents from outside: text files, JSON lines and Parquet, and what happens to bad ones.

Readers yield one document at a time and hold little more than it, so that a corpus may be larger than memory.
"""

import glob
import json
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

OnError = Literal["raise", "skip"]

METADATA = "dataset.json"  # what makes a directory a prepared one; written last

# Vendored packages, machine-made tables (codecs, generated grammars) and tests: not the prose we want.
_STDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
_PARQUET_ROWS = 256  # read at a time
_EXAMPLES = 3  # of skipped data, shown
_PACKED = {".7z", ".bz2", ".gz", ".lz4", ".tar", ".tgz", ".xz", ".zip", ".zst"}
_NOT_TEXT = _PACKED | {".arrow", ".feather", ".json", ".ndjson", ".npy", ".npz", ".pdf"}
_SNIFFED = 2**16  # bytes of a text file that are looked at first


class DataError(ValueError):
    """The data cannot be used as given; the message names the file, and the record where there is one."""


class BadData:
    """What to do about a bad file or record: raise at once, or count it and pass over it.

    Args:
        on_error: "raise" or "skip".

    Attributes:
        count: records (or whole files, where their records cannot be counted) passed over.
        messages: what was wrong with the first few.
    """

    def __init__(self, on_error: OnError = "raise"):
        self._on_error = on_error
        self._lock = threading.Lock()  # batches are read by a thread of their own
        self.count = 0
        self.messages: list[str] = []

    def found(self, message: str, cause: Exception | None = None, records: int = 1) -> None:
        """Reports one bad file or record.

        Raises:
            DataError: unless bad data is skipped.
        """
        if self._on_error == "raise":
            raise DataError(message) from cause
        with self._lock:
            self.count += records
            if len(self.messages) < _EXAMPLES:
                self.messages.append(message)

    def summary(self) -> str:
        """One line: how much was skipped, and the first few reasons."""
        more = "; ..." if self.count > len(self.messages) else ""
        return f"skipped {self.count:,} bad records: {'; '.join(self.messages)}{more}"


@dataclass(frozen=True)
class Document:
    """One text: `name` says where it came from, `text` is UTF-8."""

    name: str
    text: bytes


def stdlib_files() -> list[str]:
    """The .py files of the running interpreter's standard library, in path order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (path for path in sorted(root.rglob("*.py")))
    return [str(path) for path in paths if _STDLIB_SKIP.isdisjoint(path.relative_to(root).parts)]


def stdlib_documents(progress: Callable[[int], object] = lambda size: None) -> Iterator[Document]:
    """The running interpreter's standard library, one document per .py file, in path order.

    Args:
        progress: is told how many bytes of the files were consumed.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in stdlib_files():
        content = Path(name).read_bytes()
        progress(len(content))
        if text := content.strip():
            yield Document(Path(name).relative_to(root).as_posix(), text + b"\n")


def is_prepared(name: str) -> bool:
    """Whether this is a directory that `python -m train.prepare` completed."""
    return (Path(name) / METADATA).is_file()


def expand(patterns: Sequence[str]) -> list[str]:
    """Files and prepared directories that match paths or globs (`**` allowed), each pattern's in order.

    Raises:
        DataError: a pattern matches nothing, or is a directory of anything else.
    """
    names: list[str] = []
    for pattern in patterns:
        if Path(pattern).is_dir() and not is_prepared(pattern):
            raise DataError(
                f"{pattern} is a directory without {METADATA}: python -m train.prepare did not make it; "
                f"for files in it give a pattern such as '{pattern.rstrip('/')}/*.jsonl'"
            )
        # A file may have a name that reads as a pattern.
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        found = [name for name in matches if Path(name).is_file() or is_prepared(name)]
        if not found:
            raise DataError(f"data file not found: {pattern}")
        names += found
    return names


def read_documents(
    names: Sequence[str],
    text_field: str,
    bad: BadData,
    *,
    max_text_bytes: int | None = None,
    progress: Callable[[int], object] = lambda size: None,
) -> Iterator[Document]:
    """Documents of text files (one each), of .jsonl files (one per line) and .parquet files (one per row).

    Args:
        names: files; .jsonl and .parquet are told by their names, and so are some kinds that are not text.
        text_field: the field of each JSON object, or the column, that holds the text.
        bad: is told of empty and unreadable files, of those that are not text, and of lines and rows without.
        max_text_bytes: longer text files are cut at line ends into documents of about this size, named
            `file:byte offset`; None reads them whole.
        progress: is told how many bytes of the files were consumed.
    """
    for name in names:
        try:
            size, suffix = Path(name).stat().st_size, Path(name).suffix.lower()
            if size == 0:
                bad.found(f"data file is empty: {name}")
            elif suffix == ".jsonl":
                yield from _json_lines(name, text_field, bad, progress)
            elif suffix == ".parquet":
                yield from _parquet_rows(name, text_field, bad, progress)
            elif why := _not_text(name, suffix):
                bad.found(
                    f"{name}: {why}; --data.files (--files of train.prepare) takes text, .jsonl and .parquet"
                )
            elif max_text_bytes is None or size <= max_text_bytes:
                yield Document(name, Path(name).read_bytes())
                progress(size)
            else:
                yield from _text_parts(name, max_text_bytes, progress)
        except OSError as error:
            bad.found(f"{name}: cannot be read ({error.strerror})", error)


def _not_text(name: str, suffix: str) -> str | None:
    """Why a file is not taken for text, None if it is."""
    if suffix in _NOT_TEXT:
        return f"a {suffix} file is not read"
    with open(name, "rb") as file:
        return "not text, as it has NUL bytes" if b"\0" in file.read(_SNIFFED) else None


def _text_parts(name: str, size: int, progress: Callable[[int], object]) -> Iterator[Document]:
    with open(name, "rb") as file:
        offset = 0
        # To the end of the line, but not endlessly: some text has no lines.
        while part := file.read(size) + file.readline(size):
            yield Document(f"{name}:{offset}", part)
            offset += len(part)
            progress(len(part))


def json_records(
    name: str, bad: BadData, progress: Callable[[int], object] = lambda count: None
) -> Iterator[tuple[str, Any]]:
    """What the lines of a .jsonl file hold, each with its place `file:line`; blank lines are passed over.

    Args:
        name: the file.
        bad: is told of lines that are not JSON.
        progress: is told how many bytes were consumed.
    """
    with open(name, "rb") as file:
        for number, line in enumerate(file, start=1):
            progress(len(line))
            if not line.strip():
                continue
            where = f"{name}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                bad.found(f"{where}: not valid JSON ({error})", error)
                continue
            yield where, record


def _json_lines(
    name: str, text_field: str, bad: BadData, progress: Callable[[int], object]
) -> Iterator[Document]:
    for where, record in json_records(name, bad, progress):
        if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
            fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            bad.found(f"{where}: no text in field {text_field!r} (found: {fields})")
            continue
        try:
            text = record[text_field].encode("utf-8")
        except UnicodeEncodeError as error:  # JSON may escape half of a surrogate pair
            bad.found(f"{where}: text in field {text_field!r} is not Unicode ({error})", error)
            continue
        if text:
            yield Document(where, text)


def _parquet_rows(
    name: str, column: str, bad: BadData, progress: Callable[[int], object]
) -> Iterator[Document]:
    import pyarrow as pa  # here, as it is slow to import and most corpora do without it
    import pyarrow.parquet as pq

    size, row = Path(name).stat().st_size, 0
    try:
        with pq.ParquetFile(name) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
            if column not in schema.names:
                bad.found(f"{name}: no column {column!r} (found: {', '.join(schema.names)})")
                return
            kind = schema.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()):
                bad.found(f"{name}: column {column!r} holds {kind}, not text")
                return
            if not rows:
                bad.found(f"data file is empty: {name} (a Parquet file of no rows)")
            for batch in file.iter_batches(_PARQUET_ROWS, columns=[column]):
                for value in batch.column(0):
                    row += 1
                    text = value.as_py()
                    if text is None:
                        bad.found(f"{name}:{row}: no text in column {column!r} (null)")
                    elif text:
                        yield Document(f"{name}:{row}", text.encode())
                progress(size * len(batch) // rows)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        bad.found(f"{name}: cannot be read as Parquet after row {row} ({reason})", error)
