"""What the commands share: a hint where one of an extra's packages is missing."""

import sys
from collections.abc import Callable, Collection


def with_packages(command: Callable[[], int], extra: str, packages: Collection[str]) -> int:
    """Runs a command that needs an extra's packages.

    Args:
      command: returns an exit status.
      extra: "deltajax[name]", to install where one of the packages is missing; the status is 2 then.
      packages: the names they are imported by.
    """
    try:
        return command()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in packages:
            raise
        print(f"error: no package {error.name}: pip install '{extra}'", file=sys.stderr)
        return 2
