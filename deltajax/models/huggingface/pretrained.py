"""Models from and to checkpoints in Hugging Face's form."""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltajax.models.abstract import abstract_model
from deltajax.models.config import ModelConfig
from deltajax.models.huggingface.configs import from_hf, to_hf
from deltajax.models.huggingface.files import Checkpoint, Pending, opened, write
from deltajax.models.huggingface.names import Entry, entries, ignored
from deltajax.models.language_model import LanguageModel
from deltajax.models.weights import replacing

_NAMED = 10  # tensors that one message names
CONFIG = "config.json"
Place = Callable[[tuple[str | None, ...], tuple[int, ...]], jax.sharding.Sharding]


def load_pretrained(path: str | Path, *, place: Place | None = None, **changes: Any) -> LanguageModel:
    """The model of a directory with `config.json` and safetensors, in Hugging Face's form.

    All names and shapes are compared before the first tensor is read. Then each device's part of each
    parameter is read by itself: host memory holds one such part, and one tensor of the files.

    Args:
      path: the directory.
      place: where a parameter lies, from its logical axis names and its shape, such as
        `functools.partial(rules.sharding, mesh)` of the trainer's rules; None for where JAX puts new arrays:
        the default device, or all devices under `jax.set_mesh`.
      **changes: of the configuration, such as `dtype`, `param_dtype` (both what the checkpoint says by
        default) or `stack_layers`.

    Raises:
      FileNotFoundError: no such directory, or files missing in it.
      ValueError: an architecture or a value in `config.json` that is not supported, a damaged file, or
        tensors that are missing, left over or of another shape; the message names them.
    """
    path = Path(path)
    fields = read_fields(path)
    try:
        config = from_hf(fields, **changes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    model_type = fields["model_type"]
    graph, state = nnx.split(abstract_model(config))
    parameters = {_dotted(where): variable for where, variable in nnx.to_flat_state(state)}
    shapes = {name: tuple(variable.shape) for name, variable in parameters.items()}
    loaded = {}
    with opened(path) as file:
        sources = _sources(file, model_type, config, shapes)
        for where, variable in nnx.to_flat_state(state):
            name = _dotted(where)
            axes = variable.get_metadata().get("out_sharding") or (None,) * len(variable.shape)
            sharding = jnp.zeros(()).sharding if place is None else place(tuple(axes), shapes[name])
            read = functools.partial(_read, file, sources[name], shapes[name], variable.dtype)
            loaded[where] = jax.make_array_from_callback(shapes[name], sharding, read).block_until_ready()
    nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(loaded))
    return nnx.merge(graph, state)


