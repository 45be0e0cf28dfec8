"""The numbers of a run's steps, from devices to the report, metrics.jsonl and TensorBoard."""

from pathlib import Path
from typing import Any

import jax

from deltajax.models import flops_per_token
from train.config import TrainConfig
from train.data import Batch
from train.failure import NonFiniteError
from train.metrics import MetricsFile, Throughput, peak_flops
from train.model_state import ModelState
from train.report import Report
from train.step import StepMetrics, TrainState


class Recorder:
    """Writes down one step after another.

    Args:
        config: the run's options.
        saved_config: as checkpoints have it.
        model: the model and its mesh.
        report: what is shown.
        path: metrics.jsonl, or None for a process that writes none.
        start: the step the run goes on from.
    """

    def __init__(
        self,
        config: TrainConfig,
        saved_config: dict[str, Any],
        model: ModelState,
        report: Report,
        path: Path | None,
        start: int,
    ):
        self._config, self._saved_config, self._report = config, saved_config, report
        self._notes: dict[int, dict[str, float]] = {}
        self._file = None if path is None else MetricsFile(path, start)
        peak = peak_flops(model.mesh.devices.flat[0].device_kind, config.log.peak_tflops)
        self.throughput = Throughput(
            flops_per_token(model.config, config.data.seq_len),
            None if peak is None else peak * model.mesh.size,
        )

    def note(self, step: int, numbers: dict[str, float]) -> None:
        """Has a step's line tell of these numbers too."""
        self._notes[step] = numbers

    def line(self, step: int, metrics: StepMetrics, batch: Batch, state: TrainState) -> dict[str, Any]:
        """A step's numbers, once they are there.

        Args:
            step: the step.
            metrics: what it computed.
            batch: this process's rows of its batch.
            state: the state after it.

        Raises:
            NonFiniteError: the step's loss or gradient was not finite; `state` is then still the one
                before that step.
        """
        metrics = jax.device_get(metrics)
        loss, grad_norm = metrics.loss.item(), metrics.grad_norm.item()
        if not metrics.ok:
            raise NonFiniteError(step, loss, grad_norm, state, batch, self._saved_config)
        line = {"step": step, "loss": loss, "grad_norm": grad_norm}
        line |= {"learning_rate": metrics.learning_rate.item(), "tokens": int(metrics.tokens)}
        line |= self.throughput.update(metrics.tokens.item())
        line |= {name: x.item() for name, x in metrics.means.items()} | self._notes.pop(step, {})
        return line | {f"grad_norm/{group}": norm.item() for group, norm in metrics.group_norms.items()}

    def write(self, line: dict[str, Any]) -> None:
        """Shows and records it."""
        self._report.step(line, last=line["step"] == self._config.steps)
        if self._file is not None:
            self._file.write(line)

    def close(self) -> None:
        """Completes metrics.jsonl."""
        if self._file is not None:
            self._file.close()
