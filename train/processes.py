"""Several processes as one run: how they join, and that none waits long for one that is lost."""

import contextlib
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import jax

from train import witness
from train.checkpoint import CheckpointError
from train.config import ConfigError, MeshConfig
from train.documents import DataError

_AGAIN = "start all processes again with the same command: the run goes on from its newest checkpoint"


class Processes:
    """The processes of a run; of one process too.

    JAX watches the heartbeats of all of them and ends every process, by aborting it from C++, when one is not
    heard of for `lost_after` seconds, or at once when process 0 is gone. A witness then says in one line what
    happened (`train.witness`).
    """

    def __init__(self) -> None:
        self.index, self.count, self._now = 0, 1, "at the start"
        self._witness: subprocess.Popen[bytes] | None = None

    def join(self, mesh: MeshConfig) -> None:
        """Finds the other processes, if there are any; call it before JAX is used.

        Raises:
            ConfigError: JAX does not know the others.
        """
        if not mesh.distributed:
            return
        self._witness = subprocess.Popen(
            [sys.executable, "-S", witness.__file__], stdin=subprocess.PIPE, bufsize=0
        )
        where = f"at {mesh.coordinator}" if mesh.coordinator else "where JAX found its address"
        self._expect(
            f"error: this process could not join the others: not all of them were there within "
            f"{mesh.join_within} s (--mesh.join-within), or process 0 ({where}) cannot be reached"
        )
        try:
            jax.distributed.initialize(
                mesh.coordinator,
                mesh.num_processes,
                mesh.process_id,
                initialization_timeout=mesh.join_within,
                heartbeat_timeout_seconds=mesh.lost_after,
            )
        except ValueError as error:
            self.dismiss()
            raise ConfigError(
                f"argument --mesh.distributed: {error}; where JAX does not find the other processes, give "
                "--mesh.coordinator host:port, --mesh.num-processes and --mesh.process-id"
            ) from error
        self.index, self.count = jax.process_index(), jax.process_count()
        self.now(self._now)

    def now(self, where: str) -> None:
        """Where this process is, such as "in step 12": what is said of it if it ends without a word."""
        self._now = where
        if self._witness is not None:
            self._expect(
                f"error: process {self.index} of {self.count} ended {where}: it was killed, or JAX ended it "
                f"because it lost another one, which the lines above then name; {_AGAIN}"
            )

    def dismiss(self) -> None:
        """This process says by itself how it ended."""
        if self._witness is not None:
            self._expect("")
            with contextlib.suppress(OSError):
                self._witness.stdin.close()  # type: ignore[union-attr]
            self._witness.wait()
            self._witness = None

    def leave(self, status: int) -> NoReturn:
        """Ends this process at once, after an error that the others may not have.

        An orderly exit would wait for them, who wait for this one's part of a step. They end as it is lost.
        """
        self.dismiss()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def fail(self, error: BaseException) -> NoReturn:
        """Tells of an unexpected error, and leaves."""
        traceback.print_exception(error)
        reason = (str(error).strip() or "no message").splitlines()[0]
        print(
            f"error: process {self.index} of {self.count} failed {self._now}: {type(error).__name__}: "
            f"{reason}; if another one was lost, {_AGAIN}",
            file=sys.stderr,
        )
        self.leave(1)

    def _expect(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the witness may have been killed
            self._witness.stdin.write(f"{text}\n".encode())  # type: ignore[union-attr]


def one_of_several(command: Callable[[Processes], int]) -> int:
    """Runs a command that may be one of several processes, and tells of what went wrong.

    Args:
        command: joins the processes it is given, and returns its exit status.

    Returns:
        The exit status; 2 for options or data that are wrong, 1 for checkpoints that cannot be read. Of
        several processes, one that fails does not return: it leaves.
    """
    processes = Processes()
    try:
        status = command(processes)
    except (ConfigError, DataError, FileNotFoundError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1 if isinstance(error, CheckpointError) else 2
        if processes.count > 1:
            processes.leave(status)
    except Exception as error:
        if processes.count > 1:
            processes.fail(error)
        raise
    processes.dismiss()
    return status
