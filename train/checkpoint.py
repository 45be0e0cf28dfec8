"""Checkpoints: everything a run needs to go on exactly where it was, saved in the background by Orbax.

A checkpoint holds the training state, the data iterator's position (one file per process) and the
configuration as JSON. Orbax writes it under a temporary name and renames it when it is whole, so a
process may die at any moment.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from grain.checkpoint import CheckpointSave
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as managers

from train.config import ConfigError
from train.config_dict import differing_fields, model_defaults
from train.data import merge_states
from train.step import TrainState

# Fields of the model's configuration that decide how it computes, and neither its parameters nor, but for
# rounding, its function: a checkpoint may be resumed with others.
ARITHMETIC = frozenset(
    {
        "dtype",
        "remat",
        "scan_layers",
        "chunk_size",
        "implementation",
        "attention_implementation",
        "expert_implementation",
    }
)


def _leaf_digest(x: jax.Array) -> jax.Array:
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
    # The position in the flattened array, counted without flattening: reshaping an array that is split over
    # devices would gather it on each of them.
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)  # wraps: the same in any order


@jax.jit
def _digest(tree: Any) -> jax.Array:
    total = jnp.uint32(0)
    for x in jax.tree.leaves(tree):
        total = total * jnp.uint32(31) + _leaf_digest(x)
    return total


def digest(tree: Any) -> int:
    """A checksum of every bit of arrays: a damaged array file may well decode to wrong numbers.

    Args:
        tree: JAX arrays, or NumPy's, of which one at a time is copied to a device.
    """
    leaves = jax.tree.leaves(tree)
    if not any(isinstance(x, np.ndarray) for x in leaves):
        return int(_digest(tree))
    total, one = 0, jax.jit(_leaf_digest)
    for x in leaves:
        total = (total * 31 + int(one(x))) % 2**32
    return total


def _in_any_process(yes: bool) -> bool:
    if jax.process_count() == 1:
        return yes
    return bool(np.max(multihost_utils.process_allgather(np.array([yes]))))


def _drop_damaged_losses(directory: Path) -> None:
    """Orbax reads the losses of all checkpoints at once, and gives up on the first that it cannot read."""
    if jax.process_index() == 0:
        for path in directory.glob("*/metrics"):
            try:
                float(json.loads((path / "metrics").read_text())["eval_loss"])
            except (OSError, ValueError, KeyError, TypeError):
                shutil.rmtree(path)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("damaged losses dropped")


class CheckpointError(RuntimeError):
    """No checkpoint can be read; the message names the directory."""


@dataclass(frozen=True)
class Restored:
    """A checkpoint, read back: the state, and the configuration that was saved with it."""

    state: TrainState
    config: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
        directory: where they lie; made if absent, and cleared of saves that never finished.
        keep: how many of the newest to keep, besides the one of the lowest evaluation loss.
    """

    def __init__(self, directory: Path, keep: int):
        self.directory = directory.absolute()
        _drop_damaged_losses(self.directory)

        def eval_loss(metrics: dict[str, float]) -> float:
            return metrics["eval_loss"]

        newest = managers.LatestN(n=keep)
        best = managers.BestN(
            get_metric_fn=eval_loss,
            reverse=True,  # BestN keeps the end of the order: descending puts the lowest loss there
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=managers.AnyPreservationPolicy([newest, best]),
                # Without it Orbax keeps losses in memory only, and a resumed run knows none of them.
                best_fn=eval_loss,
                best_mode="min",
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
            item_names=("state", "data", "config"),
        )

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, state: TrainState, data: Any, config: dict[str, Any], eval_loss: float | None
    ) -> None:
        """Starts saving; returns once the state may be donated again.

        Args:
            step: steps taken.
            state: the state after them.
            data: the data iterator, about to hand out the next step's batch.
            config: `{"model": ..., ...}`, JSON-ready; kept beside the state.
            eval_loss: if the state was evaluated, its loss.
        """
        # The parameters' own, for those who read them alone.
        digests = {"digest": digest(state), "params_digest": digest(state.params)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=CheckpointSave(data),
                config=ocp.args.JsonSave({**config, **digests}),
            ),
            metrics=None if eval_loss is None else {"eval_loss": eval_loss},
            force=True,
        )

    def restore_newest(
        self,
        abstract: TrainState,
        data: Any,
        config: dict[str, Any],
        report: Callable[[str], None],
    ) -> Restored | None:
        """The newest checkpoint that can be read, or None if there are no checkpoints.

        Unreadable ones are reported and passed over; once an older one is read they are moved to
        `unreadable/` beside the checkpoints, so that their steps can be saved anew.

        Args:
            abstract: shapes, dtypes and shardings to restore into.
            data: the data iterator, set to the checkpoint's position.
            config: this run's, as `save` is given it. Its "model" must be the saved one's, but for how it
                computes (`ARITHMETIC`), and so must its "optimizer_state" and its corpus's "tokenizer",
                where both have one.
            report: is given one line per unreadable checkpoint.

        Raises:
            ConfigError: a checkpoint is of another model, optimizer (the message names the differing
                fields) or tokenizer, or its data cannot be shared by this number of processes.
            CheckpointError: there are checkpoints and none can be read; they are left where they are.
        """
        steps, unreadable = self.steps(), []
        for step in reversed(steps):
            try:
                restored = self._restore(step, abstract, data, config)
            except ConfigError:
                raise
            except Exception as error:  # whatever a damaged file makes a reader raise
                reason = (str(error).strip() or "no message").splitlines()[0]
                report(
                    f"checkpoint {self.directory / str(step)} cannot be read "
                    f"({type(error).__name__}: {reason}); trying the one before it"
                )
                unreadable.append(step)
                continue
            self._set_aside(unreadable)
            return restored
        if steps:
            raise CheckpointError(f"none of the checkpoints of {self.directory} can be read")
        return None

    def _restore(self, step: int, abstract: TrainState, data: Any, config: dict[str, Any]) -> Restored:
        # Not by the manager, which waits for all processes: each reads its own parts, so one may fail where
        # the others do not. Then none may take this checkpoint.
        place = epath.Path(self.directory) / str(step)
        try:
            saved = ocp.JsonCheckpointHandler().restore(place / "config", args=ocp.args.JsonRestore())
            expected = int(saved.pop("digest"))
            saved.pop("params_digest", None)
            self._check_fits(step, saved, config)
            self._restore_data(step, data)
            restored = ocp.StandardCheckpointHandler().restore(
                place / "state", args=ocp.args.StandardRestore(abstract)
            )
            failed = None
        except ConfigError:  # the same in every process
            raise
        except Exception as error:  # whatever a damaged file makes a reader raise
            failed = error
        if _in_any_process(failed is not None):
            try:
                raise failed or ValueError("another process cannot read its part")
            finally:
                del failed  # its traceback holds what was read, and this frame would hold it
        if digest(restored) != expected:
            raise ValueError("its arrays do not match their checksum")
        return Restored(restored, saved)

    def _check_fits(self, step: int, saved: dict[str, Any], config: dict[str, Any]) -> None:
        if "model" in saved and "model" in config:
            # A field that the saved configuration is too old to have was what its default says.
            missing = config["model"].keys() - saved["model"].keys()
            saved["model"] |= {name: value for name, value in model_defaults().items() if name in missing}
        then, now = (x.get("corpus", {}).get("tokenizer") for x in (saved, config))
        if None not in (then, now) and then != now:
            raise ConfigError(
                f"{self.directory / str(step)} was trained with another tokenizer: {then} there and {now} "
                "here; choose another --run-dir"
            )
        for part, what, free in (
            ("model", "model", ARITHMETIC),
            ("optimizer_state", "optimizer", frozenset()),
        ):
            if part not in saved or part not in config:
                continue
            changed = differing_fields(saved[part], config[part])
            if changed := {name: values for name, values in changed.items() if name not in free}:
                raise ConfigError(
                    f"{self.directory / str(step)} holds another {what}: "
                    + ", ".join(f"{name} is {a!r} there and {b!r} here" for name, (a, b) in changed.items())
                    + "; choose another --run-dir"
                )

    def _restore_data(self, step: int, data: Any) -> None:
        """Every process reads the positions of all that saved: there may have been more or fewer of them."""
        paths = sorted((self.directory / str(step) / "data").glob("process_*-of-*.json"))
        count = int(paths[0].stem.rpartition("-")[2]) if paths else 0
        if not paths or len(paths) != count:
            raise ValueError(f"{len(paths)} of {count} positions in the data are there")
        try:
            data.set_state(merge_states([json.loads(path.read_text()) for path in paths]))
        except ConfigError as error:
            raise ConfigError(f"{self.directory / str(step)} cannot be resumed: {error}") from error

    def _set_aside(self, steps: list[int]) -> None:
        if steps and jax.process_index() == 0:
            for step in steps:
                target = self.directory.parent / "unreadable" / str(step)
                shutil.rmtree(target, ignore_errors=True)
                target.parent.mkdir(exist_ok=True)
                (self.directory / str(step)).rename(target)
        if steps:
            multihost_utils.sync_global_devices("unreadable checkpoints moved")
            self._manager.reload()

    def wait(self) -> None:
        """Blocks until the last save is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Completes the last save and lets go of threads."""
        self._manager.close()
