"""What a run trains on: one or several sources, their shares, and the tokenizer they have in common."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from deltajax.tokenizer import ByteTokenizer, Tokenizer
from train.config import ConfigError, DataConfig
from train.corpus import Corpus, Store, TokenStore, load_corpus, tokenize
from train.documents import BadData, DataError, expand, read_documents
from train.prepared import open_prepared, prepared_tokenizer
from train.tokenizer import chosen_tokenizer

_WHOLE_TOKENS = 2**24  # up to here a corpus in memory is counted whole
_PART_TOKENS = 2**16  # longer documents are sampled in parts


@dataclass(frozen=True)
class Group:
    """Stores that are read as one, each in proportion to its size."""

    name: str
    stores: tuple[Store, ...]
    share: float
    """of the tokens trained on; all groups' sum to 1"""

    @cached_property
    def num_targets(self) -> int:
        """Tokens to predict."""
        return sum(store.num_targets for store in self.stores)

    @property
    def num_documents(self) -> int:
        """How many documents."""
        return sum(store.num_documents for store in self.stores)


@dataclass(frozen=True)
class Mixture:
    """One split of everything a run reads."""

    groups: tuple[Group, ...]

    @classmethod
    def of(cls, *stores: Store) -> "Mixture":
        """Stores read as one."""
        return cls((Group("", stores, 1.0),))

    @property
    def num_targets(self) -> int:
        """Tokens to predict in all sources."""
        return sum(group.num_targets for group in self.groups)

    @property
    def num_documents(self) -> int:
        """Documents in all sources."""
        return sum(group.num_documents for group in self.groups)

    @property
    def bytes_per_target(self) -> float:
        """Bytes of text behind a token to predict, on average over the mixture."""
        return sum(
            group.share * sum(store.num_bytes for store in group.stores) / group.num_targets
            for group in self.groups
        )

    def sample(self, max_tokens: int) -> TokenStore:
        """Documents of about `max_tokens` tokens in all, drawn as the mixture weighs them.

        A corpus in memory that is the whole mixture is returned as it is, if counting it takes no more than
        seconds.
        """
        stores = [store for group in self.groups for store in group.stores]
        if len(stores) == 1 and isinstance(stores[0], TokenStore) and len(stores[0].tokens) <= _WHOLE_TOKENS:
            return stores[0]
        parts: list[np.ndarray] = []
        for group in self.groups:
            for store in group.stores:
                budget = max_tokens * group.share * store.num_targets / group.num_targets
                parts += _drawn(store, budget)
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return TokenStore(np.concatenate(parts), offsets, 0)


