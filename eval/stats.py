"""Confidence intervals of mean scores."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

Z95 = 1.959963984540054


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % Wilson interval of a share."""
    share, spread = right / total, Z95**2 / total
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    # rounding must not leave a trace at the ends
    return 0.0 if right == 0 else middle - half, 1.0 if right == total else middle + half


def bootstrap(values: Sequence[float], rounds: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a mean; the same for the same values."""
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(rounds))
    return means[round(0.025 * (rounds - 1))], means[round(0.975 * (rounds - 1))]


def adjusted(values: Sequence[float], low: float, high: float) -> tuple[float, float]:
    """95 % interval of a mean of values between ``low`` and ``high``, by the normal rule after one of each is added.

    So it keeps a width where all values are the same. For differences of paired answers, -1 to 1, it is that of Bonett
    and Price (2012); for shares it is close to that of Agresti and Coull (1998).
    """
    added = [*values, low, high]
    mean = sum(added) / len(added)
    half = Z95 * math.sqrt(sum((value - mean) ** 2 for value in added)) / len(added)
    return max(low, mean - half), min(high, mean + half)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of per-sample scores: Wilson for right or wrong, bootstrap otherwise."""
    if all(value in (0.0, 1.0) for value in values):
        return wilson(round(sum(values)), len(values))
    return bootstrap(values)
