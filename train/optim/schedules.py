"""Learning-rate schedules: multipliers of the peak in [0, 1], pure functions of the step.

A number of steps in the settings is one of steps (at least 1), or below 1 a share of all steps. A warm-up of
W steps has W below the peak, which is step W (from 0); a decay of D steps has D below the peak, of which the
last of all steps is the lowest.
"""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["linear", "cosine", "sqrt"]
SHAPES = {  # of a fall: from 1 at progress 0 to 0 at progress 1
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "sqrt": lambda progress: 1 - math.sqrt(progress),
}


def steps_of(length: float, total_steps: int) -> float:
    """The steps that a setting stands for: itself, or below 1 a share of `total_steps`."""
    return length * total_steps if length < 1 else length


class Schedule:
    """Linear warm-up to the peak, and after it what the class says.

    Args:
        warmup: steps of linear warm-up, or a share.
    """

    def __init__(self, warmup: float = 0.01) -> None:
        self.warmup = _length("warmup", warmup)

    def __call__(self, step: int, total_steps: int) -> float:
        """Multiplier of the learning rate for step `step` (from 0) of `total_steps`, or for one beyond."""
        peak = steps_of(self.warmup, total_steps)
        return self.rise(step, peak) if step < peak else self.fall(step, peak, total_steps)

    def rise(self, step: int, peak: float) -> float:
        """The multiplier before step `peak`."""
        return (step + 1) / (peak + 1)

    def fall(self, step: int, peak: float, total_steps: int) -> float:
        """The multiplier from step `peak` on, where it is 1."""
        raise NotImplementedError

    def check_horizon(self, total_steps: int) -> None:
        """Raises ValueError where the schedule does not fit in so many steps."""
        if self.warmup > total_steps:
            raise ValueError(
                f"schedule.warmup: {self.warmup:,} steps, and the horizon is {total_steps:,}; give fewer, or"
                " below 1 a share of them"
            )


class Constant(Schedule):
    """The peak, to the end. What Schedule-Free optimizers ask for (Defazio et al. 2024, arXiv 2405.15682)."""

    def fall(self, step: int, peak: float, total_steps: int) -> float:
        return 1.0


class InverseSqrt(Schedule):
    """One over the root of the step (Vaswani et al. 2017, arXiv 1706.03762, eq. 3, whose `warmup_steps` count
    the step at the peak too; T5, arXiv 1910.10683, starts at the peak instead of warming up)."""

    def fall(self, step: int, peak: float, total_steps: int) -> float:
        return math.sqrt((peak + 1) / (step + 1))


class Decay(Schedule):
    """A decay from the warm-up on.

    Args:
        warmup: steps of linear warm-up, or a share.
        final: multiplier at the last step.
    """

    shape: Shape

    def __init__(self, warmup: float = 0.01, final: float = 0.1) -> None:
        super().__init__(warmup)
        self.final = _multiplier("final", final)

    def fall(self, step: int, peak: float, total_steps: int) -> float:
        return _between(self.final, 1.0, self.height(_progress(step, peak, total_steps - 1)))

    def height(self, progress: float) -> float:
        """From 1 at progress 0 to 0 at progress 1."""
        return SHAPES[self.shape](progress)


class Cosine(Decay):
    """Half a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5, one period)."""

    shape = "cosine"


class Linear(Decay):
    """A straight line."""

    shape = "linear"


class Polynomial(Decay):
    """A power of what is left (the "poly" policy: Liu et al. 2015, arXiv 1506.04579; Chen et al. 2016, arXiv
    1606.00915).

    Args:
        warmup: steps of linear warm-up, or a share.
        final: multiplier at the last step.
        power: of the share of the steps that is left.
    """

    def __init__(self, warmup: float = 0.01, final: float = 0.0, power: float = 0.9) -> None:
        super().__init__(warmup, final)
        if not power > 0:
            raise ValueError(f"schedule.power: {power} is not positive; give a number above 0")
        self.power = power

    def height(self, progress: float) -> float:
        return (1 - progress) ** self.power


class WarmupStableDecay(Decay):
    """The peak, and a decay at the end (Hu et al. 2024, arXiv 2404.06395; Hägele et al. 2024, arXiv
    2405.18392). Where the horizon was drawn in to where both meet, the decay takes what the warm-up leaves.

    Args:
        warmup: steps of linear warm-up, or a share.
        decay: steps of the decay, or a share.
        final: multiplier at the last step.
        shape: of the decay; sqrt: 1 - sqrt of its progress.
    """

    def __init__(
        self, warmup: float = 0.01, decay: float = 0.2, final: float = 0.0, shape: Shape = "sqrt"
    ) -> None:
        super().__init__(warmup, final)
        self.decay = _length("decay", decay)
        self.shape = shape

    def fall(self, step: int, peak: float, total_steps: int) -> float:
        stable = max(peak, total_steps - 1 - steps_of(self.decay, total_steps))
        return super().fall(step, stable, total_steps)

    def check_horizon(self, total_steps: int) -> None:
        super().check_horizon(total_steps)
        warmup, decay = (steps_of(length, total_steps) for length in (self.warmup, self.decay))
        if warmup + decay > total_steps:
            raise ValueError(
                f"schedule.decay: {decay:,.10g} steps after {warmup:,.10g} of warm-up, and the horizon is"
                f" {total_steps:,}; give fewer, or below 1 a share of them"
            )


