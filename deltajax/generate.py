"""`python -m deltajax.generate --model FILE --prompt TEXT`: text from a model, as it comes."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from deltajax.command import with_packages

if TYPE_CHECKING:
    from deltajax.tokenizer import Tokenizer


class CommandError(ValueError):
    """Options that are wrong or do not go together."""


def main(args: Sequence[str] | None = None) -> int:
    """Parses options, generates, and returns the exit status; wrong options or files give 2."""
    return with_packages(lambda: _main(args), "deltajax[generate]", ("tokenizers", "tyro"))


def _main(args: Sequence[str] | None) -> int:
    # Here, so that `main` can say which packages to install.
    import tyro

    @dataclass(frozen=True)
    class Options:
        """Generate text from a model, printed as it comes."""

        model: Path
        """weights that python -m train.export wrote: the safetensors file, or a directory with one; or a
        directory in Hugging Face's form (config.json, safetensors, tokenizer.json)"""
        prompt: tuple[str, ...] = ()
        """text to continue; several are continued together and printed one after another"""
        prompt_file: Path | None = None
        """a file with one more prompt; - reads standard input"""
        max_tokens: int = 256
        """new tokens for each prompt, at most"""
        max_length: int | None = None
        """tokens of a prompt and its continuation, at most, which bounds the memory of attention layers"""
        temperature: float = 0.7
        """softmax temperature; 0 takes the likeliest token"""
        top_k: int | None = None
        """sample among so many likeliest tokens only"""
        top_p: float | None = None
        """sample among the likeliest tokens of this probability together"""
        seed: int = 0
        """of the sampling"""
        prefill_chunk: int = 8192
        """prompt tokens read at once, which bounds the memory of long prompts"""
        document_start: bool = True
        """let prompts begin a document, after the token that separates documents in training"""
        tokenizer: Path | None = None
        """Hugging Face tokenizers JSON file; by default what the weights name"""
        eos_token: str | None = None
        """that tokenizer's end of a document, where its name is unusual"""

    options = tyro.cli(Options, prog="python -m deltajax.generate", args=args)
    try:
        return _generate(options, sys.stdout)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130


def _generate(options, out: TextIO) -> int:
    import jax

    from deltajax.models import load_weights, stream
    from deltajax.models.huggingface import load_pretrained

    for name, least in (("max_tokens", 1), ("max_length", 1), ("prefill_chunk", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise CommandError(f"argument --{name.replace('_', '-')}: must be {least} or more, got {value}")
    texts = _prompts(options)
    weights = _weights(options.model)
    tokenizer = _tokenizer(weights, options.tokenizer, options.eos_token)
    start = [tokenizer.eos_id] if options.document_start else []
    prompts = [[*start, *map(int, tokenizer.encode(text.encode(errors="surrogateescape")))] for text in texts]
    if not all(prompts):
        raise CommandError("argument --no-document-start: an empty prompt has no token to continue")
    load = load_pretrained if weights.is_dir() else load_weights
    model = load(weights, stack_layers=False)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CommandError(
            f"argument --tokenizer: it has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}"
        )
    steps = stream(
        model,
        prompts,
        max_new_tokens=options.max_tokens,
        max_length=options.max_length,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        key=jax.random.key(options.seed),
        stop_tokens=(tokenizer.eos_id,),
        pad_token=tokenizer.eos_id,
        prefill_chunk=options.prefill_chunk,
    )
    _print(steps, texts, prompts, tokenizer, out)
    return 0


def _print(steps, texts: list[str], prompts: list[list[int]], tokenizer: "Tokenizer", out: TextIO) -> None:
    """Writes the prompts with their continuations one after another, each as far as it is known."""
    from deltajax.tokenizer import TextStream

    streams = [TextStream(tokenizer, prompt) for prompt in prompts]
    waiting, done = list(texts), [False] * len(texts)
    current = 0

    def title() -> None:
        if len(texts) > 1:
            out.write(f"--- {current + 1} of {len(texts)} ---\n")

    def flush(end: bool) -> None:
        nonlocal current
        while current < len(texts):
            out.write(waiting[current])
            waiting[current] = ""
            if not (end or done[current]):
                break
            out.write("\n")
            current += 1
            if current < len(texts):
                title()
        out.flush()

    title()
    flush(end=False)
    for step in steps:
        for row, (token, finished) in enumerate(zip(step.tokens, step.finished, strict=True)):
            if done[row]:
                continue
            waiting[row] += streams[row].finish() if finished else streams[row].push(token)
            done[row] = bool(finished)
        flush(end=False)
    for row in range(len(texts)):
        if not done[row]:
            waiting[row] += streams[row].finish()
    flush(end=True)


def _prompts(options) -> list[str]:
    texts = list(options.prompt)
    if options.prompt_file is not None:
        name = str(options.prompt_file)
        try:
            texts.append(sys.stdin.read() if name == "-" else options.prompt_file.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"argument --prompt-file: {name}: {error}") from error
    if not texts:
        raise CommandError("argument --prompt: expected a text, or --prompt-file")
    return texts


def _weights(path: Path) -> Path:
    """The file of weights that a path means, or a directory in Hugging Face's form."""
    from deltajax.models.huggingface import CONFIG

    if not path.exists():
        raise CommandError(f"argument --model: no such file or directory: {path}")
    if path.is_dir():
        if (path / "checkpoints").is_dir():
            raise CommandError(
                f"argument --model: {path} is a training run; write its weights first:\n"
                f"  python -m train.export {path} --out {path.name}.safetensors"
            )
        if (path / CONFIG).is_file() and not (path / CONFIG).with_suffix(".safetensors").is_file():
            return path
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise CommandError(f"argument --model: expected one .safetensors file in {path}, found {names}")
        path = found[0]
    if path.suffix != ".safetensors":
        raise CommandError(f"argument --model: expected a .safetensors file, got {path}")
    return path


def _tokenizer(weights: Path, given: Path | None, eos_token: str | None) -> "Tokenizer":
    """The tokenizer of the options, or what the weights name."""
    from deltajax.models.huggingface import eos_token as eos_of
    from deltajax.models.weights import read_about, tokenizer_path
    from deltajax.tokenizer import ByteTokenizer, FileTokenizer

    hub = weights.is_dir()
    about = {} if hub else read_about(weights)
    if given is not None:
        try:
            return FileTokenizer(given, eos_token)
        except (OSError, ValueError) as error:
            raise CommandError(f"argument --tokenizer: {error}") from error
    if eos_token is not None:
        raise CommandError("argument --eos-token: goes with --tokenizer")
    if hub and (weights / "tokenizer.json").is_file():
        return FileTokenizer(weights / "tokenizer.json", eos_of(weights))
    fingerprint = about.get("tokenizer")
    if fingerprint is None:
        raise CommandError(f"argument --tokenizer: expected a file, as {weights} names no tokenizer")
    if fingerprint == ByteTokenizer.fingerprint:
        return ByteTokenizer()
    tokenizer = FileTokenizer(tokenizer_path(weights), about.get("eos_token"))
    if tokenizer.fingerprint != fingerprint:
        raise CommandError(f"{tokenizer_path(weights)}: not the tokenizer that the model was trained with")
    return tokenizer


if __name__ == "__main__":
    sys.exit(main())
