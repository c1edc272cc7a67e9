"""The law of repeated data: a planted one is found again, and what its terms mean."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from launch.scaling import constrained, parametric
from launch.scaling.constrained import Constrained, bootstrap, fit, repeating, warnings
from launch.scaling.parametric import Law
from launch.scaling.table import Points, points
from tests.launch.scaling.test_parametric import PLANTED, planted

TRUTH = Constrained(PLANTED, 15.4, 5.3)


def repeated(noise: float, seed: int = 0, sizes: tuple[float, ...] = (0.5, 2, 6, 20)) -> Points:
    """Three data sets, gone over 2 to 100 times by models from too small to far too large."""
    unique = np.repeat([1e8, 4e8, 1.5e9], 4 * len(sizes))
    tokens = unique * np.tile(np.repeat([2, 8, 30, 100], len(sizes)), 3)
    n = np.asarray(PLANTED.parameters_for(unique)) * np.tile(sizes, 12)
    scatter = np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))
    return points(n, tokens, TRUTH.loss(n, tokens, unique) * scatter, unique_tokens=unique)


def test_a_planted_law_is_found_again() -> None:
    found = fit(repeated(0), PLANTED)
    assert found.repeats == pytest.approx(15.4, rel=1e-5) and found.excess == pytest.approx(5.3, rel=1e-5)
    assert found.runs == 48 and found.objective < 1e-15


@pytest.mark.parametrize("noise", [1e-4, 2e-2])
def test_derivatives_against_finite_differences(noise: float) -> None:
    runs = repeated(noise)
    bases = Law(*np.stack([PLANTED.constants(), PLANTED.constants() * 1.01]).T)
    weights = np.random.default_rng(0).multinomial(48, np.full(48, 1 / 48), size=2).astype(float)
    objective, rows, step = constrained._Objective(runs, bases, weights), np.arange(2), 1e-6
    at = np.array([[2.7, 1.6], [1.5, 3.0]])
    _, gradient, hessian = objective.derivatives(at, rows)
    for i, unit in enumerate(np.eye(2)):
        ends = [objective.derivatives(at + sign * step * unit, rows) for sign in (1, -1)]
        slope, bend = ((ends[0][part] - ends[1][part]) / (2 * step) for part in (0, 1))
        assert np.allclose(slope, gradient[:, i], atol=1e-6 * np.abs(gradient).max())
        assert np.allclose(bend, hessian[:, i], atol=1e-5 * np.abs(hessian).max())
    alone = objective.derivatives(at[1:], rows[1:])
    assert alone[0][0] == pytest.approx(objective.values(at, rows)[1]) and np.allclose(
        alone[1][0], gradient[1]
    )


def test_what_a_repetition_is_worth() -> None:
    unique = 1e9
    n = float(PLANTED.parameters_for(unique)) / 2  # none in excess
    once = TRUTH.loss(n, unique, unique)
    assert once == pytest.approx(PLANTED.loss(n, unique))
    assert TRUTH.loss(n, unique, 5 * unique) == pytest.approx(once)  # what is not trained on does not help
    worth = 1 + 15.4 * (1 - math.exp(-3 / 15.4))
    assert TRUTH.loss(n, 4 * unique, unique) == pytest.approx(PLANTED.loss(n, worth * unique))
    assert TRUTH.loss(n, 1e6 * unique, unique) == pytest.approx(PLANTED.loss(n, 16.4 * unique), rel=1e-6)
    endless = Constrained(PLANTED, math.inf, math.inf)
    assert endless.loss(40 * n, 4 * unique, unique) == pytest.approx(PLANTED.loss(40 * n, 4 * unique))


def test_what_excess_parameters_are_worth() -> None:
    unique = 1e9
    best = float(PLANTED.parameters_for(unique))
    worth = best * (1 + 5.3 * (1 - math.exp(-7 / 5.3)))
    assert TRUTH.loss(8 * best, unique, unique) == pytest.approx(PLANTED.loss(worth, unique))


def test_the_best_point_on_so_much_data() -> None:
    flops, unique = 1e21, 1e9
    n, d, loss = TRUTH.optimum(flops, unique)
    assert 6 * n * d == pytest.approx(flops)
    sizes = np.geomspace(1e7, 1e12, 20_001)
    along = TRUTH.loss(sizes, flops / 6 / sizes, unique)
    assert loss == pytest.approx(along.min(), rel=1e-6) and n == pytest.approx(
        sizes[along.argmin()], rel=0.02
    )
    # With data enough, it is the base law's: no run repeats, and none has more parameters than are best.
    assert TRUTH.optimum(flops, 1e15)[2] == pytest.approx(PLANTED.optimum(flops)[2], rel=1e-4)
    draws = Constrained(Law(*np.stack([PLANTED.constants()] * 3).T), np.array([5, 15.4, 40]), np.full(3, 5.3))
    losses = draws.optimum(flops, unique)[2]
    assert losses[1] == pytest.approx(loss) and losses[0] > losses[1] > losses[2]


def test_intervals_hold_the_planted_constants() -> None:
    within = [0, 0]
    for seed in range(8):
        fresh = planted(0.005, seed)
        base = parametric.fit(fresh, grid=False)
        runs = repeated(0.005, seed)
        found = fit(runs, base)
        resampled = bootstrap(runs, found, parametric.bootstrap(fresh, base, 100, seed), seed)
        ends = resampled.intervals()
        for i, (name, truth) in enumerate((("repeats", 15.4), ("excess", 5.3))):
            within[i] += ends[name][0] <= truth <= ends[name][1]
            assert ends[name][0] < getattr(found, name) < ends[name][1] < 10 * ends[name][0]
        assert warnings(found, resampled) == []
    assert min(within) >= 7, within


def test_only_runs_that_repeat_enter() -> None:
    runs, fresh = repeated(0.005), planted(0.02)
    both = points(
        *(
            np.concatenate([getattr(of, key) for of in (fresh, runs)])
            for key in ("parameters", "tokens", "loss")
        ),
        unique_tokens=np.concatenate([fresh.tokens, runs.unique_tokens]),  # type: ignore[list-item]
    )
    assert repeating(both).tolist() == [False] * 45 + [True] * 48
    assert fit(both, PLANTED) == fit(runs, PLANTED)


def test_without_excess_parameters_their_worth_is_left_open() -> None:
    runs = repeated(0.002, sizes=(0.2, 0.5, 0.9))
    found = fit(runs, PLANTED)
    assert found.excess == math.inf and found.repeats == pytest.approx(15.4, rel=0.2)
    resampled = bootstrap(runs, found, Law(*np.stack([PLANTED.constants()] * 50).T))
    assert any(line.startswith("R_N* is not fixed") for line in warnings(found, resampled))
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["excess"] is None


def test_few_passes_tell_little() -> None:
    runs = repeated(0.02).select(np.arange(4))  # twice over one data set
    found = fit(runs, PLANTED)
    resampled = bootstrap(runs, found, Law(*np.stack([PLANTED.constants()] * 50).T))
    assert any(
        line.startswith("R_D* is known to no order of magnitude") for line in warnings(found, resampled)
    )


def test_base_laws_without_a_best_size_are_left_out() -> None:
    runs = repeated(0.005)
    constants = np.stack([PLANTED.constants()] * 20)
    constants[3, 4] = -0.1
    resampled = bootstrap(runs, fit(runs, PLANTED), Law(*constants.T))
    assert np.flatnonzero(np.isnan(resampled.repeats)).tolist() == [3]
    with pytest.raises(ValueError, match="the base law has no best size"):
        fit(runs, dataclasses.replace(PLANTED, beta=-0.1))


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (planted(0.005), "and 0 have; the table has no column unique_tokens; add such runs"),
        (
            repeated(0.005).select(np.arange(3)),
            "needs 4 runs or more with fewer unique_tokens than tokens, and 3",
        ),
    ],
)
def test_tables_without_repetition_are_refused(runs: Points, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        fit(runs, PLANTED)
    assert "\n" not in str(error.value)
