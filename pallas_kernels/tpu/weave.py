"""Emission order of independent work.

The compiler schedules a kernel's straight-line code roughly in program order, and a matrix product answers
only after some 200 cycles. Work is therefore written as generators that yield between dependent steps;
running several of them side by side fills one chain's waits with another's instructions.
"""

from collections.abc import Callable, Generator, Sequence

Steps = Generator[None, None, None]

_END = object()


def together(streams: Sequence[Steps]) -> Steps:
    """A step of each stream in turn, to the end of all."""
    active = list(streams)
    while active:
        remaining = []
        for stream in active:
            if next(stream, _END) is not _END:
                remaining.append(stream)
                yield
        active = remaining


def in_turn(streams: Sequence[Steps]) -> Steps:
    """One stream after the other."""
    for stream in streams:
        yield from stream


def staggered(stages: Sequence[Sequence[Steps]]) -> Steps:
    """A pipeline: stage s of unit u runs beside stage s + 1 of unit u - 1.

    Args:
      stages: for each unit its stages, in order.
    """
    depth = len(stages[0])
    for slot in range(len(stages) + depth - 1):
        yield from together([stages[slot - s][s] for s in range(depth) if 0 <= slot - s < len(stages)])


def after(ready: Callable[[], bool], first: Steps, then: Steps) -> Steps:
    """``then``, before which ``first`` is run until ``ready``."""
    while not ready():
        next(first, None)
    yield from then


def weave(streams: Sequence[tuple[Steps, int]]) -> None:
    """Runs all to their ends, in turn so many steps of each."""
    alive = True
    while alive:
        alive = False
        for stream, steps in streams:
            for _ in range(steps):
                alive = (next(stream, _END) is not _END) or alive
