"""How far the TPU kernels may be from the recurrence in float64, in their tests and in checks on a device."""

from typing import NamedTuple

import numpy as np

from tests import cases

# Relative errors with bfloat16 inputs, whose own rounding is 2^-9.
OUTPUTS, GRADIENTS, GATES = 5e-3, 8e-3, 2e-2
HALF = {
    **dict.fromkeys(("o", "final_state"), OUTPUTS),
    **dict.fromkeys(("dq", "dk", "dv", "dinitial_state"), GRADIENTS),
    **dict.fromkeys(("dbeta", "dg"), GATES),
}
# With float32 inputs products run in three passes, 2^-16 each, over a chain of chunks; g's gradient is a
# difference of two sums that nearly cancel where decays are weak.
FLOAT32 = dict.fromkeys(HALF, 1e-4) | {"dg": 1e-3, "dA_log": 1e-3, "ddt_bias": 1e-3}
# Sums over all tokens whose terms cancel: their direction and their size as a whole.
PARAMETERS = ("dA_log", "ddt_bias")
COSINE, SIZE = 0.999, 0.02

# Cases over their tolerance with float32 inputs (2026-11-25), with the worst that was seen: T's entries are
# all +-2, and the errors of every product's three passes add up over 1000 tokens.
BROKEN_FLOAT32 = {
    "head-B1T1000H1-1K64V64-zero-identical-keys-beta2": "dbeta 1.3e-4",
    "channel-B1T1000H1-1K64V64-zero-identical-keys-beta2": "dbeta 1.8e-4",
}


class Direction(NamedTuple):
    """Of an array beside the one that is right: the cosine between them, and the ratio of their norms."""

    cosine: float
    size: float


def direction(x, y) -> Direction:
    x, y = (np.ravel(np.asarray(a, np.float64)) for a in (x, y))
    norms = np.linalg.norm(x), np.linalg.norm(y)
    return Direction(float(x @ y / (norms[0] * norms[1])), float(norms[0] / norms[1]))


def measured(got: dict, expected: dict) -> tuple[dict[str, float], dict[str, Direction]]:
    """Relative errors of all arrays, and the directions of the gate parameters' gradients."""
    errors = {name: cases.relative_error(got[name], value) for name, value in expected.items()}
    return errors, {name: direction(got[name], expected[name]) for name in PARAMETERS if name in expected}


def beyond(errors: dict, directions: dict, tolerances: dict, by_direction: tuple[str, ...]) -> dict[str, str]:
    """What is not within its bound, and by what it was found."""
    bad = {n: f"{e:.1e}" for n, e in errors.items() if n not in by_direction and not e < tolerances[n]}
    for name in set(directions) & set(by_direction):
        found = directions[name]
        if not (found.cosine >= COSINE and abs(found.size - 1) <= SIZE):
            bad[name] = f"cosine {found.cosine:.5f}, size {found.size:.3f}"
    return bad
