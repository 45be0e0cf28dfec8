"""The safetensors files of a checkpoint: one, or shards with an index."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Checkpoint:
    """Open files of tensors; each tensor is read when asked for.

    Attributes:
      names: of all tensors.
    """

    def __init__(self, path: Path, files: Sequence[Any]):
        self.path = path
        self._home = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        self.names = frozenset(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, from the header."""
        return tuple(self._home[name].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """A tensor."""
        return self._home[name].get_tensor(name)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Checkpoint]:
    """The checkpoint in a directory, its headers read.

    Raises:
      FileNotFoundError: no weights there, or shards that the index names are missing.
      ValueError: a file that is no whole safetensors file, or an index that is none.
    """
    shards = _shards(path)
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise FileNotFoundError(f"{path}: {INDEX} names files that are not there: {', '.join(missing)}")
    with contextlib.ExitStack() as stack:
        files = []
        for shard in shards:
            try:
                files.append(stack.enter_context(safe_open(shard, "np")))
            except SafetensorError as error:
                raise ValueError(f"{shard}: not a whole safetensors file ({error})") from error
        yield Checkpoint(path, files)


def _shards(path: Path) -> list[Path]:
    if (index := path / INDEX).is_file():
        try:
            return [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not an index of safetensors files ({error!r})") from error
    if not (path / SINGLE).is_file():
        raise FileNotFoundError(f"{path}: expected {SINGLE} or {INDEX} in it")
    return [path / SINGLE]


class Pending(NamedTuple):
    """A tensor to write, made when its file is."""

    name: str
    bytes: int
    make: Callable[[], np.ndarray]


def write(path: Path, tensors: Sequence[Pending], max_shard_bytes: int) -> None:
    """Writes tensors in that order into as few files as fit, and with several, their index.

    Host memory: the tensors of one file.
    """
    shards: list[list[Pending]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.bytes
    names, where = [SINGLE], dict[str, str]()
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        made = {t.name: np.ascontiguousarray(t.make()) for t in shard}
        save_file(made, path / name, metadata={"format": "pt"})  # transformers reads no other
        where |= dict.fromkeys(made, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.bytes for t in tensors)}, "weight_map": where}
        (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")
