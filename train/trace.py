"""A profiler's trace of a few steps, on demand."""

from pathlib import Path

import jax


class Trace:
    """Traces steps `first` to `first + count - 1` of those that are run, in this process.

    Args:
        directory: where the trace goes, for TensorBoard's profile plugin or Perfetto.
        first: the first step traced; None traces nothing.
        count: how many steps.
    """

    def __init__(self, directory: Path, first: int | None, count: int):
        self._directory, self._first, self._count = directory, first, count
        self._running = False

    def before(self, step: int) -> None:
        """Called before a step is started."""
        if step == self._first:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def ends(self, step: int) -> bool:
        """Whether `step` is the last one traced: wait for it, then `close`."""
        return self._running and self._first is not None and step >= self._first + self._count - 1

    def close(self) -> None:
        """Writes the trace, if one is running."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
