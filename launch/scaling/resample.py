"""The bootstrap over runs: how often each run counts in a resample, and percentile intervals.

Runs are drawn with replacement and refitted with their sizes (Efron 1979): nothing is assumed of the noise,
neither its shape nor that it is alike at all sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LEVEL = 0.95

Progress = Callable[[int, int], None]  # called with how many are done, and of how many


def counts(
    runs: int,
    resamples: int,
    seed: int,
    usable: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """How often each run was drawn, float [resamples, runs]; each row sums to `runs`.

    Args:
        usable: which rows of such an array could fix the law, bool; the others are drawn again.

    Raises:
        ValueError: fewer than 1 in 100 draws are usable.
    """
    random = np.random.default_rng(seed)
    kept = np.empty((0, runs))
    for _ in range(100):
        drawn = random.multinomial(runs, np.full(runs, 1 / runs), size=resamples).astype(float)
        kept = np.concatenate([kept, drawn if usable is None else drawn[usable(drawn)]])
        if len(kept) >= resamples:
            return kept[:resamples]
    raise ValueError(f"almost no resample of the {runs} runs could be fitted; add runs of other sizes")


def interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of one quantity over resamples [S]; NaN where too many resamples do not have it."""
    values = np.asarray(values, dtype=float)
    tail = (1 - level) / 2
    if np.isnan(values).mean() >= tail:
        return float("nan"), float("nan")
    # Values themselves, none between two: some may be infinite.
    low, high = np.nanquantile(values, [tail, 1 - tail], method="nearest")
    return float(low), float(high)
