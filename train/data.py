"""The Grain pipeline: pieces of documents, shuffled, mixed, packed into rows, batched, checkpointable.

A row of a batch holds one or more pieces. `segment_ids` numbers them 1, 2, ... and is 0 on padding.
`targets` are cut from the same document one token later, so no target crosses a document and the loss
mask is simply `segment_ids > 0`. Pieces overlap by that one token: over an epoch every token of a
document but its opening end-of-document id is a target exactly once.

Training reads several independent streams of rows, each a fixed part of the shuffled pieces, and a process
owns some of them. The number of streams is the run's, not the machine's: a run that is resumed by fewer or
more processes, as long as they share the streams evenly, sees the same batches.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from grain import experimental as grain_experimental

from train.config import ConfigError
from train.corpus import Store
from train.mixture import Group, Mixture

Batch = dict[str, np.ndarray]
# Streams of a run of fewer processes. More would let it grow onto more of them, and delay a resume.
_STREAMS = 16
# A stream fills some rows side by side: more rows leave less padding, and delay a resume by the time it takes
# to fill them again. `docs/data_pipeline.md` has the padding measured.
_PACKING_ROWS = 64
_PACKING_TOKENS = 2**22  # at most this many in the rows of all streams, for memory's sake, ...
_LEAST_PACKING_ROWS = 8  # ... but no fewer rows than these a stream
_INLINE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


@dataclass(frozen=True)
class Pieces:
    """A store cut into (inputs, targets) pieces of at most `seq_len`; a Grain random-access source."""

    store: Store
    seq_len: int
    lengths: np.ndarray  # [D], tokens of each document
    ends: np.ndarray  # int64 [D], pieces up to and with a document's last

    @classmethod
    def cut(cls, store: Store, seq_len: int) -> "Pieces":
        """Cuts every document into full pieces and one shorter rest."""
        lengths = store.lengths
        # The document's last token is a target only: n tokens make n - 1 pairs.
        return cls(
            store, seq_len, lengths, np.cumsum((lengths - 1 + (seq_len - 1)) // seq_len, dtype=np.int64)
        )

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: Any) -> Batch | None:
        """`{"tokens": int32 [n], "targets": int32 [n]}`, n <= seq_len; None for what is bad and skipped."""
        index = int(index)
        document = int(np.searchsorted(self.ends, index, side="right"))
        start = (index - (int(self.ends[document - 1]) if document else 0)) * self.seq_len
        stop = min(start + self.seq_len + 1, int(self.lengths[document]))
        piece = self.store.read(document, start, stop)
        if piece is None:
            return None
        piece = piece.astype(np.int32)
        return {"tokens": piece[:-1], "targets": piece[1:]}

    def __repr__(self) -> str:  # Grain puts it in error messages and logs
        return f"Pieces({len(self)} of {len(self.lengths)} documents)"


def _pieces(group: Group, seq_len: int) -> grain.MapDataset:
    parts = [grain.MapDataset.source(Pieces.cut(store, seq_len)) for store in group.stores]
    return parts[0] if len(parts) == 1 else grain.MapDataset.concatenate(parts)


def _mix(mixture: Mixture, parts: Sequence[grain.MapDataset], pieces: Sequence[int]) -> grain.MapDataset:
    """Interleaves the groups' pieces so that their tokens have the mixture's shares (within a percent).

    Args:
        mixture: its groups' shares count tokens.
        parts: each group's pieces, in order.
        pieces: how many pieces each group's tokens make, for their mean length.
    """
    if len(parts) == 1:
        return parts[0]
    rates = [group.share * n / group.num_targets for group, n in zip(mixture.groups, pieces, strict=True)]
    return grain.MapDataset.mix(parts, rates)


def _pack(
    pieces: grain.MapDataset, seq_len: int, rows: int, shuffle_seed: int | None = None
) -> grain.IterDataset:
    """Packs pieces into rows, `rows` of them side by side; with a seed they come in a random order."""
    packed = grain_experimental.BestFitPackIterDataset(
        pieces.to_iter_dataset(_INLINE),
        length_struct={"tokens": seq_len, "targets": seq_len},
        num_packing_bins=rows,
        shuffle_bins=shuffle_seed is not None,
        seed=shuffle_seed or 0,
    )
    return packed.map(
        lambda row: {
            "tokens": row["tokens"],
            "targets": row["targets"],
            "segment_ids": row["tokens_segment_ids"].astype(np.int32),
        }
    )


class StreamBatches(grain.DatasetIterator):
    """This process's rows of each batch, taken in turn from the streams it owns.

    Args:
        stream: makes stream i of n: a Grain iterator over rows.
        rows: of a batch, this process's.
        num_streams: n; a restored state brings its own.
        process_index: which of the processes this is.
        process_count: how many share the streams; divides `num_streams`.
    """

    def __init__(
        self,
        stream: Callable[[int, int], grain.DatasetIterator],
        rows: int,
        num_streams: int,
        process_index: int,
        process_count: int,
    ):
        super().__init__()
        self._stream, self._rows = stream, rows
        self._process = process_index, process_count
        self._open(num_streams)

    def _open(self, num_streams: int) -> None:
        index, count = self._process
        if num_streams % count:
            raise ConfigError(
                f"the data of this run comes in {num_streams} streams, which {count} processes cannot share "
                f"evenly; resume it with a number of processes that divides {num_streams}"
            )
        own = num_streams // count
        self._num_streams, self._turn = num_streams, 0
        self._streams = {i: self._stream(i, num_streams) for i in range(index * own, (index + 1) * own)}

    def __next__(self) -> Batch:
        own = list(self._streams)
        turns = [(self._turn + i) % len(own) for i in range(self._rows)]
        self._turn = (self._turn + self._rows) % len(own)
        # In the order of streams, so that the global batch is the same for any number of processes.
        rows = [next(self._streams[own[i]]) for i in sorted(turns)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def get_state(self) -> dict[str, Any]:
        """The position of this process's streams, JSON-ready."""
        return {
            "num_streams": self._num_streams,
            "turn": self._turn,
            "streams": {str(i): stream.get_state() for i, stream in self._streams.items()},
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position of this process, or to a merged one (see `merge_states`).

        Raises:
            ConfigError: the processes of this run cannot share its streams evenly, or the position is of
                a pipeline without streams.
        """
        if "streams" not in state:
            raise ConfigError(
                "its place in the data was saved by an older version, which read data otherwise"
            )
        self._open(state["num_streams"])
        # Other streams than that process's take turns from the first one on.
        self._turn = state["turn"] % len(self._streams)
        for i, stream in self._streams.items():
            stream.set_state(state["streams"][str(i)])


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The states of all processes of a run as one, which every process of its next run may be set to."""
    streams = {i: stream for state in states for i, stream in state.get("streams", {}).items()}
    return {**states[0], "streams": streams} if streams else dict(states[0])


def train_batches(
    mixture: Mixture,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 2,
) -> grain.DatasetIterator:
    """An endless, seeded iterator over training batches.

    Args:
        mixture: the training split.
        seq_len: T, tokens a row.
        batch_size: rows of the global batch; this process yields its `1 / process_count` share.
        seed: fixes the order; every epoch has its own.
        process_index: which share of the rows this process reads.
        process_count: processes in all.
        prefetch: batches prepared ahead by one background thread; 0 prepares them in line. Either way
            the iterator's state is that of the batches handed out, so a restored iterator repeats none.

    Returns:
        A Grain iterator with `get_state`/`set_state`; its batches are `{"tokens", "targets",
        "segment_ids"}`, each int32 [batch_size / process_count, seq_len].
    """
    pieces = [_pieces(group, seq_len).seed(seed) for group in mixture.groups]
    shuffled = [part.shuffle().repeat() for part in pieces]

    def stream(index: int, count: int) -> grain.DatasetIterator:
        # Every stream has the whole mixture: each takes its part of every group.
        parts = [part[index::count] for part in shuffled]
        bins = min(_PACKING_ROWS, max(_LEAST_PACKING_ROWS, _PACKING_TOKENS // (count * seq_len)))
        mixed = _mix(mixture, parts, [len(part) for part in pieces])
        # Sources take turns: without an order of its own, every stream would be at the same source at once.
        several = len(mixture.groups) > 1
        order = int(np.random.SeedSequence([seed, index]).generate_state(1)[0]) if several else None
        return iter(_pack(mixed, seq_len, bins, shuffle_seed=order))

    # As many as divide the batch, so that a row of a batch is always of the same stream.
    num_streams = math.gcd(batch_size, _STREAMS)
    if num_streams % process_count:
        num_streams = process_count
    batches: grain.DatasetIterator = StreamBatches(
        stream, batch_size // process_count, num_streams, process_index, process_count
    )
    return grain_experimental.ThreadPrefetchDatasetIterator(batches, prefetch) if prefetch else batches


def eval_batches(mixture: Mixture, *, seq_len: int, batch_size: int, max_batches: int) -> list[Batch]:
    """The first `max_batches` batches of the held-out split, the same on every call and every process.

    Of a weighted mixture no more pieces are read than its parts have together, the small ones repeating: what
    is evaluated has the mixture's shares throughout.

    Returns:
        Batches as from `train_batches`, of `batch_size` rows; the last is filled up with padding rows.
    """
    parts = [_pieces(group, seq_len).shuffle(seed=0) for group in mixture.groups]
    counts = [len(part) for part in parts]
    if len(parts) > 1:  # a mixture of parts that end would end with the first of them
        parts = [part.repeat() for part in parts]
    rows = _pack(_mix(mixture, parts, counts)[: sum(counts)], seq_len, batch_size)
    batches: list[Batch] = []
    for batch in rows.batch(batch_size, drop_remainder=False):
        missing = batch_size - len(batch["tokens"])
        batches.append({name: np.pad(x, ((0, missing), (0, 0))) for name, x in batch.items()})
        if len(batches) == max_batches:
            break
    return batches
