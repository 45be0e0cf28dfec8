"""`python -m train`: see `train.config` for the options."""

import logging
import sys

from train.checkpoint import CheckpointError
from train.config import ConfigError, parse
from train.corpus import DataError
from train.loop import train


def main(args: list[str] | None = None) -> int:
    """Parses options, trains, and returns the exit status; wrong options or data give 2."""
    config = parse(args)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file at WARNING
    try:
        return train(config)
    except (ConfigError, DataError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
