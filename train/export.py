"""`python -m train.export RUN_DIR --out FILE`: a checkpoint's weights as safetensors."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from train.__main__ import with_packages


def main(args: Sequence[str] | None = None) -> int:
    """Parses options, exports, and returns the exit status; wrong options give 2, damaged checkpoints 1."""
    return with_packages(lambda: _main(args))


def _main(args: Sequence[str] | None) -> int:
    # Here, so that `main` can say which packages to install.
    import jax
    import tyro

    from deltajax.models.weights import config_path, save_weights
    from train.checkpoint import CheckpointError
    from train.config import ConfigError
    from train.saved import open_saved

    @dataclass(frozen=True)
    class Options:
        """Write a checkpoint's weights as safetensors, the model's configuration as JSON beside them."""

        run_dir: Annotated[Path, tyro.conf.Positional]
        """the run, as given to python -m train --run-dir"""
        out: Path
        """the safetensors file to write; its configuration goes to the same name with .json"""
        step: int | None = None
        """the checkpoint's step; the newest by default"""

    options = tyro.cli(Options, prog="python -m train.export", args=args)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        if options.out.suffix != ".safetensors" or not options.out.parent.is_dir():
            raise ConfigError(
                f"argument --out: must be FILE.safetensors in a directory that exists, got {options.out}"
            )
        saved = open_saved(options.run_dir, options.step)
        params = saved.params()
        save_weights(options.out, params, saved.model, step=str(saved.step))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    numbers = sum(x.size for x in jax.tree.leaves(params))
    print(f"{options.out}: {numbers:,} parameters of step {saved.step}; {config_path(options.out)}")
    print(f'to load: deltajax.models.load_weights("{options.out}")')
    return 0


if __name__ == "__main__":
    sys.exit(main())
