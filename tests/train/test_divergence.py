"""train.divergence: spikes are found, noise is not one, an interrupted run is judged as the unbroken one."""

import json
import math
from dataclasses import dataclass, field

import numpy as np
import pytest

from train.config import DivergenceConfig
from train.divergence import Event, Monitor, offending, position, rollback_targets


def curve(seed: int, steps: int) -> list[float]:
    """A loss that falls steeply, then slowly; noise of 2 %, Gaussian or with one of two heavier tails."""
    random, t = np.random.default_rng(seed), np.arange(steps)
    uneven = np.where(random.random(steps) < 0.1, 2.0, 1.0) * random.standard_normal(steps)
    noise = (random.standard_normal(steps), uneven, random.standard_t(8, steps))[seed % 3]
    smooth = 2.6 + 7.8 * np.exp(-t / 60) + 1.2 * np.exp(-t / 600)
    return (smooth * (1 + 0.02 * noise)).tolist()


def judged(monitor: Monitor, losses: list[float], start: int = 0) -> list[tuple[int, Event]]:
    events = [(step, monitor.judge(step, losses[step], 1.0)) for step in range(start, len(losses))]
    return [(step, event) for step, event in events if event]


def test_noise_gives_no_false_alarm() -> None:
    alarms = [(seed, judged(Monitor(DivergenceConfig()), curve(seed, 2000))) for seed in range(200)]
    assert [(seed, events) for seed, events in alarms if events] == []


@pytest.mark.parametrize("level", [0.0, 1e-6, 0.3, 3.0, 11.0])
def test_a_nearly_flat_loss_gives_no_false_alarm(level: float) -> None:
    noise = np.random.default_rng(0).standard_t(2, 1000) * 1e-4
    assert judged(Monitor(DivergenceConfig()), (level + noise).tolist()) == []


@pytest.mark.parametrize("at", [25, 60, 400, 1500])
def test_a_planted_spike_is_found_and_nothing_else(at: int) -> None:
    for seed in range(10):
        losses = curve(seed, 1600)
        before = losses[max(0, at - 100) : at]
        # Far down the slope a spike must stand out from the fall within the window, not only from the noise.
        middle = np.median(before)
        losses[at] = float(middle + 25 * 1.4826 * np.median(np.abs(np.array(before) - middle)))
        ((step, event),) = judged(Monitor(DivergenceConfig(spike="skip")), losses)
        assert (step, event.name, event.action, event.loss) == (at, "spike", "skip", losses[at])
        assert event.score == pytest.approx(25, rel=1e-6)
        assert event.message.startswith(f"the loss {losses[at]:.4g} at step {at} is 25.0 robust standard dev")
        assert f"the median {middle:.4g} of the {len(before)} losses before" in event.message


def test_early_losses_are_not_judged() -> None:
    assert judged(Monitor(DivergenceConfig(window=100)), [3.0] * 24 + [30.0]) == []
    assert judged(Monitor(DivergenceConfig(window=100)), [3.0] * 25 + [30.0]) != []
    assert judged(Monitor(DivergenceConfig(window=5)), [3.0] * 5 + [30.0]) != []


@pytest.mark.parametrize("action", ["stop", "skip", "rollback"])
@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (3.0, math.inf), (-math.inf, math.nan)])
def test_what_is_not_finite_is_found_at_once(action: str, loss: float, norm: float) -> None:
    monitor = Monitor(DivergenceConfig(nonfinite=action))
    before = monitor.state()
    event = monitor.judge(0, loss, norm)
    assert event and (event.name, event.action, event.score) == ("nonfinite", action, None)
    assert event.message == f"the loss at step 0 is {loss:.4g}, the gradient norm {norm:.4g}"
    assert monitor.state()["losses"] == before["losses"] == []


def test_a_lasting_change_of_level_is_reported_once_and_becomes_usual() -> None:
    monitor = Monitor(DivergenceConfig(spike="report"))
    noise = np.random.default_rng(1).standard_normal(900) * 0.02
    losses = (np.repeat([3.0, 6.0, 12.0], 300) + noise).tolist()
    assert [step for step, _ in judged(monitor, losses)] == [300, 600]


def test_skipping_a_lasting_change_of_level_ends_in_a_stop() -> None:
    monitor = Monitor(DivergenceConfig(spike="skip", limit=5))
    events = [event for _, event in judged(monitor, [3.0] * 100 + [6.0] * 6)]
    assert [event.action for event in events] == ["skip"] * 5 + ["stop"]
    assert events[-1].message.endswith(
        "; it would be skip or rollback number 6 within 100 steps, and divergence.limit is 5"
    )
    assert "divergence.limit" not in events[-2].message


def test_skips_far_apart_do_not_add_up() -> None:
    losses = [3.0] * 1000
    losses[100::100] = [30.0] * 9  # one in every 100 steps, so never two within the window
    monitor = Monitor(DivergenceConfig(spike="skip", limit=1))
    assert [event.action for _, event in judged(monitor, losses)] == ["skip"] * 9
    losses[950] = 30.0
    assert judged(Monitor(DivergenceConfig(spike="skip", limit=1)), losses)[-1][1].action == "stop"


def test_rollbacks_are_counted_over_restored_states_and_new_processes() -> None:
    config = DivergenceConfig(nonfinite="rollback", limit=2, window=50)
    monitor = Monitor(config)
    older = json.loads(json.dumps(monitor.state()))
    for _ in range(2):
        event = monitor.judge(10, math.nan, 1.0)
        assert event and event.action == "rollback"
        monitor.rolled_back(10)
        monitor.load_state(older)
    assert monitor.rollbacks == [10, 10]
    resumed = Monitor(config, json.loads(json.dumps(monitor.rollbacks)))
    resumed.load_state(older)
    for step, action in ((5, "stop"), (10, "stop"), (59, "stop"), (60, "rollback")):
        event = resumed.judge(step, math.nan, 1.0)
        assert event and event.action == action, step


