"""Sequence length and batch that change with training.

The samples have the longest sequence length L. A step of g sequences of length l takes g * l / L of them,
each cut into L / l rows. So order, epochs and resume are those of whole samples: where a step begins is
piecewise linear in the step, and no token is left out or seen twice.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from typing import NamedTuple

KEYS = ("sequence_length", "global_batch")


class Stage(NamedTuple):
    """Steps from `step` on. first: the position of its first sample. samples: per step."""

    step: int
    sequence_length: int
    global_batch: int
    first: int
    samples: int


class Curriculum:
    """Steps (data.order) whose sequences change in length and number.

    sequence_length: L, in tokens. global_batch: sequences per step. Both hold until a stage says something
    else. stages: {step: {"sequence_length": ..., "global_batch": ...}}, of which one may be left out and then
    stays as it was. Raises ValueError, with the key, where a stage is not one.
    """

    def __init__(
        self, sequence_length: int, global_batch: int, stages: Mapping[int, Mapping[str, int]]
    ) -> None:
        self.sequence_length = sequence_length
        for step, changed in stages.items():
            _check_stage(step, changed)
        self.stages: list[Stage] = []  # by their first step
        length, batch = sequence_length, global_batch
        for step, changed in sorted(({0: {}} | dict(stages)).items()):
            length = changed.get("sequence_length", length)
            batch = changed.get("global_batch", batch)
            self.stages.append(self._stage(step, length, batch))
        self._steps = [stage.step for stage in self.stages]

    def stage(self, step: int) -> Stage:
        """The stage that a step belongs to."""
        if step < 0:
            raise ValueError(f"step: {step} is negative")
        return self.stages[bisect_right(self._steps, step) - 1]

    @property
    def lengths(self) -> list[int]:
        """All sequence lengths, ascending."""
        return sorted({stage.sequence_length for stage in self.stages})

    @property
    def most(self) -> int:
        """The samples of the largest step."""
        return max(stage.samples for stage in self.stages)

    def span(self, step: int) -> tuple[int, int]:
        """The first position of a step, and how many samples it takes."""
        stage = self.stage(step)
        return stage.first + (step - stage.step) * stage.samples, stage.samples

    def rows(self, step: int) -> int:
        """How many sequences each sample of the step is cut into: L / l."""
        return self.sequence_length // self.stage(step).sequence_length

    def steps(self, samples: int) -> int:
        """How many steps it takes to read so many samples."""
        last = max(stage.step for stage in self.stages)
        most = last + -(-samples // self.stages[-1].samples)
        return bisect_right(range(most + 1), samples - 1, key=lambda step: self.span(step)[0])

    def micro_batch(self, world_size: int) -> int:
        """The largest that divides every step: samples, of length L, per rank and forward pass. 0: none."""
        return math.gcd(*(stage.samples for stage in self.stages)) // world_size

    def check(self, micro_batch: int, world_size: int) -> None:
        """Raises ValueError, naming the stage, where one cannot be dealt out in such micro-batches."""
        for stage in self.stages:
            if micro_batch < 1 or stage.samples % (micro_batch * world_size):
                raise ValueError(
                    f"curriculum.{stage.step}: {stage.global_batch} sequences of "
                    f"{stage.sequence_length} are {stage.samples} of {self.sequence_length}, not divisible "
                    f"by micro_batch {micro_batch} x {world_size} ranks; choose another global_batch or "
                    "micro_batch"
                )

    def _stage(self, step: int, length: int, batch: int) -> Stage:
        key, whole = f"curriculum.{step}", self.sequence_length
        if whole % length:
            raise ValueError(
                f"{key}.sequence_length: {length} does not divide sequence_length, {whole}; choose a divisor"
            )
        if batch * length % whole:
            raise ValueError(
                f"{key}.global_batch: {batch} sequences of {length} are no whole number of {whole}; "
                f"choose a multiple of {whole // length}"
            )
        first = 0
        if self.stages:
            before = self.stages[-1]
            first = before.first + (step - before.step) * before.samples
        return Stage(step, length, batch, first, batch * length // whole)


def _check_stage(step: object, changed: Mapping[str, int]) -> None:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(
            f"curriculum: {step} is not a step; give stages by step, as {{1000: {{global_batch: 64}}}}"
        )
    for name, value in changed.items():
        if name not in KEYS:
            raise ValueError(f"curriculum.{step}.{name}: unknown key; a stage has {' and '.join(KEYS)}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"curriculum.{step}.{name}: {value} is not a positive integer; give one")
