"""The command that makes a run, from its options."""

import dataclasses
import shlex
from typing import Any

from train.config import TrainConfig


def command(config: TrainConfig) -> str:
    """`python -m train` with every option that is not its default, quoted for a shell."""
    usual = TrainConfig()
    shown = (
        ["--preset", config.preset] if config.preset == usual.preset else []
    )  # always: it is what the run is
    return arguments("train", shown, config, usual)


def arguments(module: str, given: list[str], config: Any, usual: Any) -> str:
    """`python -m module given...` and every option of a dataclass that differs from the usual one."""
    return shlex.join(["python", "-m", module, *given, *_arguments(config, usual, "")])


def _arguments(config: Any, default: Any, prefix: str) -> list[str]:
    found: list[str] = []
    for field in dataclasses.fields(config):
        value, usual = getattr(config, field.name), getattr(default, field.name)
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            found += _arguments(value, usual, f"{name}.")
        elif value == usual:
            continue
        elif isinstance(usual, bool):  # a flag; one that may be None is spelt out
            found.append(f"--{name}" if value else f"--{prefix}no-{field.name.replace('_', '-')}")
        elif isinstance(value, tuple):
            found += [f"--{name}", *map(str, value)]
        else:
            found += [f"--{name}", str(value)]
    return found
