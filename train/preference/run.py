"""A tuning run: the trainer's own (`train.loop.Run`) with other batches, objective and first state."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.checkpoint import CheckpointError, digest
from train.config import ConfigError, TrainConfig
from train.config_checks import check
from train.data import Batch
from train.documents import BadData
from train.guard import check_directory
from train.loop import Run, execute
from train.mesh import ShardingRules, data_group, global_batch, mesh_of
from train.mixture import Data, Mixture, tokenizer_of
from train.model_state import model_state
from train.objective import Objective
from train.preference.data import Examples, all_rows, examples, read_pairs, train_rows
from train.preference.loss import dpo, fine_tuning
from train.preference.options import PreferenceOptions
from train.preference.reference import (
    cached_reference,
    fingerprint,
    make_log_probs_step,
    reference_log_probs,
    stored_key,
)
from train.processes import Processes
from train.report import Report
from train.saved import Saved, open_saved, saved_steps
from train.step import Params, TrainState

REFERENCE = "reference.npz"  # in the run's directory


def tune(options: PreferenceOptions, processes: Processes) -> int:
    """Runs (or resumes) tuning.

    Returns:
        The exit status, as `train.loop.train`.

    Raises:
        ConfigError: options that do not work together, with the tuned run or with the run directory.
        DataError: pairs that cannot be used.
        CheckpointError: checkpoints that cannot be read.
    """
    options.check()
    processes.join(options.mesh)
    directory = Path(options.run_dir)
    check_directory(directory)
    saved = opened_base(options, directory)
    config = options.run_config(saved.options)
    check(config)
    if directory.resolve() == Path(options.base).resolve():
        raise ConfigError(f"argument --run-dir: {directory} is the run that is tuned; choose another")
    report = Report(enabled=processes.index == 0, every=config.log.every)
    return execute(PreferenceRun.of(options, saved, config, directory, report, processes))


def opened_base(options: PreferenceOptions, directory: Path) -> Saved:
    """The checkpoint that is tuned: the one that the run in `directory` began with, if it has checkpoints.

    Raises:
        ConfigError: there is none, or another is asked for than the run began with.
        CheckpointError: it cannot be read.
    """
    begun = _begun_with(directory)
    if begun is None:
        return open_saved(options.base, options.step)
    if options.step not in (None, begun):
        raise ConfigError(
            f"argument --step: {directory} tunes step {begun}, got {options.step}; choose another --run-dir"
        )
    try:
        saved = open_saved(options.base, begun)
    except ConfigError as error:
        raise ConfigError(f"{error}, with which {directory} began; choose another --run-dir") from error
    key, own = stored_key(directory / REFERENCE), saved.config.get("params_digest")
    if key is not None and own is not None and key.partition("-")[0] != str(own):
        raise ConfigError(
            f"argument --run-dir: {directory} tunes other parameters than those of step {begun} of "
            f"{options.base}; choose another"
        )
    return saved


def _begun_with(directory: Path) -> int | None:
    """The tuned run's step, as the newest checkpoint that can be read tells it."""
    for step in reversed(saved_steps(directory)):
        try:
            return open_saved(directory, step).config.get("preference", {}).get("base_step")
        except CheckpointError:
            continue
    return None


