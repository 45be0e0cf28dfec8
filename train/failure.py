"""A step whose loss or gradient is not finite: what it saw is kept for inspection."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from train.data import Batch
from train.step import TrainState


class NonFiniteError(RuntimeError):
    """Loss or gradient is NaN or infinite.

    Attributes:
        step: the step that failed.
        state: the state it started from.
        batch: this process's rows of its batch.
        config: the run's configuration, JSON-ready.
    """

    def __init__(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        state: TrainState,
        batch: Batch,
        config: dict[str, Any],
    ):
        super().__init__(f"step {step} is not finite: loss {loss}, gradient norm {grad_norm}")
        self.step, self.loss, self.grad_norm = step, loss, grad_norm
        self.state, self.batch, self.config = state, batch, config


def save_failure(directory: Path, error: NonFiniteError) -> Path:
    """Writes `step_<n>/` under `directory`, replacing an earlier one of the same step.

    It holds `state` (an Orbax checkpoint of the state before the step), `batch_<process>.npz` and
    `failure.json` (step, loss, gradient norm and configuration).

    Returns:
        The folder written.
    """
    target = (directory / f"step_{error.step}").absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(target / "state", error.state, force=True)
    np.savez(target / f"batch_{jax.process_index()}.npz", **error.batch)  # type: ignore[arg-type]
    if jax.process_index() == 0:
        about = {
            "step": error.step,
            "loss": repr(error.loss),  # JSON has no NaN
            "grad_norm": repr(error.grad_norm),
            "config": error.config,
        }
        (target / "failure.json").write_text(json.dumps(about, indent=2) + "\n")
    return target