class OneCycle(Decay):
    """Up to the peak and far down (Smith & Topin 2017, arXiv 1708.07120); momentum stays as it is.

    Args:
        warmup: steps of the rise, or a share.
        initial: multiplier at the first step.
        final: multiplier at the last step.
        shape: of the rise and the fall.
        three_phase: the paper's: down to `initial` in as many steps as up, and from there to `final`.
    """

    def __init__(
        self,
        warmup: float = 0.3,
        initial: float = 0.04,
        final: float = 4e-6,
        shape: Shape = "cosine",
        three_phase: bool = False,
    ) -> None:
        super().__init__(warmup, final)
        self.initial = _multiplier("initial", initial)
        self.shape = shape
        self.three_phase = three_phase

    def rise(self, step: int, peak: float) -> float:
        return _between(1.0, self.initial, self.height(step / peak))

    def fall(self, step: int, peak: float, total_steps: int) -> float:
        if not self.three_phase:
            return super().fall(step, peak, total_steps)
        if step < 2 * peak:
            return _between(self.initial, 1.0, self.height((step - peak) / peak))
        return _between(self.final, self.initial, self.height(_progress(step, 2 * peak, total_steps - 1)))

    def check_horizon(self, total_steps: int) -> None:
        super().check_horizon(total_steps)
        up = steps_of(self.warmup, total_steps)
        if self.three_phase and 2 * up > total_steps:
            raise ValueError(
                f"schedule.warmup: {up:,.10g} steps up and as many down, and the horizon is"
                f" {total_steps:,}; give fewer, or below 1 a share of them"
            )


class Cyclical(Schedule):
    """Straight up and down, again and again (Smith 2015, arXiv 1506.01186: triangular).

    Args:
        warmup: steps of every rise, or a share.
        decay: steps of every fall, or a share.
        low: multiplier at the first step, and between two cycles.
        shrink: factor of the height of a cycle over `low` from one to the next; 0.5: the paper's triangular2.
    """

    def __init__(
        self, warmup: float = 0.05, decay: float = 0.05, low: float = 0.25, shrink: float = 1.0
    ) -> None:
        super().__init__(_length("warmup", warmup, zero=False))
        self.decay = _length("decay", decay, zero=False)
        self.low = _multiplier("low", low)
        self.shrink = _multiplier("shrink", shrink)

    def __call__(self, step: int, total_steps: int) -> float:
        up, down = (steps_of(length, total_steps) for length in (self.warmup, self.decay))
        cycle, place = divmod(step, up + down)
        height = place / up if place < up else 1 - (place - up) / down
        return _between(self.low, 1.0, height * self.shrink**cycle)


class CosineRestarts(Schedule):
    """Half a cosine, again and again from the peak (SGDR: Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5).

    Args:
        warmup: steps of linear warm-up, or a share.
        period: steps of the first half cosine, or a share, in whole steps.
        multiply: factor of the period from one to the next.
        final: multiplier that a half cosine comes down to; the step that would have it restarts.
    """

    def __init__(
        self, warmup: float = 0.02, period: float = 0.14, multiply: float = 2.0, final: float = 0.0
    ) -> None:
        super().__init__(warmup)
        self.period = _length("period", period, zero=False)
        if not multiply >= 1:
            raise ValueError(f"schedule.multiply: {multiply} is below 1; give 1 or more")
        self.multiply = multiply
        self.final = _multiplier("final", final)

    def fall(self, step: int, peak: float, total_steps: int) -> float:
        period: float = max(1, round(steps_of(self.period, total_steps)))
        since = step - peak
        if self.multiply == 1:
            since %= period
        while since >= period:
            since, period = since - period, period * self.multiply
        return _between(self.final, 1.0, SHAPES["cosine"](since / period))


def _progress(step: int, begin: float, end: float) -> float:
    """The share of the way from step `begin` to step `end` that is made at `step`, from 0 to 1."""
    if step <= begin:
        return 0.0
    return min(1.0, (step - begin) / (end - begin)) if end > begin else 1.0


def _between(low: float, high: float, height: float) -> float:
    """`low` at height 0, `high` at height 1."""
    return low + (high - low) * height


def _length(key: str, value: float, zero: bool = True) -> float:
    """Raises ValueError unless value > 0, or is 0 where that may be."""
    if not 0 <= value < math.inf or value == 0 and not zero:
        raise ValueError(
            f"schedule.{key}: {value} is no number of steps; give steps, or below 1 a share of them"
        )
    return value


def _multiplier(key: str, value: float) -> float:
    """Raises ValueError unless 0 <= value <= 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"schedule.{key}: {value} is not between 0 and 1; give a share of the peak")
    return value