@dataclass
class PreferenceRun(Run):
    """The parts of a tuning run, and where it stands."""

    options: PreferenceOptions = field(kw_only=True)
    saved: Saved = field(kw_only=True)
    train_pairs: Examples = field(kw_only=True)
    held_out_pairs: Examples = field(kw_only=True)

    @classmethod
    def of(
        cls,
        options: PreferenceOptions,
        saved: Saved,
        config: TrainConfig,
        directory: Path,
        report: Report,
        processes: Processes,
    ) -> "PreferenceRun":
        """Reads the pairs and traces the model; makes no arrays and writes nothing."""
        own = saved.config["corpus"]["tokenizer"]
        tokenizer = tokenizer_of(saved.options.data, own)
        if tokenizer.fingerprint != own:
            raise ConfigError(f"the tokenizer of {options.base} is no more the one it was trained with")
        bad = BadData(options.data.on_error)
        pairs = read_pairs(options.data.files, tokenizer, bad)
        if len(pairs) < 2:
            raise ConfigError(
                "argument --data.files: one pair only; expected some to train on and to hold out"
            )
        both = options.method == "dpo"
        everything = examples(pairs, tokenizer.eos_id, both)
        everything.per_row(config.data.seq_len)
        order = np.random.default_rng(0).permutation(len(pairs))
        count = min(len(pairs) - 1, max(1, round(len(pairs) * options.data.held_out_fraction)))
        data = Data(tokenizer, Mixture(()), Mixture(()), fingerprint(everything), bad)
        try:
            mesh = mesh_of(config.mesh)
            data_group(mesh, ShardingRules())
            model = model_state(saved.model, mesh, ShardingRules())
        except ValueError as error:
            raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error
        run = cls(
            config,
            directory,
            report,
            processes,
            data,
            model,
            options=options,
            saved=saved,
            train_pairs=Examples([everything.rows[i] for i in order[count:]]),
            held_out_pairs=Examples([everything.rows[i] for i in order[:count]]),
        )
        run.check()
        return run

    @cached_property
    def base_params(self) -> Params:
        """The tuned run's parameters; dropped once training begins."""
        return self.saved.params(self.model.abstract_params())

    @cached_property
    def objective(self) -> Objective:
        """DPO or fine-tuning."""
        if self.options.method == "sft":
            return fine_tuning
        most = max(x.per_row(self.config.data.seq_len) for x in (self.train_pairs, self.held_out_pairs))
        return dpo(self.options.beta, most, self.options.length_normalized)

    @property
    def abstract_batch(self) -> dict[str, Any]:
        """Shapes of a micro-batch."""
        batch = super().abstract_batch
        batch["answers"] = batch["tokens"]
        if self.options.method == "dpo":
            batch["reference"] = jax.ShapeDtypeStruct(batch["tokens"].shape, jnp.float32)
        return batch

    def batches(self) -> Any:
        """Packed pairs; for DPO, with the reference's log-probabilities."""
        if self.options.method == "dpo":
            self._add_reference()
        return train_rows(self.train_pairs, **self.reading)

    def _add_reference(self) -> None:
        everything = Examples([*self.train_pairs.rows, *self.held_out_pairs.rows])
        base = self.saved.config.get("params_digest") or digest(self.base_params)
        computed = False

        def compute() -> np.ndarray:
            sizes = dict(seq_len=self.config.data.seq_len, batch_size=self.config.data.batch_size)
            step = make_log_probs_step(self.model, self.rules)
            with jax.set_mesh(self.model.mesh):  # as the training steps
                return reference_log_probs(
                    everything, self.base_params, step, self.model.mesh, self.rules, **sizes
                )

        path, key = self.directory / REFERENCE, f"{base}-{fingerprint(everything)}"
        everything, computed = cached_reference(path, key, everything, compute, self.processes.index == 0)
        self.report.say(f"reference log-probabilities: {'computed, now in' if computed else 'from'} {path}")
        count = len(self.train_pairs)
        self.train_pairs = Examples(everything.rows[:count])
        self.held_out_pairs = Examples(everything.rows[count:])

    def initial_state(self) -> TrainState:
        """Step 0: the tuned run's parameters, and an optimizer that has seen nothing."""
        state = self.model.train_state(self.optimizer, self.base_params)
        del self.base_params  # the first step takes them over
        return state

    def introduce(self) -> None:
        """Says what is tuned on what."""
        tokens = int(self.train_pairs.lengths.sum())
        self.report.say(
            f"{self.options.method} of {self.options.base} at step {self.saved.step} "
            f"({self.model.num_parameters:,} parameters) on {dict(self.model.mesh.shape)} of "
            f"{self.model.mesh.devices.flat[0].device_kind}; {len(self.train_pairs):,} pairs, "
            f"{tokens:,} tokens"
        )
        if self.data.bad.count:
            self.report.say(self.data.bad.summary())
        # With the step, as the tuned run may go on.
        self.report.say(f"to reproduce: {replace(self.options, step=self.saved.step).command()}")

    @cached_property
    def _held_out(self) -> list[Batch]:
        sizes = dict(seq_len=self.config.data.seq_len, batch_size=self.config.data.batch_size)
        return all_rows(self.held_out_pairs, **sizes)[: self.config.eval.batches]

    def measure(self, params: Params) -> dict[str, float]:
        """The objective's loss and what it reports, on held-out pairs."""
        group, groups = self.data_group
        rows = self.config.data.batch_size // groups
        own = slice(group * rows, (group + 1) * rows)
        total: dict[str, float] = {}
        for batch in self._held_out:
            local = {name: x[own] for name, x in batch.items()}
            loss, sums = self._sums_step(params, global_batch(local, self.model.mesh, self.rules))
            for name, x in {"loss": loss, **sums}.items():
                total[name] = total.get(name, 0.0) + float(x)
        count = total.pop("count")
        del total["tokens"]
        return {f"eval_{name}": x / count for name, x in total.items()}

    def conclude(self, evaluated: dict[str, float]) -> None:
        """Says what came of it."""
        found = ", ".join(f"{name.removeprefix('eval_')} {x:.4f}" for name, x in evaluated.items())
        self.report.say(f"on {len(self.held_out_pairs):,} held-out pairs: {found}")

    @cached_property
    def _saved_config(self) -> dict[str, Any]:
        about = {"base": str(self.options.base), "base_step": self.saved.step}
        return super()._saved_config | {"preference": about | self.options.saved()}
