"""`python -m train`: see `train.config` for the options."""

import logging
import sys
from collections.abc import Callable

from deltajax import command

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


def with_packages(run: Callable[[], int]) -> int:
    """Runs a command that needs the extra's packages; says which to install where one is missing."""
    return command.with_packages(run, "deltajax[train]", _TRAIN_PACKAGES)


def _main(args: list[str] | None) -> int:
    # Here, so that `main` can say which packages to install.
    from train.config import parse
    from train.loop import train
    from train.processes import one_of_several

    config = parse(args)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file at WARNING
    return one_of_several(lambda processes: train(config, processes))


if __name__ == "__main__":
    sys.exit(main())
