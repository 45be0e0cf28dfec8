"""What a run has saved, to be read while it may be running: nothing in its directory is changed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx

from deltajax.models import ModelConfig, abstract_model
from train.checkpoint import CheckpointError, digest
from train.config import ConfigError, TrainConfig
from train.config_dict import from_dict
from train.step import Params


@dataclass(frozen=True)
class Saved:
    """One checkpoint of a run.

    Attributes:
        step: optimizer steps taken.
        place: its directory.
        model: the model's configuration.
        config: all that was saved with it, see `Checkpoints.save`.
    """

    step: int
    place: epath.Path
    model: ModelConfig
    config: dict[str, Any]

    @property
    def options(self) -> TrainConfig:
        """The run's options.

        Raises:
            ConfigError: options that are none any more.
        """
        return from_dict(TrainConfig, self.config["train"])

    def params(self, abstract: Params | None = None) -> Params:
        """The parameters alone, without the optimizer's state.

        Args:
            abstract: `jax.ShapeDtypeStruct`s with shardings; without them, NumPy arrays are read.

        Raises:
            CheckpointError: they cannot be read, or are not what was saved.
        """

        if abstract is None:
            state = nnx.to_pure_dict(nnx.state(abstract_model(self.model), nnx.Param))
            item = {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)}
            restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        else:
            item = {"params": abstract}
            restore = ocp.checkpoint_utils.construct_restore_args(item)
        args = ocp.args.PyTreeRestore(item=item, restore_args=restore, partial_restore=True)
        try:
            params = ocp.PyTreeCheckpointHandler().restore(self.place / "state", args=args)["params"]
        except Exception as error:  # whatever a damaged file makes a reader raise
            raise _unreadable(self.place, error) from error
        expected = self.config.get("params_digest")  # checkpoints of before have none
        if expected is not None and digest(params) != expected:
            raise _unreadable(self.place, ValueError("its arrays do not match their checksum"))
        return params


def saved_steps(run_dir: Path) -> list[int]:
    """Steps of which a run has a complete checkpoint, in order."""
    directory = run_dir.absolute() / "checkpoints"
    # Not by a manager, which reads the losses too and fails where one is damaged.
    return sorted(ocp.utils.checkpoint_steps(directory)) if directory.is_dir() else []


def open_saved(run_dir: Path, step: int | None = None) -> Saved:
    """A run's newest complete checkpoint, or that of a step.

    Raises:
        ConfigError: there is none; the message says which there are.
        CheckpointError: it cannot be read.
    """
    steps = saved_steps(run_dir)
    if not steps:
        raise ConfigError(f"argument RUN-DIR: {run_dir} holds no checkpoints")
    if step is not None and step not in steps:
        raise ConfigError(f"argument --step: {run_dir} has checkpoints of steps {steps}, got {step}")
    step = steps[-1] if step is None else step
    place = epath.Path(run_dir.absolute() / "checkpoints" / str(step))
    try:
        config = ocp.JsonCheckpointHandler().restore(place / "config", args=ocp.args.JsonRestore())
        return Saved(step, place, ModelConfig(**_tuples(config["model"])), config)
    except Exception as error:
        raise _unreadable(place, error) from error


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}


def _unreadable(place: epath.Path, error: Exception) -> CheckpointError:
    reason = (str(error).strip() or "no message").splitlines()[0]
    return CheckpointError(
        f"checkpoint {place} cannot be read ({type(error).__name__}: {reason}); --step takes an older one"
    )
