"""`python -m train.evaluate RUN_DIR`: a checkpoint's loss and perplexity on held-out text."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from train.__main__ import with_packages

if TYPE_CHECKING:
    from train.processes import Processes


def main(args: Sequence[str] | None = None) -> int:
    """Parses options, evaluates, and returns the exit status, as `python -m train` does."""
    return with_packages(lambda: _main(args))


def _main(args: Sequence[str] | None) -> int:
    # Here, so that `main` can say which packages to install.
    import tyro

    from train.config import MeshConfig
    from train.processes import one_of_several

    @dataclass(frozen=True)
    class Options:
        """Evaluate a checkpoint on held-out text, the run's own or other."""

        run_dir: Annotated[Path, tyro.conf.Positional]
        """the run, as given to python -m train --run-dir"""
        step: int | None = None
        """the checkpoint's step; the newest by default"""
        files: tuple[str, ...] = ()
        """other text: files and globs, evaluated whole, and directories made by train.prepare, of which the
        held-out part; the run's own held-out text by default"""
        batches: int | None = None
        """batches at most; all of other text by default, the run's --eval.batches of its own"""
        batch_size: int | None = None
        """rows per batch, over all devices; the run's own by default"""
        mesh: MeshConfig = field(default_factory=MeshConfig)

    options = tyro.cli(Options, prog="python -m train.evaluate", args=args)
    logging.getLogger("absl").setLevel(logging.ERROR)
    return one_of_several(lambda processes: _evaluate(options, processes))


def _evaluate(options, processes: "Processes") -> int:
    import math

    import jax

    from train.config import ConfigError
    from train.config_checks import check_mesh
    from train.evaluation import Evaluation
    from train.mesh import ShardingRules, mesh_of
    from train.mixture import load_data, load_held_out
    from train.model_state import model_state
    from train.saved import open_saved

    for name, value in (("--batches", options.batches), ("--batch-size", options.batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"argument {name}: must be positive, got {value}")
    check_mesh(options.mesh)
    processes.join(options.mesh)
    saved = open_saved(options.run_dir, options.step)
    config, rules = saved.options, ShardingRules()
    if options.files:
        own = saved.config["corpus"]["tokenizer"]
        held_out, tokenizer = load_held_out(options.files, config.data, own)
        batches = options.batches or sys.maxsize
    else:
        data = load_data(config.data)
        held_out, tokenizer = data.held_out, data.tokenizer
        batches = options.batches or config.eval.batches
    if tokenizer.fingerprint != saved.config["corpus"]["tokenizer"]:
        raise ConfigError(f"the tokenizer of {options.run_dir} is no more the one it was trained with")
    if not options.files and "preference" not in saved.config and processes.index == 0:
        then, now = saved.config["corpus"]["fingerprint"], data.fingerprint
        if then != now:  # the run may have trained on what is held out now
            print(f"note: corpus.fingerprint was {then!r} in the run and is {now!r} now", file=sys.stderr)
    if config.data.seq_len % options.mesh.context:
        raise ConfigError(
            f"argument --mesh.context: {options.mesh.context} does not divide the run's rows of "
            f"{config.data.seq_len} tokens"
        )
    batch_size = options.batch_size or config.data.batch_size
    try:
        mesh = mesh_of(options.mesh)
        model = model_state(saved.model, mesh, rules)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if batch_size % (parts := rules.parts(mesh, "batch")):
        raise ConfigError(f"argument --batch-size: {batch_size} rows do not split over {parts} devices")
    evaluation = Evaluation(
        model, rules, held_out, seq_len=config.data.seq_len, batch_size=batch_size, max_batches=batches
    )
    with jax.set_mesh(mesh):
        loss = evaluation.loss(saved.params(model.abstract_params()))
    if processes.index == 0:
        print(
            f"step {saved.step}: eval loss {evaluation.units(loss)}, perplexity {math.exp(loss):.3f} over "
            f"{evaluation.num_targets:,} tokens"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