def save_pretrained(
    model: LanguageModel,
    path: str | Path,
    *,
    eos_token_id: int | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a model as `config.json` and safetensors in Hugging Face's form, whole or not at all.

    The same weights give the same bytes. Host memory holds the tensors of one file.

    Args:
      model: of an architecture that has that form: flash-linear-attention's `delta_net`, `gated_deltanet` and
        `kda` (with their attention hybrids), `kimi_linear`, `qwen3_next`,
        `qwen3_5_text`, `olmo_hybrid`.
      path: the directory, which must not exist, or be empty (another one takes its place).
      eos_token_id: of the tokenizer, for `config.json`: the id that ends a document.
      max_shard_bytes: of one file, unless a tensor alone is larger.

    Raises:
      FileExistsError: there is something.
      ValueError: another architecture, the message says what does not fit; or the working directory.
    """
    given, path = path, Path(path).resolve()
    fields = to_hf(model.config) | dict(eos_token_id=eos_token_id)
    if path == Path.cwd():
        raise ValueError(f"path={str(given)!r}: expected another directory than the working one")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path}: expected no such path, or an empty directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new:
        new.mkdir()
        write(new, list(_pending(model, fields["model_type"])), max_shard_bytes)
        (new / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")


def read_fields(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's `config.json`.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not a JSON object.
    """
    if not (path / CONFIG).is_file():
        what = f"no {CONFIG} in it" if path.is_dir() else "no such directory"
        raise FileNotFoundError(f"{path}: {what}")
    try:
        fields = json.loads((path / CONFIG).read_text())
    except ValueError as error:
        raise ValueError(f"{path / CONFIG}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path / CONFIG}: expected a JSON object, got {type(fields).__name__}")
    return fields


def eos_token(path: Path) -> str | None:
    """The token that ends a document, where `tokenizer_config.json` names it.

    Raises:
      ValueError: the file is not JSON.
    """
    if not (path / "tokenizer_config.json").is_file():
        return None
    fields = json.loads((path / "tokenizer_config.json").read_text())
    token = fields.get("eos_token") if isinstance(fields, dict) else None
    return token.get("content") if isinstance(token, dict) else token


class _Source(NamedTuple):
    """Where one layer of one of our parameters comes from: tensors (one per expert) and its part of them."""

    entry: Entry
    part: int
    parts: tuple[tuple[int, ...], ...]  # shapes of one layer's, of one expert's
    names: tuple[str, ...]


def _dotted(where: tuple[Any, ...]) -> str:
    return ".".join(map(str, where))


def _experts(entry: Entry, shapes: dict[str, tuple[int, ...]]) -> list[int | None]:
    if not entry.rule.per_expert:
        return [None]
    return list(range(shapes[entry.ours[0]][int(entry.repeat is not None)]))


def _sources(
    file: Checkpoint, model_type: str, config: ModelConfig, shapes: dict[str, tuple[int, ...]]
) -> dict[str, list[_Source]]:
    """The sources of every parameter, layer by layer; all that does not fit in one error."""
    sources: dict[str, list[_Source]] = {name: [] for name in shapes}
    wrong, used = [], set()
    for entry in entries(model_type, config):
        parts, names = entry.parts([shapes[name] for name in entry.ours]), []
        for expert in _experts(entry, shapes):
            choices = entry.names(expert)
            name = next((n for n in choices if n in file.names), None)
            if name is None:
                wrong.append(f"no tensor {' or '.join(choices)}")
                continue
            used.add(name)
            names.append(name)
            if not entry.rule.accepts(shape := file.shape(name), parts):
                wrong.append(f"{name} has shape {shape}, expected {entry.rule.shape(parts)}")
        for part, ours in enumerate(entry.ours):
            sources[ours].append(_Source(entry, part, parts, tuple(names)))
    left = [n for n in file.names - used if not ignored(model_type, config, n)]
    wrong += [f"{name} belongs to no parameter" for name in sorted(left)]
    if wrong:
        more = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise ValueError(f"{file.path}: {'; '.join(wrong[:_NAMED])}{more}")
    return sources


def _read(
    file: Checkpoint, sources: list[_Source], shape: tuple[int, ...], dtype: Any, index: tuple[slice, ...]
) -> np.ndarray:
    """One device's part of a parameter."""
    ranges = [range(n)[own] for n, own in zip(shape, index, strict=True)]
    out = np.empty([len(r) for r in ranges], dtype)
    entry = sources[0].entry
    stacked, experts = entry.repeat is not None, entry.rule.per_expert
    inner = index[stacked + experts :]
    for i, layer in enumerate(ranges[0] if stacked else (0,)):
        source = sources[layer]
        chosen = ranges[int(stacked)] if experts else (0,)
        for j, expert in enumerate(chosen):
            tensor = file.read(source.names[expert])
            own = entry.rule.take(tensor, source.part, source.parts)[inner]
            out[(i,) * stacked + (j,) * experts] = own
    return out


def _pending(model: LanguageModel, model_type: str) -> Iterator[Pending]:
    params = {_dotted(where): variable for where, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    shapes = {name: tuple(variable.shape) for name, variable in params.items()}

    @functools.lru_cache(maxsize=4)  # as many as share a tensor
    def layer(name: str, repeat: int | None) -> np.ndarray:
        value = params[name][...]
        return np.asarray(value if repeat is None else value[repeat])

    def make(entry: Entry, expert: int | None) -> np.ndarray:
        parts = [layer(name, entry.repeat) for name in entry.ours]
        return entry.rule.join(parts if expert is None else [part[expert] for part in parts])

    for entry in entries(model_type, model.config):
        parts = entry.parts([shapes[name] for name in entry.ours])
        size = sum(int(np.prod(part)) for part in parts) * params[entry.ours[0]].dtype.itemsize
        for expert in _experts(entry, shapes):
            yield Pending(entry.names(expert)[0], size, functools.partial(make, entry, expert))
