"""`python -m train.preference BASE_RUN --data.files ... --run-dir ...`: see `train.preference.options`."""

import logging
import sys

from train.__main__ import with_packages


def main(args: list[str] | None = None) -> int:
    """Parses options, tunes, and returns the exit status; wrong options or data give 2."""
    return with_packages(lambda: _main(args))


def _main(args: list[str] | None) -> int:
    # Here, so that `main` can say which packages to install.
    from train.preference.options import parse
    from train.preference.run import tune
    from train.processes import one_of_several

    options = parse(args)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file at WARNING
    return one_of_several(lambda processes: tune(options, processes))


if __name__ == "__main__":
    sys.exit(main())
