"""`python -m train.prepare`: see `train.preparation` for the options and what it makes."""

import sys
from collections.abc import Sequence

from train.__main__ import with_packages


def main(args: Sequence[str] | None = None) -> int:
    """Parses options, prepares, and returns the exit status; wrong options or data give 2."""
    return with_packages(lambda: _main(args))


def _main(args: Sequence[str] | None) -> int:
    # Here, so that `main` can say which packages to install.
    import tyro

    from train.config import ConfigError
    from train.documents import DataError
    from train.preparation import PrepareConfig, prepare
    from train.report import ByteProgress

    config = tyro.cli(PrepareConfig, prog="python -m train.prepare", args=args)
    progress, skipped = ByteProgress(), list[str]()
    try:
        metadata = prepare(config, progress.start, progress.advance, skipped.append)
    except (ConfigError, DataError, FileNotFoundError) as error:
        progress.close()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        progress.close()
        print(f"error: interrupted; {config.out} was not made", file=sys.stderr)
        return 130
    progress.close()
    for text in skipped:
        print(text)
    for name, split in (("train", metadata.train), ("held out", metadata.held_out)):
        print(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens in {len(split.shards)} files")
    print(f"to train: python -m train --data.files {config.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
