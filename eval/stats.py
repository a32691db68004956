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


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of per-sample scores: Wilson for right or wrong, bootstrap otherwise."""
    if all(value in (0.0, 1.0) for value in values):
        return wilson(round(sum(values)), len(values))
    return bootstrap(values)
