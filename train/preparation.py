"""Text, JSON lines and Parquet to tokens on disk, as `train.prepared` describes them.

Documents are streamed: memory does not grow with the corpus. The directory appears under its name when it is
complete; a run that is killed leaves `<out>.partial`, which the next one clears.
"""

import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from train.config import ConfigError
from train.corpus import MIN_DOCUMENTS_TO_SPLIT, split_documents
from train.documents import (
    BadData,
    DataError,
    Document,
    expand,
    is_prepared,
    read_documents,
    stdlib_documents,
    stdlib_files,
)
from train.guard import only_run_in
from train.prepared import Metadata
from train.tokenizer import chosen_tokenizer
from train.writer import DatasetWriter, is_written

# Longer text files are cut here (at line ends): a document and its tokens are held in memory.
_MAX_TEXT_BYTES = 4 * 2**20
# Documents tokenised together, on all cores: enough to keep them busy, and little memory.
_BATCH_BYTES, _BATCH_DOCUMENTS = 2**20, 1024


@dataclass(frozen=True)
class PrepareConfig:
    """Tokenise text once, for training with --data.files OUT."""

    out: str
    """directory to make"""
    files: tuple[str, ...] = ()
    """text, .jsonl and .parquet files or globs; none means the running Python's standard library"""
    text_field: str = "text"
    """field of a .jsonl record, or column of a .parquet file, that holds the text"""
    on_error: Literal["raise", "skip"] = "raise"
    """bad files and records: stop at the first, or count them, pass over them and report"""
    tokenizer: str | None = None
    """Hugging Face tokenizers JSON file, copied into OUT; none means bytes"""
    eos_token: str | None = None
    """the tokenizer's document separator, where its name is unusual"""
    held_out_fraction: float = 0.05
    """share of the documents kept for evaluation"""
    record_tokens: int = 131_072
    """longest row that can be trained on; longer documents are cut into records of this many tokens"""
    shard_mib: int = 256
    """size of a file, in MiB of tokens before compression"""

    def check(self) -> None:
        """Raises ConfigError, naming the argument, for values that cannot work."""
        if not 0 < self.held_out_fraction < 1:
            raise ConfigError(
                f"argument --held-out-fraction: must be between 0 and 1, got {self.held_out_fraction}"
            )
        for name, value in (("--record-tokens", self.record_tokens), ("--shard-mib", self.shard_mib)):
            if value < 1:
                raise ConfigError(f"argument {name}: must be positive, got {value}")


def split_stream(documents: Iterable[Document], fraction: float) -> Iterator[tuple[str, Document]]:
    """Each document with its split, "train" or "held_out", as they come.

    A document is held out if the checksum of its text is low enough, or if none is, the one with the lowest:
    the choice depends neither on order nor on names, and copies of a text stay together. Of a few documents
    the tails are held out instead, as of a corpus in memory.
    """
    first: list[Document] = []
    lowest: tuple[int, Document] | None = None  # of those to train on
    any_held_out = False
    limit = fraction * 2**32
    documents = iter(documents)
    for document in documents:
        first.append(document)
        if len(first) == MIN_DOCUMENTS_TO_SPLIT:
            break
    else:
        for split, part in zip(("train", "held_out"), split_documents(first, fraction), strict=True):
            yield from ((split, document) for document in part)
        return

    def in_order() -> Iterator[Document]:
        while first:
            yield first.pop(0)
        yield from documents

    for document in in_order():
        checksum = zlib.crc32(document.text)
        if checksum < limit:
            any_held_out = True
            yield "held_out", document
        elif lowest is None:
            lowest = checksum, document
        elif checksum < lowest[0]:
            yield "train", lowest[1]
            lowest = checksum, document
        else:
            yield "train", document
    if lowest is not None:
        yield "train" if any_held_out else "held_out", lowest[1]


def batches(documents: Iterable[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    """Documents in lists of about a mebibyte."""
    batch: list[tuple[str, Document]] = []
    size = 0
    for split, document in documents:
        batch.append((split, document))
        size += len(document.text)
        if size >= _BATCH_BYTES or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def partial_directory(out: Path) -> Iterator[Path]:
    """A directory beside `out` that takes its name if the block succeeds, and goes if it fails.

    Raises:
        ConfigError: `out` exists or cannot be made, another process is making it, or what is there in its
            stead was not made here.
    """
    if out.exists():
        raise ConfigError(f"argument --out: {out} exists; delete it or choose another")
    partial = out.with_name(out.name + ".partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"argument --out: {partial} cannot be made ({error})") from error
    # Only what a run that was killed may have left is cleared.
    if foreign := sorted(x.name for x in partial.iterdir() if x.name != "lock" and not is_written(x)):
        raise ConfigError(
            f"argument --out: {partial} is in the way: it holds {foreign[0]}, which train.prepare did not "
            "make; move it or choose another --out"
        )
    with only_run_in(partial, "preparing data", "--out"):
        try:
            for left in partial.iterdir():
                if left.name != "lock":
                    left.unlink()
            yield partial
            (partial / "lock").unlink()
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial)
            raise


def prepare(
    config: PrepareConfig,
    start: Callable[[int], object] = lambda size: None,
    progress: Callable[[int], object] = lambda size: None,
    say: Callable[[str], object] = lambda text: None,
) -> Metadata:
    """Makes a prepared directory.

    Args:
        config: what to make of what.
        start: is told how many bytes there are to read.
        progress: is told how many of them were consumed, again and again.
        say: is told what bad data was skipped, if any was.

    Returns:
        The metadata written.

    Raises:
        ConfigError: options that cannot work.
        DataError: a source that cannot be used.
    """
    config.check()
    tokenizer = chosen_tokenizer(config.tokenizer, config.eos_token, "--")
    names = expand(config.files) if config.files else stdlib_files()
    for name in names:
        if is_prepared(name):
            raise DataError(f"{name} is prepared already")
    bad = BadData(config.on_error)
    with partial_directory(Path(config.out)) as directory:
        start(sum(Path(name).stat().st_size for name in names))
        writer = DatasetWriter(directory, tokenizer, config.record_tokens, config.shard_mib * 2**20)
        with writer:
            documents = (
                read_documents(
                    names, config.text_field, bad, max_text_bytes=_MAX_TEXT_BYTES, progress=progress
                )
                if config.files
                else stdlib_documents(progress)
            )
            for batch in batches(split_stream(documents, config.held_out_fraction)):
                ids = tokenizer.encode_batch([document.text for _, document in batch])
                for (split, document), tokens in zip(batch, ids, strict=True):
                    writer.add(split, document, tokens)
        metadata = writer.finish(
            files=config.files,
            eos_token=config.eos_token,
            held_out_fraction=config.held_out_fraction,
            bad=bad,
        )
    if bad.count:
        say(bad.summary())
    return metadata
