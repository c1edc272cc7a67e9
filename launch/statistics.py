"""Whether seeds tell candidates apart: Welch's t-test of every pair, two-sided, corrected by Holm.

With no true difference between some of the candidates, the chance that any two of these are told apart is at
most LEVEL, whatever holds of the others (Holm 1979); and so is the chance to name a winner among those that
are equally good. Welch's test (1947) takes means to be normal, and neither variances to be equal nor seeds to
be paired. Where candidates share their seeds, what these have in common makes it more careful.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.stats import ttest_ind

LEVEL = 0.05


@dataclass(frozen=True)
class Pair:
    """Two candidates, the one with the lower mean first.

    difference: of the means, not negative. low, high: its confidence interval at 1 - LEVEL, of this pair
    alone. p: of this pair alone. adjusted: p after Holm's correction for all pairs.
    """

    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float
    adjusted: float

    @property
    def apart(self) -> bool:
        """Whether the seeds tell the two apart."""
        return self.adjusted <= LEVEL


def compared(samples: Mapping[str, Sequence[float] | np.ndarray]) -> list[Pair]:
    """Every pair of candidates, each with equally many values, two or more; ordered by their means.

    Candidates whose values do not vary at all are never told apart: nothing says how large the noise is.
    """
    names = sorted(samples, key=lambda name: np.mean(samples[name]))
    couples = list(combinations(names, 2))
    if not couples:
        return []
    first, second = (np.array([samples[couple[i]] for couple in couples], dtype=float) for i in (0, 1))
    varies = (np.ptp(first, axis=1) > 0) | (np.ptp(second, axis=1) > 0)
    differences = second.mean(axis=1) - first.mean(axis=1)
    lows, highs, ps = differences.copy(), differences.copy(), np.ones(len(couples))
    if varies.any():
        test = ttest_ind(second[varies], first[varies], axis=1, equal_var=False)
        lows[varies], highs[varies] = test.confidence_interval(1 - LEVEL)
        ps[varies] = test.pvalue
    numbers = np.stack([differences, lows, highs, ps, holm(ps)], axis=1).tolist()
    return [Pair(*couple, *row) for couple, row in zip(couples, numbers, strict=True)]


def holm(ps: Sequence[float] | np.ndarray) -> np.ndarray:
    """p-values adjusted by Holm's step-down procedure, in their order."""
    values = np.asarray(ps, dtype=float)
    order = np.argsort(values)
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate((len(values) - np.arange(len(values))) * values[order])
    return adjusted.clip(max=1.0)


def winner(pairs: Sequence[Pair]) -> str | None:
    """The candidate with the lowest mean, where the seeds tell it apart from every other."""
    if not pairs:
        return None
    best = pairs[0].first
    return best if all(pair.apart for pair in pairs if pair.first == best) else None
