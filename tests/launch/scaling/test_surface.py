"""The smooth surface that runs with new noise are drawn from."""

from __future__ import annotations

import numpy as np
import pytest

from launch.bench_scaling import UNEVEN, Design
from launch.scaling.surface import through
from launch.scaling.table import points


@pytest.mark.parametrize("design", [Design(noise=0.0), Design(noise=0.0, **UNEVEN)])  # type: ignore[arg-type]
def test_without_noise_it_is_the_planted_one(design: Design) -> None:
    surface = through(design.drawn(np.random.default_rng(0)))
    n, d = np.array([1e8, 4e8]), np.array([5e8, 9e9])
    assert surface.loss(n, d) == pytest.approx(design.loss(n, d), rel=1e-5)
    assert surface.spread < 1e-7


def test_the_spread_is_that_of_the_noise() -> None:
    found = [through(Design(noise=2e-3).drawn(np.random.default_rng(seed))).spread for seed in range(40)]
    assert np.sqrt(np.mean(np.square(found))) == pytest.approx(2e-3, rel=0.1)


def test_what_is_drawn_scatters_more_the_less_the_spread_is_known() -> None:
    study = Design(noise=2e-3).drawn(np.random.default_rng(0))
    surface = through(study)
    drawn = np.log(surface.drawn(study, 4000, np.random.default_rng(0)))
    off = drawn - np.log(surface.loss(study.parameters, study.tokens))[:, None]
    freedom = len(study) - 5
    assert surface.freedom == freedom
    assert off.mean() == pytest.approx(0, abs=1e-9)
    assert off.std() == pytest.approx(surface.spread * np.sqrt(freedom / (freedom - 2)), rel=0.02)


def test_runs_that_cannot_carry_one() -> None:
    with pytest.raises(ValueError, match="needs 6 runs or more"):
        through(Design().drawn(np.random.default_rng(0)).select(range(5)))
    rising = np.geomspace(1e6, 1e8, 8)
    with pytest.raises(ValueError, match="falls with both N and D"):
        through(points(rising, 20 * rising[::-1] ** 1.5, 2 + np.log(rising) ** 2, budget=np.ones(8)))
