"""What the experiments' commands share: options, errors, the exit status."""

import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from train.__main__ import with_packages


def run(module: str, settings: Callable[[], tuple[Any, Any]], args: Sequence[str] | None) -> int:
    """Parses options, runs the sweep, and returns the exit status; wrong options give 2.

    Args:
        module: the command is `python -m` this.
        settings: makes the small and the full setting's `SweepOptions`.
        args: None for the command line's.
    """

    def command() -> int:
        # Here, so that a missing package is told by name.
        from train.config import ConfigError
        from train.experiments.options import parse
        from train.experiments.sweep import run_sweep, tell

        given = list(sys.argv[1:] if args is None else args)
        prog = f"python -m {module}"
        small, full = settings()
        options = parse(small, full, prog, given)
        try:
            run_sweep(options, tell, shlex.join([*prog.split(), *given]))
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    return with_packages(command)
