"""The judgement by a budget that the laws have not seen."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from launch.bench_scaling import Design
from launch.scaling.judgement import Judgement, Prediction, judge
from launch.scaling.power import Estimate
from launch.scaling.table import Points


def study(design: Design, seed: int = 0) -> Points:
    """Without the run beyond the largest budget."""
    drawn = design.drawn(np.random.default_rng(seed))
    return drawn.select(np.arange(len(drawn) - 1))


def of(judged: Judgement, law: str, quantity: str = "loss") -> list[Prediction]:
    return [one for one in judged.predictions if (one.law, one.of) == (law, quantity)]


def test_the_largest_budget_is_held_out_and_predicted() -> None:
    design = Design(budgets=4)
    runs = study(design)
    judged = judge(runs, resamples=200)
    largest = runs.budget.max()
    assert judged.budget == largest and len(judged.fits.points) == 15 and judged.times == pytest.approx(4)
    by_run = of(judged, "parametric")
    assert [one.measured for one in by_run] == runs.loss[runs.budget == largest].tolist()
    assert all(abs(one.error) < 0.005 for one in by_run)
    for law in ("IsoFLOP, parabola", "IsoFLOP, akima"):
        (loss,), (size,) = of(judged, law), of(judged, law, "parameters")
        best = design.best(largest)
        assert loss.measured == pytest.approx(design.loss(best, largest / 6 / best), rel=2e-3)
        assert abs(loss.error) < 0.01
        assert size.measured == pytest.approx(best, rel=0.15) and abs(size.error) < 0.25
    assert [judged.headline] == of(judged, "IsoFLOP, parabola")
    rest = tuple(of(judged, "IsoFLOP, akima") + by_run)
    without = dataclasses.replace(judged, predictions=rest)
    assert without.headline == min(by_run, key=lambda one: one.predicted.value)
    assert dataclasses.replace(judged, predictions=()).headline is None
    two = judge(runs.select(runs.budget > runs.budget.min() * 3), resamples=200)  # of which two are fitted
    assert two.fits.isoflops["parabola"].floored is None
    assert two.headline == min(of(two, "parametric"), key=lambda one: one.predicted.value)
    assert judged.notes == ()
    json.dumps(judged.as_json(), allow_nan=False)


def test_the_held_out_runs_are_not_seen() -> None:
    runs = study(Design(budgets=4))
    held = runs.budget == runs.budget.max()
    worse = dataclasses.replace(runs, loss=np.where(held, runs.loss * 1.1, runs.loss))
    before, after = judge(runs, resamples=100), judge(worse, resamples=100)
    for one, other in zip(before.predictions, after.predictions, strict=True):
        assert one.predicted.value == pytest.approx(other.predicted.value)
        if one.of == "loss":
            assert other.error == pytest.approx((1 + one.error) / 1.1 - 1, rel=1e-6)
            assert other.inside is False


def test_intervals_hold_what_is_measured() -> None:
    inside: dict[tuple[str, str], list[bool | None]] = {}
    for seed in range(16):
        for one in judge(study(Design(budgets=4), seed), resamples=100, seed=seed).predictions:
            inside.setdefault((one.law, one.of), []).append(one.inside)
    assert len(inside) == 5
    for held in inside.values():
        assert np.mean([bool(one) for one in held]) >= 14 / 16


def test_a_named_budget() -> None:
    runs = study(Design(budgets=4))
    named = float(np.unique(runs.budget)[1])
    assert judge(runs, named, resamples=100).budget == named
    with pytest.raises(ValueError, match="no runs have the budget 5e\\+17; name one of 1e\\+17, 4e\\+17"):
        judge(runs, 5e17)


def test_one_held_out_run_stands_for_its_budget() -> None:
    runs = Design(budgets=3).drawn(np.random.default_rng(0))
    judged = judge(runs, resamples=200)
    assert judged.headline is not None and judged.headline.run == runs.names[-1]
    assert judged.headline.inside
    (loss,) = of(judged, "IsoFLOP, parabola")
    assert loss.run == runs.names[-1] and loss.inside
    assert not of(judged, "IsoFLOP, parabola", "parameters")
    assert any("does not bracket its minimum" in note for note in judged.notes)


def test_laws_that_cannot_be_fitted_are_said() -> None:
    runs = study(Design(budgets=3, sizes=4))
    judged = judge(runs, resamples=100)
    assert any(note.startswith("no IsoFLOP law by akima") for note in judged.notes)
    assert "akima" not in judged.fits.isoflops and not of(judged, "IsoFLOP, akima")
    first = runs.select(runs.budget == runs.budget[0])
    with pytest.raises(ValueError, match="the table has 1 budget; it needs one to fit and one to hold out"):
        judge(first)


def test_error_and_interval_of_a_prediction() -> None:
    one = Prediction("law", "loss", "a", 1e18, 2.0, Estimate(2.1, 1.9, 2.05))
    assert one.error == pytest.approx(0.05) and one.inside
    assert Prediction("law", "loss", "a", 1e18, 2.0, Estimate(2.1)).inside is None