def _drawn(store: Store, budget: float) -> list[np.ndarray]:
    """Random documents (parts of long ones) of about `budget` tokens, all of them if they are not more."""
    lengths = store.lengths.astype(np.int64)
    ends = np.cumsum(-(-lengths // _PART_TOKENS))  # parts up to and with a document's last
    count = math.ceil(budget * int(ends[-1]) / int(lengths.sum()))
    if count < ends[-1]:
        chosen = np.unique(np.random.default_rng(0).integers(0, ends[-1], size=count))
    else:
        chosen = np.arange(ends[-1])
    parts = []
    for document, part in zip(np.searchsorted(ends, chosen, side="right"), chosen, strict=True):
        start = int(part - (ends[document - 1] if document else 0)) * _PART_TOKENS
        stop = min(start + _PART_TOKENS, int(lengths[document]))
        parts.append(store.read(int(document), start, stop))
    return [tokens for tokens in parts if tokens is not None]


@dataclass(frozen=True)
class Data:
    """Everything that `--data.*` names, opened."""

    tokenizer: Tokenizer
    train: Mixture
    held_out: Mixture
    fingerprint: str
    bad: BadData

    def description(self) -> list[str]:
        """What is trained on, a line per source where there are several."""
        lines = [f"{self.train.num_targets:,} training tokens, {self.train.num_documents:,} documents"]
        if len(self.train.groups) > 1:
            lines += [
                f"  {group.share:6.1%} {group.name}: {group.num_targets:,} tokens, "
                f"{group.num_documents:,} documents"
                for group in self.train.groups
            ]
        return lines


def weighted(files: Sequence[str]) -> list[tuple[tuple[str, ...], float]]:
    """Groups of patterns and their shares, which sum to 1.

    Args:
        files: patterns, all of the form `pattern@weight`, each then a group of its own, or none of them.

    Raises:
        ConfigError: some have a weight and some have none, or one that is not positive and finite.
    """
    parsed: list[tuple[str, float]] = []
    for text in files:
        pattern, at, number = text.rpartition("@")
        try:
            weight = float(number)
        except ValueError:
            continue
        if not (at and pattern) or Path(text).exists():
            continue
        if not 0 < weight < math.inf:
            raise ConfigError(f"argument --data.files: the weight of {text} must be positive and finite")
        parsed.append((pattern, weight))
    if not parsed:
        return [(tuple(files), 1.0)]
    if len(parsed) < len(files):
        raise ConfigError(
            "argument --data.files: give all sources a weight, as in 'web/*.jsonl@0.7', or none: "
            + " ".join(files)
        )
    total = sum(weight for _, weight in parsed)
    return [((pattern,), weight / total) for pattern, weight in parsed]


def load_data(config: DataConfig) -> Data:
    """Reads text into memory and opens prepared directories.

    Raises:
        ConfigError: options that are wrong or do not go together.
        DataError: data that cannot be used; see `load_corpus` and `open_prepared`.
    """
    groups = [(expand(patterns), patterns, share) for patterns, share in weighted(config.files)]
    tokenizer = _tokenizer(config, [name for names, _, _ in groups for name in names])
    bad = BadData(config.on_error)
    train, held_out, fingerprints = [], [], []
    for names, patterns, share in groups:
        corpora: list[Corpus] = []
        texts = [name for name in names if not Path(name).is_dir()]
        if texts or not names:
            corpora.append(load_corpus(texts, config.text_field, config.held_out_fraction, tokenizer, bad))
        for name in names:
            if Path(name).is_dir():
                corpora.append(open_prepared(Path(name), tokenizer, config.seq_len, bad))
        title = " ".join(patterns)
        train.append(Group(title, tuple(corpus.train for corpus in corpora), share))
        held_out.append(Group(title, tuple(corpus.held_out for corpus in corpora), share))
        fingerprint = "+".join(corpus.fingerprint for corpus in corpora)
        fingerprints.append(fingerprint if len(groups) == 1 else f"{share:.6f}*({fingerprint})")
    return Data(tokenizer, Mixture(tuple(train)), Mixture(tuple(held_out)), " + ".join(fingerprints), bad)


def load_held_out(files: Sequence[str], config: DataConfig, fingerprint: str) -> tuple[Mixture, Tokenizer]:
    """Other text than `config.files`, to evaluate on: whole files, and what prepared directories hold out.

    Args:
        files: paths or globs.
        config: the run's.
        fingerprint: of the run's tokenizer.

    Returns:
        The text as one source, and the tokenizer of `config`.

    Raises:
        ConfigError: a tokenizer that is no more what it was.
        DataError: no text, or text that cannot be used.
    """
    tokenizer = tokenizer_of(config, fingerprint)
    names, bad = expand(files), BadData(config.on_error)
    texts = [name for name in names if not Path(name).is_dir()]
    stores: list[Store] = [
        open_prepared(Path(name), tokenizer, config.seq_len, bad).held_out
        for name in names
        if Path(name).is_dir()
    ]
    if texts:
        stores.append(tokenize(read_documents(texts, config.text_field, bad), tokenizer))
    mixture = Mixture.of(*(store for store in stores if store.num_documents))
    if not mixture.num_documents:
        raise DataError(f"no documents in {' '.join(files)}")
    return mixture, tokenizer


def tokenizer_of(config: DataConfig, fingerprint: str) -> Tokenizer:
    """The tokenizer of a run's data, which need not be there any more unless it alone has the tokenizer.

    Args:
        config: the run's.
        fingerprint: of its tokenizer, as it was saved; the one returned may be another where a file changed.

    Raises:
        ConfigError: options that are wrong; DataError: a tokenizer that is no more what it was.
    """
    if config.tokenizer is not None or config.eos_token is not None:
        return _tokenizer(config, ())
    if fingerprint == ByteTokenizer.fingerprint:
        return ByteTokenizer()
    return _tokenizer(config, [name for patterns, _ in weighted(config.files) for name in expand(patterns)])


def _tokenizer(config: DataConfig, names: Sequence[str]) -> Tokenizer:
    directories = [Path(name) for name in names if Path(name).is_dir()]
    if config.tokenizer is None and config.eos_token is None and directories:
        return prepared_tokenizer(directories[0])
    return chosen_tokenizer(config.tokenizer, config.eos_token, "--data.")
