"""Divergence: a loss or gradient that is not finite, a loss that jumps up, and the batches then left out.

Arithmetic only: the loop applies what is decided here. To roll back and leave out the batches around the
spike is the practice of PaLM (arXiv:2204.02311, section 5.1: about 100 steps back, 200 to 500 batches passed
over); to leave out the update where the loss lies several deviations above its rolling window is that of
OLMo-core (`SkipStepOptimizer`: 128 steps, 6 standard deviations). Median and MAD stand here for mean and
deviation: one spike in the window does not hide the next (Iglewicz and Hoaglin, 1993, "modified z-score").

Steps are counted from 0: `step` is the one whose loss is judged, so its update would be number step + 1.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from train.config import DivergenceConfig

LEAST = 16  # losses in the window before one is judged by it, fewer only where the window is smaller
FLOOR = 0.01  # least deviation: this share of the median, and of 1 nat where the median is below it


@dataclass(frozen=True)
class Event:
    """What is wrong with a step and what to do about it.

    name: "nonfinite" or "spike". action: "stop", "skip" (do not apply the update), "rollback" (to
    one of `rollback_targets`) or "report" (go on). score: robust standard deviations above the median; None
    where it is not finite. message: one line, without what is done about it.
    """

    name: str
    action: str
    loss: float
    gradient_norm: float
    score: float | None
    message: str


class Monitor:
    """Judges every step by the losses before it. Equal numbers get equal judgements, on every rank.

    Args:
        config: the run's `divergence`.
        rollbacks: the steps at which earlier processes of this run rolled back, from `Monitor.rollbacks`.
    """

    def __init__(self, config: DivergenceConfig, rollbacks: Sequence[int] = ()) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.window)  # accepted ones, oldest first
        self._skips: list[int] = []  # steps within the window
        self._spiking = False  # the last loss was a spike that was reported
        self._rollbacks = list(rollbacks)

    @property
    def rollbacks(self) -> list[int]:
        """The step of every rollback of this run. Kept outside of checkpoints, which it outlives."""
        return list(self._rollbacks)

    def judge(self, step: int, loss: float, gradient_norm: float) -> Event | None:
        """What is wrong with `step`, if anything. Called once a step, before its update is applied.

        loss: mean over the global batch, nats per token. gradient_norm: of the global gradient.
        """
        numbers = loss, gradient_norm
        if not all(map(math.isfinite, numbers)):
            message = f"the loss at step {step} is {loss:.4g}, the gradient norm {gradient_norm:.4g}"
            return self._decide(step, Event("nonfinite", self._config.nonfinite, *numbers, None, message))
        middle, score = self._score(loss)
        if score is None or score <= self._config.threshold:
            self._spiking = False
            self._losses.append(loss)
            return None
        message = (
            f"the loss {loss:.4g} at step {step} is {score:,.1f} robust standard deviations above the"
            f" median {middle:.4g} of the {len(self._losses)} losses before"
        )
        if self._config.spike != "report":
            return self._decide(step, Event("spike", self._config.spike, *numbers, score, message))
        # The loss enters the window, so that a level that lasts becomes the usual one. It is reported once.
        known, self._spiking = self._spiking, True
        self._losses.append(loss)
        return None if known else Event("spike", "report", *numbers, score, message)

    def rolled_back(self, step: int) -> None:
        """Count the rollback that `step` was the reason for, before the older state is loaded."""
        self._rollbacks.append(step)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps (JSON): with it a resumed run judges as the unbroken one would."""
        return {"losses": list(self._losses), "skips": list(self._skips), "spiking": self._spiking}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go back to what `state` returned. The history of rollbacks stays."""
        self._losses = deque(state["losses"], maxlen=self._config.window)
        self._skips, self._spiking = list(state["skips"]), state["spiking"]

    def _score(self, loss: float) -> tuple[float, float | None]:
        """The window's median, and how far above it the loss lies; None before enough losses are there."""
        window = self._config.window
        if len(self._losses) < min(window, max(LEAST, window // 4)):
            return math.nan, None
        middle = median(self._losses)
        deviation = 1.4826 * median(abs(before - middle) for before in self._losses)
        return middle, (loss - middle) / max(deviation, FLOOR * max(1.0, abs(middle)))

    def _decide(self, step: int, event: Event) -> Event:
        """The event with its action, which is to stop where it comes once too often."""
        if event.action == "stop":
            return event
        since = step - self._config.window  # steps of the window come after it
        self._skips = [skip for skip in self._skips if skip > since]
        # A rollback further on than `step` counts too: the run has not got past it yet.
        count = 1 + len(self._skips) + sum(rollback > since for rollback in self._rollbacks)
        if count > self._config.limit:
            message = (
                f"{event.message}; it would be skip or rollback number {count} within"
                f" {self._config.window} steps, and divergence.limit is {self._config.limit}"
            )
            return Event(event.name, "stop", event.loss, event.gradient_norm, event.score, message)
        if event.action == "skip":
            self._skips.append(step)
        return event


def position(step: int, passed_over: Sequence[int]) -> int:
    """The index into the data order of the batch that `step` trains on.

    passed_over: the positions that are left out, sorted and distinct.
    """
    for left_out in passed_over:
        if left_out > step:
            break
        step += 1
    return step


def rollback_targets(steps: Sequence[int], step: int, pass_over: int) -> list[int]:
    """The checkpoints to go back to from `step`, the best first.

    Those from before the batches that are passed over, the newest first; then the later ones, the oldest
    first: fewer batches are passed over then.

    Args:
        steps: of the checkpoints, oldest first; checkpoint n has trained on steps 0 to n - 1.
    """
    before = [checkpoint for checkpoint in steps if checkpoint <= step - pass_over + 1]
    return [*reversed(before), *(later for later in steps[len(before) :] if later <= step)]


def offending(step: int, target: int, pass_over: int, passed_over: Sequence[int]) -> list[int]:
    """Positions that a rollback from `step` to checkpoint `target` passes over besides `passed_over`."""
    first = max(target, step - pass_over + 1)
    return [position(past, passed_over) for past in range(first, step + 1)]
