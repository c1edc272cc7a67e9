"""Resamples of runs, and intervals."""

from __future__ import annotations

import numpy as np
import pytest

from launch.scaling.resample import counts, interval


def test_counts_are_draws_with_replacement() -> None:
    drawn = counts(20, 4000, 0)
    assert drawn.shape == (4000, 20) and (drawn.sum(axis=1) == 20).all()
    assert np.array_equal(drawn, counts(20, 4000, 0)) and not np.array_equal(drawn, counts(20, 4000, 1))
    assert drawn.mean(axis=0) == pytest.approx(np.ones(20), abs=0.08)
    assert (drawn == 0).mean() == pytest.approx(0.95**20, abs=0.01)


def test_unusable_draws_are_drawn_again() -> None:
    drawn = counts(5, 300, 0, lambda rows: (rows > 0).sum(axis=1) >= 4)
    assert len(drawn) == 300 and ((drawn > 0).sum(axis=1) >= 4).all()
    with pytest.raises(ValueError, match="almost no resample of the 5 runs"):
        counts(5, 300, 0, lambda rows: np.zeros(len(rows), dtype=bool))


def test_intervals() -> None:
    values = np.random.default_rng(0).permutation(np.arange(1001.0))
    assert interval(values) == pytest.approx((25, 975))
    assert interval(np.append(values, [np.nan] * 10)) == pytest.approx((25, 975))
    assert np.isnan(interval(np.append(values, [np.nan] * 40))).all()
    assert interval(np.append(values, [np.inf] * 50)) == (26, np.inf)
