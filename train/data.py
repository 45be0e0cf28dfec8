"""The Grain pipeline: pieces of documents, shuffled, packed into rows, batched, checkpointable.

A row of a batch holds one or more pieces. `segment_ids` numbers them 1, 2, ... and is 0 on padding.
`targets` are cut from the same document one token later, so no target crosses a document and the loss
mask is simply `segment_ids > 0`. Pieces overlap by that one token: over an epoch every token of a
document but its opening end-of-document id is a target exactly once.
"""

from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from grain import experimental as grain_experimental

from train.corpus import TokenStore

Batch = dict[str, np.ndarray]
# Rows filled side by side by first-fit packing: more rows leave less padding, and delay a resume by the
# time it takes to fill them again (milliseconds).
_PACKING_ROWS = 64


@dataclass(frozen=True)
class Pieces:
    """A token store cut into (inputs, targets) pieces of at most `seq_len`; a Grain random-access source."""

    store: TokenStore
    starts: np.ndarray  # int64 [P], index into store.tokens
    lengths: np.ndarray  # int64 [P], 1..seq_len

    @classmethod
    def cut(cls, store: TokenStore, seq_len: int) -> "Pieces":
        """Cuts every document into full pieces and one shorter rest."""
        starts, lengths = [], []
        for begin, end in zip(store.offsets[:-1], store.offsets[1:], strict=True):
            first = np.arange(begin, end - 1, seq_len)  # the document's last token is a target only
            starts.append(first)
            lengths.append(np.minimum(seq_len, end - 1 - first))
        return cls(store, np.concatenate(starts), np.concatenate(lengths))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> Batch:
        """`{"tokens": int32 [n], "targets": int32 [n]}`, n <= seq_len."""
        start, length = int(self.starts[index]), int(self.lengths[index])
        piece = self.store.tokens[start : start + length + 1].astype(np.int32)
        return {"tokens": piece[:-1], "targets": piece[1:]}

    def __repr__(self) -> str:  # Grain puts it in error messages and logs
        return f"Pieces({len(self)} of {len(self.store.tokens)} tokens)"


def _pack(pieces: grain.IterDataset, seq_len: int, rows: int) -> grain.IterDataset:
    packed = grain_experimental.FirstFitPackIterDataset(
        pieces,
        length_struct={"tokens": seq_len, "targets": seq_len},
        num_packing_bins=rows,
        shuffle_bins=False,
    )
    return packed.map(
        lambda row: {
            "tokens": row["tokens"],
            "targets": row["targets"],
            "segment_ids": row["tokens_segment_ids"].astype(np.int32),
        }
    )


def train_batches(
    store: TokenStore,
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
        store: the training split.
        seq_len: T, tokens a row.
        batch_size: rows of the global batch; this process yields its `1 / process_count` share.
        seed: fixes the order; every epoch has its own.
        process_index: which share of the pieces this process reads.
        process_count: processes in all.
        prefetch: batches prepared ahead by one background thread; 0 prepares them in line. Either way
            the iterator's state is that of the batches handed out, so a restored iterator repeats none.

    Returns:
        A Grain iterator with `get_state`/`set_state`; its batches are `{"tokens", "targets",
        "segment_ids"}`, each int32 [batch_size / process_count, seq_len].
    """
    pieces = grain.MapDataset.source(Pieces.cut(store, seq_len)).seed(seed)
    if len(pieces) < process_count:
        raise ValueError(f"{len(pieces)} pieces of text cannot be shared by {process_count} processes")
    pieces = pieces[process_index::process_count].shuffle().repeat()
    rows = pieces.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    batches = _pack(rows, seq_len, _PACKING_ROWS).batch(batch_size // process_count, drop_remainder=True)
    if prefetch:
        batches = grain_experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch)
    return iter(batches)


def eval_batches(store: TokenStore, *, seq_len: int, batch_size: int, max_batches: int) -> list[Batch]:
    """The first `max_batches` batches of the held-out split, the same on every call and every process.

    Returns:
        Batches as from `train_batches`, of `batch_size` rows; the last is filled up with padding rows.
    """
    pieces = grain.MapDataset.source(Pieces.cut(store, seq_len)).shuffle(seed=0)
    rows = pieces.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    batches: list[Batch] = []
    for batch in _pack(rows, seq_len, batch_size).batch(batch_size, drop_remainder=False):
        missing = batch_size - len(batch["tokens"])
        batches.append({name: np.pad(x, ((0, missing), (0, 0))) for name, x in batch.items()})
        if len(batches) == max_batches:
            break
    return batches
