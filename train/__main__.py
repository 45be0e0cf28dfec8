"""`python -m train`: see `train.config` for the options."""

import logging
import sys
from collections.abc import Callable

# What the extra `deltajax[train]` brings beyond the layers.
_TRAIN_PACKAGES = {
    "array_record",
    "grain",
    "optax",
    "orbax",
    "pyarrow",
    "rich",
    "tensorboardX",
    "tokenizers",
    "tyro",
}


def main(args: list[str] | None = None) -> int:
    """Parses options, trains, and returns the exit status; wrong options or data give 2."""
    return with_packages(lambda: _main(args))


def with_packages(command: Callable[[], int]) -> int:
    """Runs a command that needs the extra's packages; says which to install where one is missing."""
    try:
        return command()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _TRAIN_PACKAGES:
            raise
        print(f"error: no package {error.name}: pip install 'deltajax[train]'", file=sys.stderr)
        return 2


def _main(args: list[str] | None) -> int:
    # Here, so that `main` can say which packages to install.
    from train.checkpoint import CheckpointError
    from train.config import ConfigError, parse
    from train.documents import DataError
    from train.loop import train
    from train.processes import Processes

    config = parse(args)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file at WARNING
    processes = Processes()
    try:
        status = train(config, processes)
    except (ConfigError, DataError, FileNotFoundError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1 if isinstance(error, CheckpointError) else 2
        if processes.count > 1:
            processes.leave(status)
    except Exception as error:
        if processes.count > 1:
            processes.fail(error)
        raise
    processes.dismiss()
    return status


if __name__ == "__main__":
    sys.exit(main())
