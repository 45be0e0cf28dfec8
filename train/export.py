"""`python -m train.export RUN_DIR --out FILE`: a checkpoint's weights as safetensors, ready to generate."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from train.__main__ import with_packages

if TYPE_CHECKING:
    from train.saved import Saved


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
        """Write a checkpoint's weights as safetensors, configuration and tokenizer as JSON beside them."""

        run_dir: Annotated[Path, tyro.conf.Positional]
        """the run, as given to python -m train --run-dir"""
        out: Path
        """the safetensors file to write; beside it go the configuration, as .json, and a tokenizer that is
        not bytes, as .tokenizer.json"""
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
        about = _tokenizer(saved, options.out)
        save_weights(options.out, params, saved.model, step=str(saved.step), **about)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    numbers = sum(x.size for x in jax.tree.leaves(params))
    print(f"{options.out}: {numbers:,} parameters of step {saved.step}; {config_path(options.out)}")
    print(f'to load: deltajax.models.load_weights("{options.out}")')
    print(f'to generate: python -m deltajax.generate --model {options.out} --prompt "..."')
    return 0


def _tokenizer(saved: "Saved", out: Path) -> dict[str, str]:
    """Writes the run's tokenizer and returns what the weights' header says of it; without it, nothing."""
    from deltajax.models.weights import tokenizer_path
    from deltajax.tokenizer import FileTokenizer
    from train.config import ConfigError
    from train.corpus import DataError
    from train.mixture import tokenizer_of

    try:
        own = saved.config["corpus"]["tokenizer"]
        tokenizer = tokenizer_of(saved.options.data, own)
        if tokenizer.fingerprint != own:
            raise ConfigError("it is no more the one that the run was trained with")
    except (ConfigError, DataError) as error:
        print(f"warning: exported without the tokenizer: {error}", file=sys.stderr)
        tokenizer_path(out).unlink(missing_ok=True)
        return {}
    about = {"tokenizer": tokenizer.fingerprint}
    if isinstance(tokenizer, FileTokenizer):
        tokenizer_path(out).write_bytes(tokenizer.json)
        if tokenizer.eos_token is not None:
            about["eos_token"] = tokenizer.eos_token
    else:
        tokenizer_path(out).unlink(missing_ok=True)
    return about


if __name__ == "__main__":
    sys.exit(main())
