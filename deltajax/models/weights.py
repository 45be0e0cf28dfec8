"""A model's weights as a safetensors file with its configuration beside it, and back.

Every layer's parameters have names of their own, `layers.<n>.mixer.q_proj.kernel`, however the model stacks
layers for its scans.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from deltajax.models.config import ModelConfig
from deltajax.models.groups import group_layers
from deltajax.models.language_model import LanguageModel

_FORMAT = "deltajax"  # in the file's header, to tell others by


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
    _replace(config_path(path), lambda scratch: scratch.write_text(config.to_json() + "\n"))
    _replace(path, lambda scratch: save_file(tensors, scratch, metadata={"format": _FORMAT, **about}))


def load_weights(path: str | Path, **changes: Any) -> LanguageModel:
    """The model that `save_weights` wrote, one parameter at a time.

    Args:
        path: the safetensors file, its configuration beside it.
        **changes: of the configuration, such as `dtype` or `implementation`.

    Raises:
        ValueError: the file is none of these, or a parameter is missing, left over, or of another shape; the
            message names it.
    """
    path = Path(path)
    config = ModelConfig.from_json(config_path(path).read_text()).replace(**changes)
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    abstract, loaded = nnx.to_pure_dict(state), {}
    try:
        with safe_open(path, "np") as file:
            if (file.metadata() or {}).get("format") != _FORMAT:
                raise ValueError(f"{path}: not written by save_weights")
            left = set(file.keys())
            for where, x in jax.tree.leaves_with_path(abstract):
                stacked = np.empty(x.shape, x.dtype)
                for name, index in _names(where, config):
                    if name not in left:
                        raise ValueError(f"{path}: no parameter {name}")
                    value, part = file.get_tensor(name), stacked if index is None else stacked[index, ...]
                    if value.shape != part.shape:
                        raise ValueError(f"{path}: {name} has shape {value.shape}, expected {part.shape}")
                    part[...] = value
                    left.remove(name)
                loaded[tuple(key.key for key in where)] = jnp.asarray(stacked)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    if left:
        raise ValueError(f"{path}: {sorted(left)[0]} is no parameter of the configuration beside it")
    nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(loaded))
    return nnx.merge(graph, state)


def config_path(path: str | Path) -> Path:
    """Where the configuration of a file of weights lies."""
    return Path(path).with_suffix(".json")


def _names(where: Any, config: ModelConfig) -> Iterator[tuple[str, int | None]]:
    """The names of a parameter's layers with their places in it; if not stacked, its own name and None."""
    parts = [str(key.key) for key in where]
    if parts[0] != "groups":
        yield ".".join(parts), None
        return
    _, group_index, _, block, *rest = parts  # groups.<g>.blocks.<b>...
    group = group_layers(config.blocks)[int(group_index)]
    for repeat in range(group.repeats):
        layer = group.start + repeat * len(group.unit) + int(block)
        yield ".".join(("layers", str(layer), *rest)), repeat


def _replace(path: Path, write: Any) -> None:
    scratch = path.with_name(path.name + ".tmp")
    write(scratch)
    os.replace(scratch, path)
