"""Has the last word about a training process that ended without one; see `train.processes`.

Run as a script, in a process of its own: what ends the training process (SIGKILL, the kernel when memory runs
out, JAX's C++ when a peer is lost) leaves Python no time to say anything.
"""

import signal
import sys
from collections.abc import Iterable


def last_words(lines: Iterable[str]) -> str:
    """The last line given before the other end of a pipe closed; empty where nothing is to be said."""
    last = ""
    for line in lines:
        last = line
    return last.strip()


if __name__ == "__main__":
    # A signal to the whole process group is for the training process, which may have something to save.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if text := last_words(sys.stdin):
        print(text, file=sys.stderr, flush=True)
