"""Means over repetitions with their confidence."""

import math
from collections.abc import Sequence

# 97.5 % quantiles of Student's t by degrees of freedom; beyond, the normal's is close.
_T = {
    1: 12.71,
    2: 4.30,
    3: 3.18,
    4: 2.78,
    5: 2.57,
    6: 2.45,
    7: 2.36,
    8: 2.31,
    9: 2.26,
    11: 2.20,
    14: 2.14,
    19: 2.09,
}


def mean_and_band(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % confidence interval (Student's t; 0 for one value)."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, 0.0
    deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1))
    degrees = max(d for d in _T if d <= n - 1)  # the wider interval where it is not in the table
    t = 1.96 if n > 60 else _T[degrees]
    return mean, t * deviation / math.sqrt(n)
