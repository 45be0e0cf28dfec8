"""A bigram model to beat: if a language model is no better than counting pairs, it has not learned."""

from collections.abc import Sequence

import numpy as np

from train.corpus import TokenStore
from train.data import Batch

# Weight of the unigram distribution, in pseudo-counts per context (Dirichlet smoothing).
_PSEUDO_COUNTS = 1.0
# Up to this many cells the table of pairs is dense (bincount); beyond, pairs are sorted.
_DENSE_CELLS = 2**24


def bigram_loss(store: TokenStore, batches: Sequence[Batch], vocab_size: int) -> float:
    """Mean loss of a bigram model fit on `store`, over the targets of `batches`, in nats per token.

    The estimate is p(b | a) = (count(a, b) + p(b)) / (count(a) + 1), with p(b) the add-one unigram
    estimate: every pair keeps a positive probability.

    Args:
        store: the training split, or a sample of it.
        batches: evaluation batches, as from `train.data.eval_batches`.
        vocab_size: number of token ids.
    """
    tokens = store.tokens.astype(np.int64)
    inside = np.ones(len(tokens) - 1, bool)
    inside[store.offsets[1:-1] - 1] = False  # a document's last token does not precede the next's first
    first, second = tokens[:-1][inside], tokens[1:][inside]

    mask = [batch["segment_ids"] > 0 for batch in batches]
    a = np.concatenate([b["tokens"][m] for b, m in zip(batches, mask, strict=True)]).astype(np.int64)
    b = np.concatenate([b["targets"][m] for b, m in zip(batches, mask, strict=True)]).astype(np.int64)

    contexts = np.bincount(first, minlength=vocab_size)
    unigram = (np.bincount(second, minlength=vocab_size) + 1) / (len(second) + vocab_size)
    pairs = first * vocab_size + second
    wanted = a * vocab_size + b
    if vocab_size**2 <= _DENSE_CELLS:
        joint = np.bincount(pairs, minlength=vocab_size**2)[wanted]
    else:
        seen, counts = np.unique(pairs, return_counts=True)
        at = np.minimum(np.searchsorted(seen, wanted), len(seen) - 1)
        joint = np.where(seen[at] == wanted, counts[at], 0)
    probability = (joint + _PSEUDO_COUNTS * unigram[b]) / (contexts[a] + _PSEUDO_COUNTS)
    return float(-np.log(probability).mean())
