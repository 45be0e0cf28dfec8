"""What stands between a run and accidents: signals to stop, and two runs in one directory."""

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import jax
from jax.experimental import multihost_utils

from train.config import ConfigError


class StopRequest:
    """Set by SIGTERM or SIGINT; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def agreed(self, step: int) -> bool:
        """Whether to stop after this step: of several processes, the same answer in each.

        Ask after every step. A signal to one process reaches the others through JAX's preemption service,
        within about a second and a step; no step waits for it.
        """
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return bool(self)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns SIGTERM and SIGINT into a `StopRequest` that the loop reads between steps.

    Of several processes, SIGTERM is left to the handler that `jax.distributed.initialize` installed, and
    SIGINT is passed on to it.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
        yield request
        return
    several, interrupted = jax.process_count() > 1, False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if number == signal.SIGINT:
            if interrupted or request:
                raise KeyboardInterrupt
            interrupted = True
        if several:
            signal.raise_signal(signal.SIGTERM)
        else:
            request.signal = signal.Signals(number)

    numbers = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_directory(directory: Path) -> None:
    """Raises ConfigError for a run directory that is a file or plainly not ours to write, before any work."""
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"argument --run-dir: {directory} is a file")
    if directory.exists() and not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(f"argument --run-dir: {directory} cannot be written")


@contextmanager
def only_run_in(directory: Path, doing: str = "training", option: str = "--run-dir") -> Iterator[None]:
    """Holds a lock on a directory; the system lets go of it however the process ends.

    Args:
        directory: gets a file `lock`.
        doing: what is done there, for the message.
        option: what names the directory.

    Raises:
        ConfigError: another process holds it, or it cannot be written.
    """
    try:
        file = open(directory / "lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise ConfigError(f"argument {option}: {directory} cannot be written ({error})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"another process is {doing} in {directory}") from error
        yield