@pytest.mark.parametrize("spike", ["report", "skip"])
def test_an_interrupted_run_is_judged_as_the_unbroken_one(spike: str) -> None:
    config = DivergenceConfig(spike=spike, nonfinite="skip", window=30, limit=4)
    losses = curve(3, 200)
    for at, loss in {40: 30.0, 41: 40.0, 42: math.nan, 100: 20.0, 101: 3.0, 150: math.inf}.items():
        losses[at] = loss
    losses[170:] = [loss + 5 for loss in losses[170:]]
    unbroken = judged(Monitor(config), losses)
    assert {event.action for _, event in unbroken} == {"skip", "report" if spike == "report" else "stop"}
    going_on = Monitor(config)
    for step in range(len(losses)):
        resumed = Monitor(config)
        resumed.load_state(json.loads(json.dumps(going_on.state())))
        rest = [(at, event) for at, event in unbroken if at >= step]
        assert repr(judged(resumed, losses, step)) == repr(rest), step  # bits of floats, and nan is nan
        going_on.judge(step, losses[step], 1.0)


def test_positions_go_on_behind_what_is_left_out() -> None:
    for left_out in ([], [0], [3, 4, 5], [0, 1, 7, 9], [2, 3, 50]):
        order = [p for p in range(100) if p not in left_out]
        assert [position(step, left_out) for step in range(90)] == order[:90]


@pytest.mark.parametrize(
    ("steps", "pass_over", "targets", "left_out"),
    [
        ([50, 100], 4, [100, 50], [117, 118, 119, 120]),
        ([50, 117], 4, [117, 50], [117, 118, 119, 120]),
        ([50, 118, 119], 4, [50, 118, 119], [117, 118, 119, 120]),
        ([118, 120], 4, [118, 120], [118, 119, 120]),  # none from before all four
        ([120], 1, [120], [120]),
        ([120], 4, [120], [120]),
        ([100, 121], 4, [100], [117, 118, 119, 120]),  # of a step that is yet to be judged again
        ([121], 4, [], None),
        ([], 4, [], None),
    ],
)
def test_a_rollback_goes_to_before_what_it_passes_over(
    steps: list[int], pass_over: int, targets: list[int], left_out: list[int] | None
) -> None:
    assert rollback_targets(steps, 120, pass_over) == targets
    for target in targets[:1]:
        assert offending(120, target, pass_over, []) == left_out


def test_what_is_passed_over_is_counted_behind_what_was_before() -> None:
    assert offending(119, 110, 3, [117, 118, 119, 120]) == [121, 122, 123]
    assert offending(118, 110, 3, [117, 118, 119, 120]) == [116, 121, 122]
    assert offending(1, 0, 4, [1]) == [0, 2]


class Killed(Exception):
    pass


@dataclass
class Disk:
    """What outlives a process of the simulated run: checkpoints every 10 steps, and what was passed over."""

    checkpoints: dict[int, str] = field(default_factory=dict)
    passed_over: tuple[list[int], list[int]] = ([], [])  # positions; steps that were rolled back


def trained(disk: Disk, bad: set[int], ticks: int) -> tuple[list[int], str]:
    """A process of a run of 100 steps over batches of which some are bad, killed after so many ticks.

    Returns the positions that the parameters were trained on, and the monitor's state.
    """
    config = DivergenceConfig(pass_over=2, window=20)
    losses = curve(0, 200)
    on: list[int] = []
    monitor = Monitor(config, disk.passed_over[1])

    def restore(step: int) -> None:
        on[:], state = json.loads(disk.checkpoints[step])
        monitor.load_state(state)

    def tick() -> None:
        nonlocal ticks
        ticks -= 1
        if ticks == -1:
            raise Killed

    if disk.checkpoints:
        restore(max(disk.checkpoints))
    while (step := len(on)) < 100:
        if step % 10 == 0:
            disk.checkpoints[step] = json.dumps((on, monitor.state()))
        tick()
        at = position(step, disk.passed_over[0])
        event = monitor.judge(step, math.nan if at in bad else losses[at], 1.0)
        if event is None:
            on.append(at)
            continue
        assert event.action == "rollback"
        target = rollback_targets(sorted(disk.checkpoints), step, config.pass_over)[0]
        left_out = offending(step, target, config.pass_over, disk.passed_over[0])
        disk.checkpoints = {k: v for k, v in disk.checkpoints.items() if k <= target}
        tick()
        monitor.rolled_back(step)
        disk.passed_over = sorted(disk.passed_over[0] + left_out), monitor.rollbacks
        tick()
        restore(target)
    return on, repr(monitor.state())


def test_a_run_that_rolls_back_trains_once_on_everything_else_wherever_it_is_killed() -> None:
    bad = {23, 24, 25, 60}
    disk = Disk()
    whole = trained(disk, bad, -1)
    # 23 takes 22 along; then step 22 is batch 24, which takes 21 along; then step 21 is batch 25, with 20.
    assert disk.passed_over == ([20, 21, 22, 23, 24, 25, 59, 60], [23, 22, 21, 54])
    assert whole[0] == [p for p in range(108) if p not in disk.passed_over[0]]
    for ticks in range(122):
        broken = Disk()
        with pytest.raises(Killed):
            trained(broken, bad, ticks)
        assert trained(broken, bad, -1) == whole, ticks
        assert broken.passed_over == disk.passed_over, ticks
    assert trained(Disk(), bad, 122) == whole  # 114 steps judged, two more ticks a rollback
