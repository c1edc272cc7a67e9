"""Learning-rate schedules: multipliers in [0, 1], pure functions of the step."""

from __future__ import annotations

import math


class Schedule:
    """Linear warm-up, then a decay to `final` of the peak at the last step.

    Args:
        warmup: steps of linear warm-up (at least 1), or below 1 the share of all steps.
        final: multiplier at the last step.
    """

    def __init__(self, warmup: float = 0.01, final: float = 0.1) -> None:
        if warmup < 0:
            raise ValueError(f"schedule.warmup: {warmup} is negative; give steps, or below 1 a share of them")
        if not 0 <= final <= 1:
            raise ValueError(f"schedule.final: {final} is not between 0 and 1; give a share of the peak")
        self.warmup = warmup
        self.final = final

    def __call__(self, step: int, total_steps: int) -> float:
        """Multiplier of the learning rate for step `step` (from 0) of `total_steps`."""
        warmup = self.warmup * total_steps if self.warmup < 1 else self.warmup
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1.0, total_steps - 1 - warmup))
        return self.final + (1 - self.final) * self.decay(progress)

    def decay(self, progress: float) -> float:
        """From 1 at progress 0 to 0 at progress 1."""
        raise NotImplementedError


class Cosine(Schedule):
    """Half a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5, one period)."""

    def decay(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


class Linear(Schedule):
    """A straight line."""

    def decay(self, progress: float) -> float:
        return 1 - progress
