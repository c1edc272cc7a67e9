"""Schedules are functions of the step."""

from __future__ import annotations

import math

import pytest

from train.optim.schedules import Cosine, Linear, Schedule

KINDS = [Cosine, Linear]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("warmup", "total"), [(10, 100), (0.1, 100), (1, 7), (0, 5), (0.02, 400), (100, 2000)]
)
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_up_to_the_peak_and_down_to_the_end(
    kind: type[Schedule], warmup: float, total: int, final: float
) -> None:
    schedule = kind(warmup, final)
    values = [schedule(step, total) for step in range(total)]
    peak = round(warmup if warmup >= 1 else warmup * total)
    assert values[peak] == 1 == max(values)
    assert values[-1] == final
    assert all(value > 0 for value in values[:peak])  # no step of the warm-up is wasted
    assert all(a < b for a, b in zip(values[:peak], values[1:], strict=False))
    assert all(a >= b for a, b in zip(values[peak:], values[peak + 1 :], strict=False))
    assert values == [schedule(step, total) for step in range(total)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_is_that_many_steps(kind: type[Schedule]) -> None:
    assert [kind(0.25, 0.1)(step, 40) for step in range(40)] == [
        kind(10, 0.1)(step, 40) for step in range(40)
    ]


def test_warm_up_is_a_straight_line() -> None:
    values = [Cosine(warmup=4)(step, 100) for step in range(5)]
    assert values == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_the_shapes_half_way_and_a_quarter_way_down() -> None:
    # warm-up 1, then 100 steps down to 0: steps 26 and 51 are a quarter and half of the way
    assert Linear(1, 0.0)(51, 102) == pytest.approx(0.5)
    assert Linear(1, 0.0)(26, 102) == pytest.approx(0.75)
    assert Cosine(1, 0.0)(51, 102) == pytest.approx(0.5)
    assert Cosine(1, 0.0)(26, 102) == pytest.approx(0.5 + math.sqrt(0.5) / 2)
    assert Cosine(1, 0.2)(51, 102) == pytest.approx(0.6)


@pytest.mark.parametrize("kind", KINDS)
def test_beyond_the_horizon_and_short_horizons(kind: type[Schedule]) -> None:
    assert kind(1, 0.1)(1000, 10) == 0.1
    assert kind(100, 0.1)(5, 10) == pytest.approx(6 / 101)  # the horizon ends within the warm-up
    assert 0 < kind(0.02, 0.1)(0, 1) <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": -1}, "schedule.warmup: -1 is negative; give"),
        ({"final": 1.5}, "schedule.final: 1.5 is not between"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Cosine(**settings)
