"""Schedules are functions of the step: torch's where it has them, the papers' formulas elsewhere."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    PolynomialLR,
)

from data.cli import instantiate
from tests.tiny import ROOT
from train.optim.schedules import (
    Constant,
    Cosine,
    CosineRestarts,
    Cyclical,
    Decay,
    InverseSqrt,
    Linear,
    OneCycle,
    Polynomial,
    Schedule,
    WarmupStableDecay,
)

CONF = ROOT / "conf" / "schedule"
CHOICES = sorted(path.stem for path in CONF.glob("*.yaml"))
DECAYS = [Cosine, Linear, Polynomial, WarmupStableDecay]
WARMED = [*DECAYS, Constant, InverseSqrt, CosineRestarts]  # by a straight line


def chosen(choice: str, **settings: Any) -> Schedule:
    """The schedule of a YAML below conf/schedule, with other settings, as a run makes it."""
    return instantiate({**yaml.safe_load((CONF / f"{choice}.yaml").read_text()), **settings}, "schedule")


def values(schedule: Schedule, total: int) -> list[float]:
    return [schedule(step, total) for step in range(total)]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("total", [1, 2, 3, 7, 100, 1000])
def test_every_step_has_a_multiplier_and_so_has_any_beyond(choice: str, total: int) -> None:
    schedule = chosen(choice)
    found = [schedule(step, total) for step in [*range(2 * total), 10**6]]
    assert all(0 <= value <= 1 for value in found)
    assert any(value > 0 for value in found[:total])


@pytest.mark.parametrize("choice", CHOICES)
def test_a_resumed_run_has_the_multipliers_of_an_unbroken_one(choice: str) -> None:
    whole = values(chosen(choice), 300)
    resumed = chosen(choice)
    assert [resumed(step, 300) for step in range(150, 300)] == whole[150:]
    steps = random.Random(0).sample(range(300), 300)
    assert [resumed(step, 300) for step in steps] == [whole[step] for step in steps]


@pytest.mark.parametrize("choice", CHOICES)
def test_there_are_no_jumps_but_restarts(choice: str) -> None:
    def changes(total: int) -> list[float]:
        found = values(chosen(choice), total)
        return [abs(b - a) for a, b in zip(found, found[1:], strict=False)]

    coarse, fine = (sorted(changes(total)) for total in (1_000, 16_000))
    if choice == "cosine-restarts":
        assert coarse[-2:] == pytest.approx([1, 1], abs=1e-3)
        coarse, fine = coarse[:-2], fine[:-2]
    # In steps a sixteenth as long a slope is a sixteenth as high, and a root, where it begins, a fourth.
    assert fine[-1] < 0.26 * coarse[-1] < 0.1


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize(
    ("warmup", "total"), [(10, 100), (0.1, 100), (1, 7), (0, 5), (0.02, 400), (100, 2000)]
)
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_up_to_the_peak_and_down_to_the_end(
    kind: type[Decay], warmup: float, total: int, final: float
) -> None:
    found = values(kind(warmup=warmup, final=final), total)
    peak = round(warmup if warmup >= 1 else warmup * total)
    assert found[peak] == 1 == max(found)
    assert found[-1] == final
    assert all(a >= b for a, b in zip(found[peak:], found[peak + 1 :], strict=False))


@pytest.mark.parametrize("kind", WARMED)
def test_warm_up_is_a_straight_line_of_which_no_step_is_wasted(kind: type[Schedule]) -> None:
    assert values(kind(warmup=4), 100)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    theirs = rates(lambda optimizer: LinearLR(optimizer, 1 / 8, total_iters=7), 8)
    assert values(kind(warmup=7), 100)[:8] == pytest.approx(theirs)


@pytest.mark.parametrize(
    ("kind", "shares", "steps"),
    [
        *((kind, {"warmup": 0.25}, {"warmup": 10}) for kind in WARMED),
        (WarmupStableDecay, {"decay": 0.5}, {"decay": 20}),
        (OneCycle, {"warmup": 0.5, "three_phase": True}, {"warmup": 20, "three_phase": True}),
        (Cyclical, {"warmup": 0.125, "decay": 0.25}, {"warmup": 5, "decay": 10}),
        (CosineRestarts, {"period": 0.25}, {"period": 10}),
    ],
)
def test_a_share_is_that_many_steps(
    kind: type[Schedule], shares: dict[str, Any], steps: dict[str, Any]
) -> None:
    assert values(kind(**shares), 40) == values(kind(**steps), 40)


def rates(scheduler: Callable[[SGD], LRScheduler], steps: int) -> list[float]:
    """The learning rates of a scheduler of torch over a peak of 1."""
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    made, found = scheduler(optimizer), []
    for _ in range(steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        made.step()
    return found


@pytest.mark.parametrize("warmup", [0, 11])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda w: Constant(w), lambda o, last: LinearLR(o, 1.0)),
        (lambda w: Linear(w, 0.2), lambda o, last: LinearLR(o, 1.0, 0.2, last)),
        (lambda w: Cosine(w, 0.1), lambda o, last: CosineAnnealingLR(o, last, 0.1)),
        (lambda w: Polynomial(w, power=0.9), lambda o, last: PolynomialLR(o, last, 0.9)),
        (lambda w: Polynomial(w, power=3), lambda o, last: PolynomialLR(o, last, 3)),
        (lambda w: CosineRestarts(w, 30, 1), lambda o, last: CosineAnnealingWarmRestarts(o, 30)),
        (
            lambda w: CosineRestarts(w, 17, 2, 0.05),
            lambda o, last: CosineAnnealingWarmRestarts(o, 17, 2, 0.05),
        ),
    ],
)
def test_after_the_warm_up_it_is_torchs(
    ours: Callable[[int], Schedule],
    theirs: Callable[[SGD, int], LRScheduler],
    warmup: int,
) -> None:
    total = 240
    expected = rates(lambda optimizer: theirs(optimizer, total - 1 - warmup), total - warmup)
    assert values(ours(warmup), total)[warmup:] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize(("shape", "strategy"), [("cosine", "cos"), ("linear", "linear")])
def test_one_cycle_is_torchs(shape: Any, strategy: Any, three_phase: bool) -> None:
    total, warmup, initial, final = 200, 59, 0.1, 1e-3
    expected = rates(
        lambda optimizer: OneCycleLR(
            optimizer,
            max_lr=1.0,
            total_steps=total,
            pct_start=(warmup + 1) / total,  # which counts the step at the peak
            anneal_strategy=strategy,
            cycle_momentum=False,
            div_factor=1 / initial,
            final_div_factor=initial / final,
            three_phase=three_phase,
        ),
        total - 1,
    )
    found = values(OneCycle(warmup, initial, final, shape, three_phase), total)
    assert found == pytest.approx([*expected, final], abs=1e-9)


@pytest.mark.parametrize(("shrink", "mode"), [(1.0, "triangular"), (0.5, "triangular2")])
@pytest.mark.parametrize(("up", "down"), [(20, 20), (8, 25)])
def test_cyclical_is_torchs(shrink: float, mode: Any, up: int, down: int) -> None:
    expected = rates(
        lambda optimizer: CyclicLR(optimizer, 0.25, 1.0, up, down, mode, cycle_momentum=False), 150
    )
    assert values(Cyclical(up, down, 0.25, shrink), 150) == pytest.approx(expected, abs=1e-9)


def test_inverse_sqrt_is_the_papers() -> None:
    def paper(n: int, width: int = 512, warmup_steps: int = 40) -> float:
        return width**-0.5 * min(n**-0.5, n * warmup_steps**-1.5)

    highest = paper(40)
    expected = [paper(n) / highest for n in range(1, 301)]
    assert values(InverseSqrt(39), 300) == pytest.approx(expected)
    assert [InverseSqrt(39)(step, 10**9) for step in range(300)] == values(InverseSqrt(39), 300)


@pytest.mark.parametrize(
    ("shape", "decayed"),
    [
        ("sqrt", lambda n, N, D: 1 - math.sqrt((n - (N - D)) / D)),
        ("linear", lambda n, N, D: (N - n) / D),
        ("cosine", lambda n, N, D: math.cos(math.pi / 2 * (n - (N - D)) / D) ** 2),
    ],
)
def test_warmup_stable_decay_is_the_papers(shape: Any, decayed: Callable[[int, int, int], float]) -> None:
    def paper(n: int, N: int = 100, warmup: int = 10, D: int = 20) -> float:
        if n < warmup:
            return n / warmup
        return decayed(n, N, D) if n > N - D else 1.0

    expected = [paper(n) for n in range(1, 101)]
    assert values(WarmupStableDecay(9, 20, 0.0, shape), 100) == pytest.approx(expected, abs=1e-9)


def test_a_decay_can_be_branched_off_a_stable_run() -> None:
    schedule = WarmupStableDecay(warmup=5, decay=10)
    stable, branched = values(schedule, 1000), values(schedule, 310)
    assert stable[:300] == branched[:300]  # the fork begins at 300
    assert branched[299] == 1 > branched[300] > branched[309] == 0
    assert values(WarmupStableDecay(warmup=5, decay=200), 1000)[:300] == stable[:300]


@pytest.mark.parametrize("kind", DECAYS)
def test_beyond_the_horizon_and_short_horizons(kind: type[Decay]) -> None:
    assert kind(warmup=1, final=0.1)(1000, 10) == 0.1
    assert kind(warmup=100, final=0.1)(5, 10) == pytest.approx(6 / 101)  # the horizon ends within the warm-up
    assert 0 < kind(warmup=0.02, final=0.1)(0, 1) <= 1


def test_a_horizon_drawn_in_to_where_warm_up_and_decay_meet() -> None:
    found = values(WarmupStableDecay(10, 50, 0.0, "linear"), 21)
    assert found[10] == 1 and found[-1] == 0
    assert found[10:] == pytest.approx([1 - step / 10 for step in range(11)])
    found = values(OneCycle(10, three_phase=True), 15)
    assert found[10] == 1 and all(0 <= value <= 1 for value in found)


@pytest.mark.parametrize(
    ("choice", "settings", "message"),
    [
        ("cosine", {"warmup": -1}, "schedule.warmup: -1 is no number of steps; give steps, or below 1 a"),
        ("wsd", {"warmup": math.inf}, "schedule.warmup: inf is no number of steps"),
        ("wsd", {"warmup": math.nan}, "schedule.warmup: nan is no number of steps"),
        ("linear", {"warmup": "fast"}, "schedule.warmup: 'fast' is not float"),
        ("linear", {"final": 1.5}, "schedule.final: 1.5 is not between 0 and 1; give a share of the peak"),
        (
            "constant",
            {"final": 0},
            "schedule.final: unknown key; train.optim.schedules.Constant knows warmup",
        ),
        ("wsd", {"decay": -0.1}, "schedule.decay: -0.1 is no number of steps"),
        ("wsd", {"shape": "root"}, "schedule.shape: 'root' is not one of 'linear', 'cosine', 'sqrt'"),
        ("polynomial", {"power": 0}, "schedule.power: 0 is not positive; give a number above 0"),
        ("one-cycle", {"initial": 2}, "schedule.initial: 2 is not between 0 and 1"),
        ("one-cycle", {"three_phase": 3}, "schedule.three_phase: 3 is not bool"),
        ("cyclical", {"warmup": 0}, "schedule.warmup: 0 is no number of steps"),
        ("cyclical", {"decay": 0}, "schedule.decay: 0 is no number of steps"),
        ("cyclical", {"low": -1}, "schedule.low: -1 is not between 0 and 1"),
        ("cyclical", {"shrink": 1.1}, "schedule.shrink: 1.1 is not between 0 and 1"),
        ("cosine-restarts", {"period": 0}, "schedule.period: 0 is no number of steps"),
        ("cosine-restarts", {"multiply": 0.5}, "schedule.multiply: 0.5 is below 1; give 1 or more"),
        ("cosine-restarts", {"final": -1}, "schedule.final: -1 is not between 0 and 1"),
    ],
)
def test_what_cannot_be_is_refused(choice: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        chosen(choice, **settings)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Cosine(101), "schedule.warmup: 101 steps, and the horizon is 100; give fewer, or below 1 a share"),
        (Cyclical(101), "schedule.warmup: 101 steps"),
        (
            WarmupStableDecay(30, 71),
            "schedule.decay: 71 steps after 30 of warm-up, and the horizon is 100; give fewer",
        ),
        (
            WarmupStableDecay(0.5, 0.75),
            "schedule.decay: 75 steps after 50 of warm-up, and the horizon is 100",
        ),
        (OneCycle(51, three_phase=True), "schedule.warmup: 51 steps up and as many down, and the horizon"),
    ],
)
def test_what_does_not_fit_in_the_horizon_is_refused(schedule: Schedule, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        schedule.check_horizon(100)
    assert str(caught.value).startswith(message)


def test_what_fits_in_the_horizon_is_not() -> None:
    for schedule in (Cosine(100), WarmupStableDecay(30, 70), OneCycle(50, three_phase=True), OneCycle(100)):
        schedule.check_horizon(100)


@pytest.mark.parametrize("choice", CHOICES)
def test_as_they_come_all_fit_in_any_horizon(choice: str) -> None:
    for total in (1, 10, 1000):
        chosen(choice).check_horizon(total)
