"""What a command shows: a progress bar on a terminal, lines elsewhere; a run's TensorBoard events."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from tensorboardX import SummaryWriter

_MIB = 2**20


class Report:
    """Shows and records a run's numbers.

    Args:
        enabled: False silences everything (processes other than the first).
        every: steps between printed lines where there is no terminal.
    """

    def __init__(self, enabled: bool, every: int):
        # Without a terminal there is no width to respect: one message, one line.
        self._console = Console(quiet=not enabled, highlight=False)
        if not self._console.is_terminal:
            self._console = Console(quiet=not enabled, highlight=False, width=10_000)
        self._enabled, self._every = enabled, every
        self._progress: Progress | None = None
        self._writer: SummaryWriter | None = None

    def say(self, text: str = "") -> None:
        """Prints a line, above the progress bar if there is one."""
        self._console.print(text, markup=False)

    def start(self, directory: Path | None, step: int, steps: int) -> None:
        """Begins the progress bar, and event files in `directory` (None for none), at `step` of `steps`."""
        if not self._enabled:
            return
        if directory is not None:
            self._writer = SummaryWriter(str(directory), purge_step=step + 1)
        if self._console.is_terminal:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._progress = Progress(*columns, console=self._console)
            self._progress.start()
            self._task = self._progress.add_task("compiling", total=steps, completed=step)

    def step(self, line: dict[str, Any], last: bool) -> None:
        """Shows one step's numbers, as they stand in metrics.jsonl."""
        step = line["step"]
        text = f"loss {line['loss']:.4f}  {line['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in line:
            text += f"  MFU {line['mfu']:.1%}"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=text)
        elif step % self._every == 0 or last or "eval_loss" in line:
            evaluated = f"  eval loss {line['eval_loss']:.4f}" if "eval_loss" in line else ""
            self.say(f"step {step}  {text}{evaluated}")
        if self._writer is not None:
            for name, value in line.items():
                if name != "step":
                    self._writer.add_scalar(name, value, step)

    def text(self, name: str, value: str, step: int) -> None:
        """Shows a sample and files it under `name`."""
        self.say(f"--- {name} at step {step} ---\n{value}\n---")
        if self._writer is not None:
            self._writer.add_text(name, f"```\n{value}\n```", step)

    def close(self) -> None:
        """Ends the progress bar and completes the event files."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class ByteProgress:
    """How much of a known number of bytes is done: a bar on a terminal, elsewhere a line every tenth."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._progress: Progress | None = None
        self._total = self._done = self._shown = 0

    def start(self, total: int) -> None:
        """Begins at 0 of `total` bytes."""
        self._total = total
        if self._console.is_terminal:
            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console)
            self._progress.start()
            self._task = self._progress.add_task("", total=total)

    def advance(self, size: int) -> None:
        """`size` more bytes are done."""
        self._done += size
        if self._done - self._shown < (_MIB if self._progress else self._total / 10):
            return
        self._shown = self._done
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done)
        else:
            self._console.print(f"{self._done / _MIB:,.0f} of {self._total / _MIB:,.0f} MiB read")

    def close(self) -> None:
        """Ends the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done)
            self._progress.stop()
            self._progress = None
