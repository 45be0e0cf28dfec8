"""Pairs from JSON lines, tokenised, and packed into rows by Grain as the trainer's text is.

Two answers to one prompt always lie in one row, as segments of their own: neither sees the other, nor another
pair. `answers` marks the targets that count, those of the answers and of the end of the document after them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from grain import experimental as grain_experimental

from deltajax.tokenizer import Tokenizer
from train.data import Batch, StreamBatches
from train.documents import BadData, DataError, expand, json_records

_STREAMS = 16  # as many as divide the batch are read side by side, for any number of processes
_PACKING_ROWS = 16  # that a stream fills side by side
_INLINE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
_FIELDS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and of two answers to it, without the ids that open and end them."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


def read_pairs(patterns: Sequence[str], tokenizer: Tokenizer, bad: BadData | None = None) -> list[Pair]:
    """Pairs from .jsonl files whose records have text in `prompt`, `chosen` and `rejected`.

    Args:
        patterns: paths or globs.
        tokenizer: of the model.
        bad: what to do about bad records; by default the first raises.

    Raises:
        DataError: nothing matches, a record is bad, or there is no pair.
    """
    bad = bad or BadData()
    pairs = []
    for name in expand(patterns):
        if not name.lower().endswith(".jsonl"):
            raise DataError(f"{name}: expected a .jsonl file of pairs")
        for where, record in json_records(name, bad):
            given = record if isinstance(record, dict) else {}
            missing = ", ".join(field for field in _FIELDS if not isinstance(given.get(field), str))
            if missing:
                bad.found(f"{where}: no text in {missing}; expected prompt, chosen and rejected")
                continue
            try:
                encoded = [given[field].encode() for field in _FIELDS]
            except UnicodeEncodeError as error:  # JSON may escape half of a surrogate pair
                bad.found(f"{where}: text that is not Unicode ({error})", error)
                continue
            pairs.append(Pair(*(tokenizer.encode(text).astype(np.int32) for text in encoded)))
    if not pairs:
        raise DataError(f"no pairs in {' '.join(patterns)}")
    return pairs


def answer_row(prompt: np.ndarray, answer: np.ndarray, eos: int) -> Batch:
    """`eos, prompt, answer, eos` as tokens, targets and answers, int32 [n + 1] each for n ids."""
    ids = np.concatenate([[eos], prompt, answer, [eos]]).astype(np.int32)
    answers = np.zeros(len(ids) - 1, np.int32)
    answers[len(prompt) :] = 1
    return {"tokens": ids[:-1], "targets": ids[1:], "answers": answers}


@dataclass(frozen=True)
class Examples:
    """What is packed: a pair's two answers, or one answer; a Grain random-access source.

    Attributes:
        rows: of each example its answers' rows, one or two, see `answer_row`; DPO's also have `reference`.
    """

    rows: Sequence[Sequence[Batch]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Batch:
        """The answers end to end, and `side`, 1 for the first and 2 for the second."""
        rows = self.rows[int(index)]
        joined = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        sizes = [len(row["tokens"]) for row in rows]
        return joined | {"side": np.repeat(np.arange(1, len(rows) + 1, dtype=np.int32), sizes)}

    def __repr__(self) -> str:  # Grain puts it in error messages and logs
        return f"Examples({len(self)})"

    @property
    def sides(self) -> int:
        """Answers of an example."""
        return len(self.rows[0])

    @property
    def names(self) -> tuple[str, ...]:
        """The arrays of an example."""
        return (*self.rows[0][0], "side")

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, [N]."""
        return np.array([sum(len(row["tokens"]) for row in rows) for rows in self.rows])

    def per_row(self, seq_len: int) -> int:
        """How many of them a row may hold.

        Raises:
            DataError: an example is longer than a row.
        """
        if (longest := int(self.lengths.max())) > seq_len:
            raise DataError(
                f"pair {int(self.lengths.argmax()) + 1} has {longest} tokens with both answers, and rows "
                f"have {seq_len}: raise --data.seq-len, or leave it out of the data"
            )
        return max(1, seq_len // int(self.lengths.min()))


def examples(pairs: Sequence[Pair], eos: int, both: bool = True) -> Examples:
    """The pairs as examples: with both answers (DPO), or with the chosen one alone (fine-tuning)."""
    return Examples(
        [
            [
                answer_row(pair.prompt, x, eos)
                for x in ((pair.chosen, pair.rejected) if both else (pair.chosen,))
            ]
            for pair in pairs
        ]
    )


def _packed(source: grain.MapDataset, what: Examples, seq_len: int, bins: int) -> grain.IterDataset:
    rows = grain_experimental.BestFitPackIterDataset(
        source.to_iter_dataset(_INLINE),
        length_struct={name: seq_len for name in what.names},
        num_packing_bins=bins,
        shuffle_bins=False,
        max_sequences_per_bin=what.per_row(seq_len),
    )
    sides = what.sides

    def finish(row: dict[str, np.ndarray]) -> Batch:
        numbers = row["tokens_segment_ids"].astype(np.int32)  # 1, 2, ... by example, 0 at padding
        segments = np.where(numbers > 0, (numbers - 1) * sides + row["side"], 0).astype(np.int32)
        arrays = {name: row[name] for name in what.names if name != "side"}
        return {**arrays, "segment_ids": segments}

    return rows.map(finish)


def train_rows(
    what: Examples,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 2,
) -> grain.DatasetIterator:
    """An endless, seeded iterator over batches of packed examples; arguments as `train.data.train_batches`.

    Raises:
        DataError: an example is longer than a row, or there are fewer examples than rows are read at a time.
    """
    streams = math.gcd(batch_size, _STREAMS)
    streams = streams if streams % process_count == 0 else process_count
    if len(what) < streams:
        raise DataError(f"{len(what)} pairs to train on: expected at least {streams}")
    shuffled = grain.MapDataset.source(what).seed(seed).shuffle().repeat()

    def stream(index: int, count: int) -> grain.DatasetIterator:
        return iter(_packed(shuffled[index::count], what, seq_len, _PACKING_ROWS))

    what.per_row(seq_len)
    batches: grain.DatasetIterator = StreamBatches(
        stream, batch_size // process_count, streams, process_index, process_count
    )
    return grain_experimental.ThreadPrefetchDatasetIterator(batches, prefetch) if prefetch else batches


def all_rows(what: Examples, *, seq_len: int, batch_size: int) -> list[Batch]:
    """Every example once, in batches of `batch_size` packed rows; the last is filled up with padding rows."""
    rows = _packed(grain.MapDataset.source(what), what, seq_len, batch_size)
    batches = []
    for batch in rows.batch(batch_size, drop_remainder=False):
        missing = batch_size - len(batch["tokens"])
        batches.append({name: np.pad(x, ((0, missing), (0, 0))) for name, x in batch.items()})
    return batches


def with_reference(what: Examples, reference: Sequence[Sequence[np.ndarray]]) -> Examples:
    """The same with `reference`: of each example its answers' log-probabilities, token by token."""
    return Examples(
        [
            [row | {"reference": np.asarray(x, np.float32)} for row, x in zip(rows, own, strict=True)]
            for rows, own in zip(what.rows, reference, strict=True)
        ]
    )


def single_rows(what: Examples, *, seq_len: int, batch_size: int) -> list[Batch]:
    """Batches of one answer a row, in the order of examples and of their answers.

    All have the same shape; the last is filled up with padding rows.
    """
    flat = [row for rows in what.rows for row in rows]
    batches = []
    for start in range(0, len(flat), batch_size):
        shape = (batch_size, seq_len)
        batch = {name: np.zeros(shape, x.dtype) for name, x in flat[0].items()}
        batch["segment_ids"] = np.zeros(shape, np.int32)
        for i, row in enumerate(flat[start : start + batch_size]):
            n = len(row["tokens"])
            for name, x in row.items():
                batch[name][i, :n] = x
            batch["segment_ids"][i, :n] = 1
        batches.append(batch)
    return batches
