"""IsoFLOP minima and the power laws through them: planted laws are found, what is not bracketed is said."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from scipy.interpolate import Akima1DInterpolator

from launch.bench_scaling import UNEVEN, Design
from launch.scaling.isoflop import fit
from launch.scaling.minima import SIZES
from launch.scaling.table import Points, points

BUDGETS = np.array([1e16, 4e16, 16e16])
OFFSETS = np.linspace(-1.4, 1.4, 5)


def study(design: Design, seed: int = 0) -> Points:
    """Without the run beyond the largest budget."""
    drawn = design.drawn(np.random.default_rng(seed))
    return drawn.select(np.arange(len(drawn) - 1))


def valleys(
    best: np.ndarray, losses: np.ndarray, budgets: np.ndarray = BUDGETS, offsets: np.ndarray = OFFSETS
) -> Points:
    """Exact parabolas in log N with these vertices, through sizes that lie unevenly about them."""
    sizes = np.exp(np.log(best)[:, None] + offsets + 0.3)
    loss = losses[:, None] + 0.08 * (offsets + 0.3) ** 2
    flops = np.broadcast_to(budgets[:, None], sizes.shape).ravel()
    return points(sizes.ravel(), flops / 6 / sizes.ravel(), loss.ravel(), budget=flops)


def test_the_vertex_of_a_parabola_is_exact() -> None:
    best, losses = 0.2 * BUDGETS**0.45, 20 * BUDGETS**-0.05
    found = fit(valleys(best, losses))
    assert [one.parameters for one in found.minima] == pytest.approx(best)
    assert [one.tokens for one in found.minima] == pytest.approx(BUDGETS / 6 / best)
    assert [one.loss for one in found.minima] == pytest.approx(losses)
    assert all(one.bracketed and one.sizes == 5 for one in found.minima)
    assert found.parameters.exponent.value == pytest.approx(0.45)
    assert found.parameters.coefficient == pytest.approx(0.2)
    assert found.tokens.exponent.value == pytest.approx(0.55)
    assert found.loss.exponent.value == pytest.approx(-0.05)
    assert found.parameters.at(1e20).value == pytest.approx(0.2 * 1e20**0.45)


def test_the_lowest_point_of_an_akima_interpolation() -> None:
    runs = study(Design(noise=2e-3))
    for budget, own in runs.isoflops():
        fine = np.linspace(*np.log(own.parameters[[0, -1]]), 200_001)
        values = Akima1DInterpolator(np.log(own.parameters), own.loss)(fine)
        one = next(one for one in fit(runs, "akima").minima if one.budget == budget)
        assert np.log(one.parameters) == pytest.approx(fine[np.argmin(values)], abs=1e-3)
        assert one.loss == pytest.approx(values.min(), abs=1e-7)


def test_runs_of_one_size_count_as_their_mean() -> None:
    once = study(Design(noise=0.0))
    twice = once.select([*range(len(once)), *range(len(once))])
    shifts = np.repeat([4e-3, -4e-3], len(once))
    twice = dataclasses.replace(twice, loss=twice.loss + shifts)
    for method in SIZES:
        found = [[one.parameters for one in fit(runs, method).minima] for runs in (once, twice)]
        assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("method", SIZES)
@pytest.mark.parametrize("design", [Design(), Design(middle=(1.0, 0.4), **UNEVEN)])  # type: ignore[arg-type]
def test_planted_exponents_lie_in_their_intervals(method: str, design: Design) -> None:
    held, half = 0, []
    for seed in range(100):
        found = fit(study(design, seed), method, draws=1000, seed=seed).parameters.exponent
        assert found.low is not None and found.high is not None
        held += found.low <= design.exponent <= found.high
        half.append((found.high - found.low) / 2)
    assert held >= 93
    assert np.median(half) < (0.015 if method == "parabola" else 0.06)  # nor are they large


def test_the_parabolas_own_error_is_in_the_interval_and_is_said() -> None:
    design = Design(middle=(1.0, 0.4), noise=2e-4, **UNEVEN)  # type: ignore[arg-type]
    law = fit(study(design)).parameters
    found = law.exponent
    assert found.value < design.exponent - 0.04
    assert law.bias == pytest.approx(found.value - design.exponent, abs=0.01)
    assert found.low is not None and found.high is not None
    assert found.value < found.low < design.exponent < found.high


def test_more_seeds_shorten_the_interval() -> None:
    def half(design: Design) -> float:
        found = [fit(study(design, seed)).parameters.exponent for seed in range(5)]
        return float(np.mean([one.high - one.low for one in found if one.low is not None and one.high]))

    assert half(Design(seeds=4)) < 0.65 * half(Design())


def test_tokens_follow_from_what_a_token_costs() -> None:
    best, cost = 0.2 * BUDGETS**0.45, 6.0 * 1.5
    runs = valleys(best, 20 * BUDGETS**-0.05)
    dearer = dataclasses.replace(runs, tokens=runs.flops / cost / runs.parameters**1.02)
    found = [one.tokens for one in fit(dearer).minima]
    assert found == pytest.approx(BUDGETS / cost / best**1.02)


def changed(runs: Points, budget: int, loss: list[float]) -> Points:
    """With other losses at one of the budgets."""
    losses = runs.loss.copy()
    losses[runs.budget == BUDGETS[budget]] = loss
    return dataclasses.replace(runs, loss=losses)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        ([3.0, 3.1, 3.2, 3.3, 3.4], "the smallest size.*has the lowest loss; add smaller ones"),
        ([3.4, 3.3, 3.2, 3.1, 3.0], "the largest size.*has the lowest loss; add larger ones"),
        ([3.0, 2.9, 3.4, 3.0, 2.95], "the parabola opens downward"),
        ([3.0, 2.99, 3.3, 3.6, 3.9], "the lowest point of a parabola is not between the sizes"),
    ],
)
def test_a_minimum_that_is_not_bracketed_is_said_and_not_used(loss: list[float], reason: str) -> None:
    budgets = np.append(BUDGETS, 64e16)
    runs = valleys(0.2 * budgets**0.45, 20 * budgets**-0.05, budgets)
    found = fit(changed(runs, 1, loss))
    lacking = found.minima[1]
    assert not lacking.bracketed and np.isnan([lacking.parameters, lacking.tokens, lacking.loss]).all()
    assert found.parameters.exponent.value == pytest.approx(0.45)
    assert [one.bracketed for one in found.minima] == [True, False, True, True]
    assert re.search(reason, str(lacking.reason))
    assert "1 of 4 budgets do not bracket their minimum and are not used: 4e+16 FLOP" in found.notes[0]
    saved = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert saved["minima"][1]["parameters"] is None and not saved["minima"][1]["bracketed"]


def test_nothing_is_extrapolated_from_one_minimum() -> None:
    runs = valleys(0.2 * BUDGETS**0.45, 20 * BUDGETS**-0.05)
    for budget, loss in ((0, [3.0, 3.1, 3.2, 3.3, 3.4]), (2, [3.4, 3.3, 3.2, 3.1, 3.0])):
        runs = changed(runs, budget, loss)
    with pytest.raises(ValueError, match="needs 2 or more bracketed minima; 2 of 3 budgets.*smaller.*larger"):
        fit(runs)


def test_two_budgets_are_fitted_with_a_warning() -> None:
    found = fit(valleys(0.2 * BUDGETS[:2] ** 0.45, 20 * BUDGETS[:2] ** -0.05, BUDGETS[:2]))
    assert found.parameters.exponent.value == pytest.approx(0.45)
    assert found.floored is None
    assert "two budgets fix a power law, but nothing shows whether it is one" in found.notes


@pytest.mark.parametrize(("method", "needed"), SIZES.items())
def test_too_few_sizes(method: str, needed: int) -> None:
    runs = study(Design(budgets=4))
    first = np.flatnonzero(runs.budget == runs.budget[0])
    fewer = runs.select(np.delete(np.arange(len(runs)), first[needed - 1 :]))
    found = fit(fewer, method)
    assert found.minima[0].reason == (
        f"it has {needed - 1} different sizes and"
        f" {'a parabola' if method == 'parabola' else 'an Akima interpolation'} needs {needed}; add sizes"
    )
    assert f"1 of 4 budgets have fewer than the {needed} sizes" in found.notes[0]


def test_equal_sizes() -> None:
    runs = study(Design(budgets=3))
    same = dataclasses.replace(runs, parameters=np.where(runs.budget == runs.budget[0], 1e8, runs.parameters))
    assert fit(same).minima[0].reason == "all runs have the same size and a parabola needs 3; add sizes"
    with pytest.raises(ValueError, match="3 of 3 budgets have fewer than the 3 sizes that a parabola needs"):
        fit(dataclasses.replace(runs, parameters=np.full(len(runs), 1e8)))


def test_diverged_runs_are_left_out_and_named() -> None:
    runs = study(Design(sizes=6))
    lost = dataclasses.replace(runs, loss=np.where(np.arange(len(runs)) == 2, np.nan, runs.loss))
    found = fit(lost)
    assert "left out, they diverged: 3" in found.notes
    assert found.minima[0].sizes == 5


def test_minima_that_noise_takes_away_are_remarked_on() -> None:
    noisy = [fit(study(Design(noise=0.03, budgets=5), seed)) for seed in range(3)]
    assert all(one.lost is not None and one.lost > 0.05 for one in noisy)
    assert all(any("not bracketed any more" in note for note in one.notes) for one in noisy)


def test_an_unknown_method() -> None:
    with pytest.raises(ValueError, match="method: 'spline' is none of parabola, akima"):
        fit(study(Design()), "spline")


@pytest.mark.parametrize("seed", [2, 4, 5])
def test_of_six_runs_too_all_figures_are_numbers(seed: int) -> None:
    """One degree of freedom: resamples scatter beyond all bounds."""
    runs = study(Design(budgets=3, sizes=3), seed)
    found = fit(runs.select(runs.budget > runs.budget.min()))
    json.dumps(found.as_json(), allow_nan=False)
    assert found.loss.exponent.known and found.lost is not None and found.lost > 0
