"""Throughput and memory of the data pipeline: generated JSON lines are prepared, then streamed for an epoch.

    uv run python -m benchmarks.data_pipeline                  # 1 GB of JSON lines, byte tokenizer
    uv run python -m benchmarks.data_pipeline --bpe 8192       # a BPE vocabulary trained on its head
    uv run python -m benchmarks.data_pipeline --check          # and fail if memory grows along the way

Each phase runs in a process of its own, whose peak resident memory (VmHWM) is read along the way. Needs free
disk of about three times the size, in a temporary directory.
"""

import itertools
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

# Where memory is read, as shares of the phase.
POINTS = (0.1, 0.25, 0.5, 0.75, 1.0)
WORDS = 50_000
BPE_SAMPLE_BYTES = 20_000_000


@dataclass(frozen=True)
class Options:
    """Generate, prepare, stream."""

    size: float = 1.0
    """of the JSON lines, in GB (1e9 bytes)"""
    bpe: int | None = None
    """vocabulary of a BPE tokenizer to train on the text's head; none means bytes"""
    seq_len: int = 2048
    """tokens per row"""
    batch_size: int = 16
    """rows per batch"""
    check: bool = False
    """fail if peak memory grows by more than --max-growth after the first tenth"""
    max_growth: int = 64
    """in MiB"""
    directory: str | None = None
    """where the temporary directory goes; the system's place by default"""


@dataclass(frozen=True)
class Sample:
    """A moment of a phase: its share, seconds since the start, and peak resident memory in MiB."""

    share: float
    seconds: float
    peak: float


@dataclass(frozen=True)
class Phase:
    """What a phase did: tokens in all, and moments along the way."""

    tokens: int
    samples: list[Sample]


def peak_mib() -> float:
    """The process's peak resident memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


class Meter:
    """Takes a `Sample` whenever the share done passes one of `POINTS`."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._begin = time.perf_counter()

    def at(self, share: float) -> None:
        while len(self.samples) < len(POINTS) and share >= POINTS[len(self.samples)]:
            seconds = time.perf_counter() - self._begin
            self.samples.append(Sample(POINTS[len(self.samples)], seconds, peak_mib()))


def texts(seed: int) -> Iterator[str]:
    """Endless made-up documents: words of a Zipf-like distribution, about 2 KB each, some far longer."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    lengths = rng.integers(2, 11, size=WORDS)
    words = np.array(["".join(letters[(26 * rng.random(n) ** 2).astype(int)]) for n in lengths], object)
    while True:
        for count in np.minimum(rng.lognormal(5.0, 1.2, size=1000), 50_000).astype(int) + 1:
            ranks = np.exp(rng.random(count) * np.log(WORDS)).astype(int)
            yield " ".join(words[ranks - 1])


def generate(path: Path, size: int) -> None:
    """Writes `size` bytes of JSON lines, and the rest of the last one."""
    with open(path, "w") as file:
        written = 0
        for text in texts(seed=0):
            written += file.write(json.dumps({"text": text}) + "\n")
            if written >= size:
                return


def train_bpe(path: Path, vocabulary: int) -> None:
    """Saves a byte-level BPE tokenizer, trained on made-up text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(texts(seed=1), BPE_SAMPLE_BYTES // 2000), trainer)
    tokenizer.save(str(path))


def prepare_phase(directory: Path, options: Options) -> Phase:
    from train.preparation import PrepareConfig, prepare

    meter, done, total = Meter(), 0, 1

    def start(size: int) -> None:
        nonlocal total
        total = size

    def progress(size: int) -> None:
        nonlocal done
        done += size
        meter.at(min(done / total, 0.999))  # the end is when the directory is whole

    tokenizer = None if options.bpe is None else str(directory / "tokenizer.json")
    config = PrepareConfig(str(directory / "tokens"), (str(directory / "text.jsonl"),), tokenizer=tokenizer)
    metadata = prepare(config, start, progress)
    meter.at(1.0)
    return Phase(metadata.train.tokens + metadata.held_out.tokens, meter.samples)


def stream_phase(directory: Path, options: Options) -> Phase:
    from train.config import DataConfig
    from train.data import train_batches
    from train.mixture import load_data

    meter, tokens = Meter(), 0
    data = load_data(DataConfig((str(directory / "tokens"),), seq_len=options.seq_len))
    batches = train_batches(data.train, seq_len=options.seq_len, batch_size=options.batch_size, seed=0)
    epoch = data.train.num_targets
    while tokens < epoch:
        tokens += int((next(batches)["segment_ids"] > 0).sum())
        meter.at(tokens / epoch)
    batches.close()
    return Phase(tokens, meter.samples)


def apart(phase: Callable[[Path, Options], Phase], directory: Path, options: Options) -> Phase:
    """Runs a phase in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(phase, (directory, options))


def growth(phase: Phase) -> float:
    """By how many MiB peak memory grew after the first of `POINTS`."""
    return phase.samples[-1].peak - phase.samples[0].peak


def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    size = int(options.size * 1e9)
    directory = Path(tempfile.mkdtemp(prefix="data_pipeline_", dir=options.directory))
    try:
        if shutil.disk_usage(directory).free < 3 * size:
            print(f"error: {directory} has less than {3 * options.size:.1f} GB free", file=sys.stderr)
            return 2
        generate(directory / "text.jsonl", size)
        if options.bpe is not None:
            train_bpe(directory / "tokenizer.json", options.bpe)
        prepared = apart(prepare_phase, directory, options)
        on_disk = sum(path.stat().st_size for path in (directory / "tokens").iterdir())
        streamed = apart(stream_phase, directory, options)
    finally:
        shutil.rmtree(directory)

    table = Table(title=f"{options.size:g} GB of JSON lines, {options.bpe or 'byte'} vocabulary")
    table.add_column("phase")
    for point in POINTS:
        table.add_column(f"peak MiB at {point:.0%}", justify="right")
    for name in ("seconds", "M tokens", "M tokens/s"):
        table.add_column(name, justify="right")
    for name, phase in (("prepare", prepared), ("stream", streamed)):
        seconds = phase.samples[-1].seconds
        peaks = [f"{sample.peak:,.0f}" for sample in phase.samples]
        rate = phase.tokens / seconds / 1e6
        table.add_row(name, *peaks, f"{seconds:,.0f}", f"{phase.tokens / 1e6:,.0f}", f"{rate:,.1f}")
    Console(width=160).print(table)
    print(f"on disk: {on_disk / 1e6:,.0f} MB")
    grown = {name: growth(phase) for name, phase in (("prepare", prepared), ("stream", streamed))}
    if options.check and max(grown.values()) > options.max_growth:
        print(f"memory grew by more than {options.max_growth} MiB: {grown}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
