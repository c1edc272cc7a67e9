"""What runs fix of a law, and the words for what they do not."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from launch.scaling.identifiability import correlations, profiles, warnings
from launch.scaling.parametric import NAMES, Fit, Law, bootstrap, fit
from launch.scaling.table import Points, points
from tests.launch.scaling.test_parametric import PLANTED, planted


def fitted(runs: Points) -> tuple[Fit, Law]:
    law = fit(runs, grid=False)
    return law, bootstrap(runs, law, 200)


def test_profiles_of_a_law_that_the_runs_fix() -> None:
    runs = planted(0.005)
    law = fit(runs, grid=False)
    resampled = bootstrap(runs, law, 400)
    found = profiles(runs, law, resampled)
    assert list(found) == list(NAMES)
    for name, profile in found.items():
        middle = len(profile.values) // 2
        assert profile.values[middle] == pytest.approx(getattr(law, name))
        assert profile.objectives[middle] == pytest.approx(law.objective, rel=1e-9)
        assert profile.objectives.min() > law.objective * (1 - 1e-9)
        # It rises to either side, as a profile of a convex valley does.
        assert (np.diff(profile.objectives[middle:]) > 0).all()
        assert (np.diff(profile.objectives[: middle + 1]) < 0).all()
        assert profile.low is not None and profile.high is not None
        assert profile.low < getattr(law, name) < profile.high
        ends = np.log(resampled.intervals()[name]) if name in "ABE" else resampled.intervals()[name]
        own = np.log([profile.low, profile.high]) if name in "ABE" else [profile.low, profile.high]
        assert np.ptp(own) == pytest.approx(np.ptp(ends), rel=0.5)
    json.dumps({name: profile.as_json() for name, profile in found.items()}, allow_nan=False)


def test_a_profile_is_the_least_over_the_other_constants() -> None:
    runs = planted(0.005)
    law = fit(runs, grid=False)
    profile = profiles(runs, law, bootstrap(runs, law, 100))["E"]
    # Laws with E held there, drawn at random, must not get below the profile.
    place = len(profile.values) - 5
    random = np.random.default_rng(0)
    tries = law.constants() + random.standard_normal((20_000, 5)) * [0.1, 0.1, 0, 0.005, 0.005]
    tries[:, 2] = np.log(profile.values[place])
    predicted = np.logaddexp(
        np.logaddexp(
            tries[:, :1] - tries[:, 3:4] * np.log(runs.parameters),
            tries[:, 1:2] - tries[:, 4:] * np.log(runs.tokens),
        ),
        tries[:, 2:3],
    )
    residuals = predicted - np.log(runs.loss)
    slopes = np.clip(residuals, -1e-3, 1e-3)
    assert (slopes * (residuals - slopes / 2)).sum(axis=1).min() >= profile.objectives[place] > law.objective


def test_no_warning_of_what_is_well_known() -> None:
    runs = planted(0.0005, sizes=12)
    law, resampled = fitted(runs)
    found = warnings(runs, law, resampled, profiles(runs, law, resampled))
    # A goes with alpha in any table, for sizes are far from 1.
    assert len(found) == 2 and all("move together" in line for line in found)
    pairs = correlations(resampled)
    assert len(pairs) == 10 and pairs["A and alpha"] > 0.99 and pairs["B and beta"] > 0.99


def test_a_term_that_the_runs_do_not_show() -> None:
    """With far more tokens than the sizes can use, nothing is left of B / D^beta."""
    random = np.random.default_rng(0)
    n, d = random.uniform(1e7, 1e9, 30), random.uniform(1e16, 1e18, 30)
    runs = points(n, d, PLANTED.loss(n, d) * np.exp(0.005 * random.standard_normal(30)))
    law, resampled = fitted(runs)
    found = warnings(runs, law, resampled, profiles(runs, law, resampled))
    assert any(line.startswith("B is known to no order of magnitude") for line in found), found
    assert any(line.startswith("B/D^beta is") and "depends on tokens" in line for line in found), found


def test_sizes_and_tokens_that_vary_together() -> None:
    n = np.geomspace(1e7, 1e10, 20)
    d = 20 * n * np.exp(0.02 * np.random.default_rng(0).standard_normal(20))
    runs = points(n, d, PLANTED.loss(n, d) * np.exp(0.003 * np.random.default_rng(1).standard_normal(20)))
    law, resampled = fitted(runs)
    found = warnings(runs, law, resampled)
    assert any(line.startswith("Size and tokens vary together (correlation 1.000") for line in found), found


def test_the_share_of_starts_is_told() -> None:
    runs = planted(0.005)
    law, resampled = fitted(runs)
    law = dataclasses.replace(law, starts=4500, reached=870)
    found = warnings(runs, law, resampled)
    assert any("870 of 4500 of the grid reach it (19.3%)" in line for line in found)
    lone = dataclasses.replace(law, starts=0, reached=0, linear_reached=1)
    assert any("A single start" in line for line in warnings(runs, lone, resampled))


def test_few_runs_are_told() -> None:
    runs = planted(0.005, budgets=3, sizes=3)
    law, resampled = fitted(runs)
    assert any(line.startswith("9 runs for five constants") for line in warnings(runs, law, resampled))


def test_a_run_that_went_wrong_is_named() -> None:
    runs = planted(0.005)
    at = 17
    wrong = dataclasses.replace(runs, loss=runs.loss * np.where(np.arange(len(runs)) == at, 1.9, 1.0))
    assert not any("far off" in line for line in warnings(runs, *fitted(runs)))
    (line,) = [line for line in warnings(wrong, *fitted(wrong)) if "far off" in line]
    assert line.startswith(f"1 of {len(runs)} runs are far off the law: {runs.names[at]} (+9")
