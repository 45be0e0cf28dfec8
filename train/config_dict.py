"""Configurations as nested dicts, ready for JSON, and back."""

import dataclasses
import types
import typing
from typing import Any

from deltajax.models import ModelConfig
from train.config import ConfigError


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration dataclass as JSON-ready nested dicts."""
    return _ready(dataclasses.asdict(config))


def _ready(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _ready(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def model_defaults() -> dict[str, Any]:
    """The fields of a model's configuration that have a default, as `to_dict` gives them."""
    fields = dataclasses.fields(ModelConfig)
    return _ready({x.name: x.default for x in fields if x.default is not dataclasses.MISSING})


def from_dict[C](cls: type[C], values: dict[str, Any]) -> C:
    """Inverts `to_dict`.

    Raises:
        ConfigError: a field that `cls` does not have.
    """
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(values) - set(hints)):
        raise ConfigError(f"unknown fields of {cls.__name__}: {', '.join(unknown)}")
    fields = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            value = from_dict(hint, value)
        elif isinstance(value, list) and not isinstance(hint, types.UnionType):
            value = tuple(value)
        fields[name] = value
    return cls(**fields)


def differing_fields(
    old: dict[str, Any], new: dict[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Dotted names of the fields whose values differ -> (old, new); a field missing on a side is None."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted(set(old) | set(new)):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differing_fields(a, b, f"{prefix}{name}.")
        elif a != b:
            found[f"{prefix}{name}"] = (a, b)
    return found
