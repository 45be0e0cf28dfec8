"""`python -m deltajax.models.convert SRC DST`: a Hugging Face directory to our file of weights, or back."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from deltajax.command import with_packages


def main(args: Sequence[str] | None = None) -> int:
    """Parses options, converts, and returns the exit status; wrong options or files give 2."""
    return with_packages(lambda: _main(args), "deltajax[generate]", ("tokenizers", "tyro"))


def _main(args: Sequence[str] | None) -> int:
    # Here, so that `main` can say which packages to install.
    import tyro

    @dataclass(frozen=True)
    class Options:
        """Convert a model between Hugging Face's form (a directory) and ours (FILE.safetensors)."""

        src: Annotated[Path, tyro.conf.Positional]
        """a directory with config.json and safetensors, or a FILE.safetensors that python -m train.export or
        this command wrote"""
        dst: Annotated[Path, tyro.conf.Positional]
        """a new FILE.safetensors for a directory; a new directory for a file"""

    options = tyro.cli(Options, prog="python -m deltajax.models.convert", args=args)
    try:
        if options.src.is_dir():
            _from_hf(options.src, options.dst)
        else:
            _to_hf(options.src, options.dst)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _from_hf(src: Path, dst: Path) -> None:
    from flax import nnx

    from deltajax.models import save_weights
    from deltajax.models.huggingface import load_pretrained
    from deltajax.models.weights import config_path, tokenizer_path

    if dst.suffix != ".safetensors" or not dst.parent.is_dir():
        raise ValueError(f"argument DST: must be FILE.safetensors in a directory that exists, got {dst}")
    for file in (dst, config_path(dst), tokenizer_path(dst)):
        if file.exists():
            raise FileExistsError(f"argument DST: {file} is there; expected the name of a new file")
    about = _tokenizer(src)
    model = load_pretrained(src)
    save_weights(dst, nnx.to_pure_dict(nnx.state(model, nnx.Param)), model.config, **about)
    if about:
        shutil.copyfile(src / "tokenizer.json", tokenizer_path(dst))
    print(f"{dst}: {', '.join(sorted(set(model.config.layers)))} layers; {config_path(dst)}")
    given = "" if about else " --tokenizer FILE"
    print(f'to generate: python -m deltajax.generate --model {dst}{given} --prompt "..."')


def _to_hf(src: Path, dst: Path) -> None:
    from deltajax.models import load_weights
    from deltajax.models.huggingface import save_pretrained
    from deltajax.models.weights import read_about, tokenizer_path
    from deltajax.tokenizer import FileTokenizer

    if dst.suffix == ".safetensors":
        raise ValueError(f"argument DST: must be a new directory, got {dst}")
    model, tokenizer, eos = load_weights(src), None, None
    if tokenizer_path(src).is_file():
        tokenizer = FileTokenizer(tokenizer_path(src), read_about(src).get("eos_token"))
        eos = tokenizer.eos_id if tokenizer.eos_id < model.config.vocab_size else None
    save_pretrained(model, dst, eos_token_id=eos)
    if tokenizer is not None:
        (dst / "tokenizer.json").write_bytes(tokenizer.json)
        if tokenizer.eos_name is not None:
            fields = {"eos_token": tokenizer.eos_name}
            (dst / "tokenizer_config.json").write_text(json.dumps(fields, indent=2) + "\n")
    print(f"{dst}: a model in Hugging Face's form")


def _tokenizer(src: Path) -> dict[str, str]:
    """What a file of weights says of its tokenizer; nothing where there is no usable one."""
    from deltajax.models.huggingface import eos_token
    from deltajax.tokenizer import FileTokenizer

    if not (src / "tokenizer.json").is_file():
        print(f"warning: converted without a tokenizer: no tokenizer.json in {src}", file=sys.stderr)
        return {}
    eos = eos_token(src)
    try:
        tokenizer = FileTokenizer(src / "tokenizer.json", eos)
    except ValueError as error:
        print(f"warning: converted without the tokenizer: {error}", file=sys.stderr)
        return {}
    return {"tokenizer": tokenizer.fingerprint} | ({} if eos is None else {"eos_token": eos})


if __name__ == "__main__":
    sys.exit(main())
