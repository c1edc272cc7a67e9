"""The parametric law: planted laws are found again, and published ones."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from launch.scaling import parametric
from launch.scaling.parametric import GRID, NAMES, Law, bootstrap, fit
from launch.scaling.table import Points, points, read
from tests.tiny import ROOT

CHINCHILLA = ROOT.parent / "shared" / "data" / "chinchilla_points.csv"
COLUMNS = {"parameters": "Model Size", "flops": "Training FLOP"}
PLANTED = Law(math.log(478), math.log(2143), math.log(1.8172), 0.3473, 0.3672)


def planted(noise: float, seed: int = 0, budgets: int = 5, sizes: int = 9, law: Law = PLANTED) -> Points:
    """An IsoFLOP grid around the best sizes, within a factor of 4."""
    flops = np.repeat(np.geomspace(1e18, 3e20, budgets), sizes)
    n = law.optimum(flops)[0] * np.tile(np.geomspace(0.25, 4, sizes), budgets)
    d = flops / 6 / n
    scatter = np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))
    return points(n, d, law.loss(n, d) * scatter)


@pytest.fixture(scope="module")
def published() -> Points:
    if not CHINCHILLA.exists():
        pytest.skip(f"{CHINCHILLA} is not there")
    return read(CHINCHILLA, COLUMNS)


@pytest.mark.parametrize(
    "law",
    [
        PLANTED,
        Law(math.log(20), math.log(400), math.log(0.5), 0.12, 0.31),
        Law(math.log(1e5), math.log(3e3), math.log(2.5), 0.7, 0.4),
    ],
)
def test_a_planted_law_is_found_again(law: Law) -> None:
    found = fit(planted(0, law=law), grid=False)
    assert found.constants() == pytest.approx(law.constants(), rel=1e-5)
    assert found.objective < 1e-15 and found.linear_reached > 1
    assert (found.starts, found.reached, found.runs) == (0, 0, 45)


def test_the_published_fit(published: Points, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parametric, "GRID", GRID[::18])
    calls: list[tuple[int, int]] = []
    kept = published.without_highest(5)
    found = fit(kept, progress=lambda done, of: calls.append((done, of)))
    assert len(kept) == found.runs == 240
    assert found.objective <= 0.0010182740179  # a sum over runs
    assert np.exp(found.constants()[:2]) == pytest.approx([477.83, 2143.42], rel=1e-4)
    assert (found.E, found.alpha, found.beta) == pytest.approx((1.81722, 0.34731, 0.36717), abs=1e-5)
    assert found.a == pytest.approx(0.51390, abs=1e-5)
    assert found.starts == 250 and 20 < found.reached < 125  # most starts miss it
    assert calls == [(100, 250), (200, 250)]
    assert found.residuals(kept) == pytest.approx(
        np.log(kept.loss / found.loss(kept.parameters, kept.tokens))
    )
    assert np.abs(found.residuals(kept)).mean() < 0.006


def test_the_published_intervals(published: Points) -> None:
    """Besiroglu et al. 2024, whose own are of other draws."""
    kept = published.without_highest(5)
    ends = bootstrap(kept, fit(kept, grid=False), 1000).intervals()
    assert ends["E"] == pytest.approx((1.770, 1.868), abs=0.01)
    assert ends["alpha"] == pytest.approx((0.319, 0.371), abs=0.005)
    assert ends["beta"] == pytest.approx((0.326, 0.417), abs=0.01)
    assert ends["a"] == pytest.approx((0.480, 0.556), abs=0.005)


def test_five_runs_change_the_published_fit(published: Points) -> None:
    found = fit(published, grid=False)
    assert found.runs == 245
    assert (found.E, found.alpha, found.beta) == pytest.approx((1.8913, 0.3493, 0.4530), abs=1e-4)


def test_the_best_point_of_a_budget() -> None:
    flops, per = 1e21, 8.0
    n, d, loss = PLANTED.optimum(flops, per)
    assert n * d * per == pytest.approx(flops)
    sizes = n * np.geomspace(0.1, 10, 4001)
    along = PLANTED.loss(sizes, flops / per / sizes)
    assert sizes[along.argmin()] == pytest.approx(n, rel=2e-3) and loss == pytest.approx(along.min())
    assert PLANTED.tokens_for(n) == pytest.approx(d) and PLANTED.parameters_for(d) == pytest.approx(n)
    growth = np.log(PLANTED.optimum(1e22)[0] / PLANTED.optimum(1e21)[0]) / np.log(10)
    assert growth == pytest.approx(PLANTED.a) and PLANTED.a + PLANTED.b == pytest.approx(1)


def test_no_best_point_without_trends() -> None:
    rising = Law(*np.array([[1.0, 1.0], [1, 1], [0, 0], [0.3, -0.1], [0.3, 0.3]]))
    best = rising.optimum(1e20)
    assert np.isfinite([part[0] for part in best]).all() and np.isnan([part[1] for part in best]).all()


def test_losses_of_resampled_constants() -> None:
    law = Law(*np.stack([PLANTED.constants()] * 3).T)
    assert law.loss(1e9, 1e11) == pytest.approx([PLANTED.loss(1e9, 1e11)] * 3)
    assert PLANTED.loss(1e9, 1e11) == pytest.approx(1.8172 + 478 / 1e9**0.3473 + 2143 / 1e11**0.3672)


def test_resampling_is_by_its_seed_and_reports_progress() -> None:
    runs = planted(0.005)
    found = fit(runs, grid=False)
    calls: list[tuple[int, int]] = []
    first = bootstrap(runs, found, 250, seed=1, progress=lambda *done: calls.append(done))
    assert calls == [(100, 250), (200, 250), (250, 250)]
    assert first.constants().shape == (250, 5)
    assert np.array_equal(first.constants(), bootstrap(runs, found, 250, seed=1).constants())
    assert not np.array_equal(first.constants(), bootstrap(runs, found, 250, seed=2).constants())


def test_a_resample_is_fitted_as_its_runs_would_be() -> None:
    runs = planted(0.005)
    found = fit(runs, grid=False)
    resampled = bootstrap(runs, found, 5, seed=3).constants()
    drawn = parametric.counts(len(runs), 5, 3, parametric.usable(runs)).astype(int)
    for constants, times in zip(resampled, drawn, strict=True):
        own = fit(runs.select(np.repeat(np.arange(len(runs)), times)), grid=False)
        assert constants == pytest.approx(own.constants(), rel=1e-5)


def test_planted_constants_lie_in_their_intervals() -> None:
    """Of 95 % intervals, the benchmark counts more and takes longer."""
    within, widths = dict.fromkeys((*NAMES, "a"), 0), []
    for seed in range(20):
        runs = planted(0.005, seed)
        ends = bootstrap(runs, fit(runs, grid=False), 100, seed).intervals()
        widths.append(ends["a"][1] - ends["a"][0])
        for name in within:
            within[name] += ends[name][0] <= getattr(PLANTED, name) <= ends[name][1]
    assert min(within.values()) >= 17, within
    assert 0.02 < np.median(widths) < 0.1


def test_intervals_where_constants_are_too_large_for_a_float() -> None:
    other = np.ones(1001)
    law = Law(1000 * other, np.linspace(1, 2, 1001), other, other, other)
    assert law.intervals()["A"] == (math.inf, math.inf)
    assert law.intervals()["B"] == pytest.approx((np.exp(1.025), np.exp(1.975)))


def test_a_fit_for_json() -> None:
    written = json.loads(json.dumps(fit(planted(0.005), grid=False).as_json(), allow_nan=False))
    assert {*NAMES, "a", "b", "objective", "runs", "starts", "reached"} <= written.keys()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (slice(0, 6), "needs 7 runs or more and the table has 6"),
        ("sizes", "needs runs of 3 different numbers of parameters or more"),
        ("tokens", "needs runs of 3 different numbers of tokens or more"),
    ],
)
def test_tables_that_fix_no_law_are_refused(chosen: slice | str, message: str) -> None:
    runs = planted(0.005)
    n, d, loss = runs.parameters, runs.tokens, runs.loss
    if isinstance(chosen, slice):
        runs = runs.select(np.arange(45)[chosen])
    elif chosen == "sizes":
        runs = points(np.tile([1e8, 2e8, 1e8], 15), d, loss)
    else:
        runs = points(n, np.full(45, 1e10), loss)
    with pytest.raises(ValueError, match=message) as error:
        fit(runs)
    assert "\n" not in str(error.value)
