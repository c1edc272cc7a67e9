"""Power laws of compute: the lines, the law with a floor, and what intervals are made of."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from launch.scaling.power import Estimate, LossLaw, estimate, floored, line, loss_law, power_law

FLOPS = np.geomspace(1e15, 1e18, 5)


def test_a_power_law_goes_through_its_points() -> None:
    law = power_law(FLOPS, 0.3 * FLOPS**0.45)
    assert law.exponent == Estimate(pytest.approx(0.45), None, None)
    assert law.coefficient == pytest.approx(0.3)
    assert law.at(1e21).value == pytest.approx(0.3 * 1e21**0.45)
    json.dumps(law.as_json(), allow_nan=False)


def test_lines_are_those_of_least_squares_through_the_points_that_count() -> None:
    random = np.random.default_rng(0)
    logs, there = random.normal(size=(5, 30)), random.random((5, 30)) < 0.7
    there[:2] = True
    for index, (level, slope) in enumerate(line(FLOPS, logs, there)):
        used = there[:, index]
        places = np.log(FLOPS) - np.log(FLOPS).mean()
        expected = np.polyfit(places[used], logs[used, index], 1)
        assert [slope, level] == pytest.approx(expected)


def test_an_interval_is_the_estimate_less_its_errors() -> None:
    errors = np.linspace(-1, 3, 4001)  # of a method that is 1 too high
    found = estimate(5.0, errors)
    assert (found.low, found.high) == pytest.approx((5 - 2.9, 5 + 0.9))
    law = power_law(FLOPS, FLOPS**0.5, np.stack([0 * errors, errors], axis=1))
    assert law.bias == pytest.approx(1.0)
    assert (law.exponent.low, law.exponent.high) == pytest.approx((0.5 - 2.9, 0.5 + 0.9))
    assert law.at(math.exp(law.pivot)).low == pytest.approx(law.at(math.exp(law.pivot)).value)


def test_noise_of_a_measurement_widens_an_interval() -> None:
    random = np.random.default_rng(0)
    alone = estimate(0.0, random.normal(size=20_000))
    both = estimate(0.0, random.normal(size=20_000), random.normal(size=500))
    assert alone.low is not None and both.low is not None
    assert both.low / alone.low == pytest.approx(math.sqrt(2), rel=0.05)


@pytest.mark.parametrize("budgets", [3, 7])
@pytest.mark.parametrize("constants", [(1.7, 0.15), (0.4, 0.05), (2.5, 0.6)])
def test_a_planted_floor_is_found(budgets: int, constants: tuple[float, float]) -> None:
    floor, decay = constants
    flops = np.geomspace(1e15, 1e19, budgets)
    law = loss_law(flops, floor + 1.3 * (flops / 1e17) ** -decay)
    assert law.floor.value == pytest.approx(floor, abs=1e-4)
    assert law.exponent.value == pytest.approx(decay, rel=1e-4)
    assert law.coefficient.value == pytest.approx(1.3 * 1e17**decay, rel=5e-3)
    assert law.at(1e21).value == pytest.approx(floor + 1.3 * 1e4**-decay, rel=1e-4)
    assert law.note is None
    json.dumps(law.as_json(), allow_nan=False)


def test_only_losses_that_are_there_count() -> None:
    flops = np.geomspace(1e15, 1e19, 5)
    losses = (1.7 + (flops / 1e17) ** -0.2)[:, None]
    there = np.array([True, True, False, True, True])[:, None]
    wrong = np.where(there, losses, 99.0)
    assert floored(flops, wrong, there)[0] == pytest.approx(floored(flops, losses)[0], rel=1e-3)


def test_a_floor_that_is_not_fixed_is_said() -> None:
    assert "do not fix the floor" in str(loss_law(FLOPS, 3 * FLOPS**-0.05 - 0.1).note)
    straight = LossLaw(np.array([1.0, 1.0, 0.1]), 0.0, np.array([[1.0, 1.0, 0.1], [2.5, 1.0, 0.1]]))
    assert "do not fix the floor" in str(straight.note)


def test_losses_that_rise_have_no_law_that_falls() -> None:
    assert loss_law(FLOPS, FLOPS**0.01).own[1] == 0.0


def test_too_few_budgets() -> None:
    with pytest.raises(ValueError, match="2 or more budgets and there are 1"):
        power_law(FLOPS[[0, 0]], np.ones(2))
    with pytest.raises(ValueError, match="3 or more budgets and there are 2"):
        loss_law(FLOPS[[0, 0, 1]], np.ones(3))
