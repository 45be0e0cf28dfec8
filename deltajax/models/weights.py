"""A model's weights as a safetensors file with its configuration beside it, and back.

Every layer's parameters have names of their own, `layers.<n>.mixer.q_proj.kernel`, however the model stacks
layers for its scans.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from deltajax.models.abstract import abstract_model
from deltajax.models.config import ModelConfig
from deltajax.models.groups import layer_groups
from deltajax.models.language_model import LanguageModel

_FORMAT = "deltajax"  # in the file's header, to tell others by
_NAMED = 10  # parameters that one message names


def save_weights(path: str | Path, params: Any, config: ModelConfig, **about: str) -> None:
    """Writes `path` and, beside it, `config_path(path)`; each whole or not at all.

    A stacked array's layers are written from where they lie: nothing is held twice.

    Args:
        path: the safetensors file.
        params: the model's parameters, as `nnx.to_pure_dict(nnx.state(model, nnx.Param))`; arrays of this
            process (NumPy or JAX).
        config: the model's configuration.
        **about: further entries of the file's header.
    """
    path, tensors = Path(path), {}
    for where, x in jax.tree.leaves_with_path(params):
        x = np.ascontiguousarray(x)
        for name, index in _names(where, config):
            tensors[name] = x if index is None else x[index, ...]
    with replacing(config_path(path)) as new:
        new.write_text(config.to_json() + "\n")
    with replacing(path) as new:
        save_file(tensors, new, metadata={"format": _FORMAT, **about})


def load_weights(path: str | Path, **changes: Any) -> LanguageModel:
    """The model that `save_weights` wrote, one parameter at a time.

    All names and shapes are compared before the first is read.

    Args:
        path: the safetensors file, its configuration beside it.
        **changes: of the configuration, such as `dtype` or `implementation`.

    Raises:
        FileNotFoundError: there is no such file, or no configuration beside it.
        ValueError: the file is none of these, or parameters are missing, left over, or of another shape; the
            message names them.
    """
    path = Path(path)
    config = read_config(path).replace(**changes)
    model = abstract_model(config)
    graph, state = nnx.split(model)
    abstract, loaded = nnx.to_pure_dict(state), {}
    with _opened(path) as file:
        _check_parameters(path, file, abstract, config)
        for where, x in jax.tree.leaves_with_path(abstract):
            stacked = np.empty(x.shape, x.dtype)
            for name, index in _names(where, config):
                part = stacked if index is None else stacked[index, ...]
                part[...] = file.get_tensor(name)
            loaded[tuple(key.key for key in where)] = jnp.asarray(stacked)
    nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(loaded))
    return nnx.merge(graph, state)


def read_config(path: str | Path) -> ModelConfig:
    """The configuration beside a file of weights.

    Raises:
        FileNotFoundError: there is no such file, or no configuration beside it.
        ValueError: what is there is no configuration, or names what deltajax does not know.
    """
    path, beside = Path(path), config_path(path)
    for file, what in ((path, "file of weights"), (beside, f"configuration of {path}")):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such {what}")
    try:
        return ModelConfig.from_json(beside.read_text())
    except (TypeError, ValueError) as error:
        raise ValueError(f"{beside}: {error}") from error


def read_about(path: str | Path) -> dict[str, str]:
    """The entries of the header that `save_weights` was given.

    Raises:
        ValueError: the file was not written by it.
    """
    with _opened(Path(path)) as file:
        return {name: value for name, value in file.metadata().items() if name != "format"}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "np") as file:
            if (file.metadata() or {}).get("format") != _FORMAT:
                raise ValueError(f"{path}: not written by save_weights")
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


def _check_parameters(path: Path, file: Any, abstract: Any, config: ModelConfig) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for where, x in jax.tree.leaves_with_path(abstract):
        for name, index in _names(where, config):
            shapes[name] = tuple(x.shape if index is None else x.shape[1:])
    names = set(file.keys())
    wrong = [f"no parameter {name}" for name in shapes if name not in names]
    for name in shapes.keys() & names:
        shape = tuple(file.get_slice(name).get_shape())
        if shape != shapes[name]:
            wrong.append(f"{name} has shape {shape}, expected {shapes[name]}")
    wrong += [f"{name} is no parameter of the configuration beside it" for name in names - shapes.keys()]
    if wrong:
        more = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise ValueError(f"{path}: {'; '.join(sorted(wrong)[:_NAMED])}{more}")


def config_path(path: str | Path) -> Path:
    """Where the configuration of a file of weights lies."""
    return Path(path).with_suffix(".json")


def tokenizer_path(path: str | Path) -> Path:
    """Where the tokenizer of a file of weights lies, unless that is bytes."""
    return Path(path).with_suffix(".tokenizer.json")


def _names(where: Any, config: ModelConfig) -> Iterator[tuple[str, int | None]]:
    """The names of a parameter's layers with their places in it; if not stacked, its own name and None."""
    parts = [str(key.key) for key in where]
    if parts[0] != "groups":
        yield ".".join(parts), None
        return
    _, group_index, _, block, *rest = parts  # groups.<g>.blocks.<b>...
    group = layer_groups(config)[int(group_index)]
    for repeat in range(group.repeats):
        layer = group.start + repeat * len(group.unit) + int(block)
        yield ".".join(("layers", str(layer), *rest)), repeat


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file or a directory that takes the place of `path` in the end, if nothing fails.

    In a directory of its own, so that nothing else has the name and the mode is a new file's.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        new = Path(scratch) / path.name
        yield new
        os.replace(new, path)
