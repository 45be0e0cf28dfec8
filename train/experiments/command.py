"""What the experiments' commands share: options, errors, the exit status."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from train.__main__ import with_packages


def run(
    module: str,
    settings: Callable[[], tuple[Any, Any]],
    perform: Callable[[Any, str], object],
    args: Sequence[str] | None,
) -> int:
    """Parses options, runs an experiment, and returns the exit status; wrong options or data give 2.

    Args:
        module: the command is `python -m` this.
        settings: makes the small and the full setting's options.
        perform: takes the options, and what was typed, for the record.
        args: None for the command line's.
    """

    def command() -> int:
        # Here, so that a missing package is told by name.
        from train.config import ConfigError
        from train.documents import DataError
        from train.experiments.options import parse

        given = list(sys.argv[1:] if args is None else args)
        prog = f"python -m {module}"
        small, full = settings()
        options = parse(small, full, prog, given)
        try:
            perform(options, shlex.join([*prog.split(), *given]))
        except (ConfigError, DataError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    return with_packages(command)


def sweep(module: str, settings: Callable[[], tuple[Any, Any]], args: Sequence[str] | None) -> int:
    """`run` of a sweep over synthetic tasks; the settings are `SweepOptions`."""

    def perform(options: Any, command: str) -> None:
        from train.experiments.sweep import run_sweep, tell

        run_sweep(options, tell, command)

    return run(module, settings, perform, args)


def on_one_gpu(small: Any, **changes: Any) -> Any:
    """The full setting of a sweep: the small one with these changes and what all full settings have."""
    usual = dict(setting="full", eval_every=250, batch_tokens=16_384, dtype="bfloat16", compile_ahead=3)
    return dataclasses.replace(small, **(usual | changes))


def simulate(
    module: str,
    options_of: type[Any],
    perform: Callable[[Any, Callable[[str], object]], dict[str, Any]],
    args: Sequence[str] | None,
) -> int:
    """Parses a simulation's options, runs it, writes the results, and returns the exit status.

    Args:
        module: the command is `python -m` this.
        options_of: their dataclass; `out` is the file of the results.
        perform: takes the options and a function to print with, and returns the results.
        args: None for the command line's.
    """
    import tyro

    options = tyro.cli(options_of, prog=f"python -m {module}", args=args)
    results = perform(options, print)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1, default=str) + "\n")
    print(f"results: {options.out}")
    return 0
