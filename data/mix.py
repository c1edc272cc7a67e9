"""Mixtures: which samples of several parts make up step s, a pure function of the step as in data.order.

Parts are drawn from in an exact proportion, not by chance (data.deal), in stretches of constant weights: they
change where a stage begins and where a part has reached its cap.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction

import numpy as np

from data.deal import Deal
from data.order import MASK, EqualSteps, Steps, check_block, shuffled

DIGITS = 9  # of a share by temperature


def weights_of(
    sizes: Mapping[str, int],
    *,
    weights: Mapping[str, float] | None = None,
    temperature: float | None = None,
    budgets: Mapping[str, float] | None = None,
) -> dict[str, Fraction]:
    """The weight of each part by one of three rules; without any, its size.

    sizes: of each part, in samples or tokens. weights: explicit. temperature: sizes ** (1 / temperature), as
    in XLM-R (arXiv 1911.02116, section 3.1, whose alpha is 1 / temperature); 1 is in proportion to the sizes,
    more is flatter. Rounded to DIGITS digits of the total. budgets: tokens to train on, of each part.
    Raises ValueError where a rule is not one, or there are two.
    """
    rules = {"weights": weights, "temperature": temperature, "budgets": budgets}
    given = [name for name, rule in rules.items() if rule is not None]
    if len(given) > 1:
        raise ValueError(f"mixture.{given[1]}: mixture.{given[0]} is given, too; choose one of the two")
    if weights is not None:
        return _checked("mixture.weights", weights, sizes)
    if budgets is not None:
        return _checked("mixture.budgets", budgets, sizes)
    exponent = 1 / _number("mixture.temperature", 1 if temperature is None else temperature)
    if exponent == 1:
        return {name: Fraction(size) for name, size in sizes.items()}
    exact = Context(prec=3 * DIGITS)  # decimals: powers of floats may differ by machine in the last bit
    power = exact.divide(Decimal(exponent.numerator), Decimal(exponent.denominator))
    powers = {name: exact.power(Decimal(size), power) for name, size in sizes.items()}
    total = sum(map(Fraction, powers.values()))
    return {name: round(Fraction(power) / total, DIGITS) for name, power in powers.items()}


class Mixture:
    """The order of the samples of several parts, numbered as in their concatenation.

    sizes: samples of each part. steps: samples per step over all ranks, or Steps. weights: of each part, for
    example by weights_of. epochs: caps; a part leaves at the position where it has been drawn epochs * size
    times, and the others' shares grow in proportion. stages: {step: weights} that hold from there on. seed
    and block: as in Order, within each part; a part's order depends on its name, not on the other parts.
    Raises ValueError where they make no sense, in one line with the key.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        steps: int | Steps,
        seed: int,
        *,
        weights: Mapping[str, float | Fraction],
        epochs: Mapping[str, float] | None = None,
        stages: Mapping[int, Mapping[str, float]] | None = None,
        block: int | None = None,
    ) -> None:
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"mixture: {name} has no samples; leave it out")
        self.parts = tuple(sizes)
        self.steps = EqualSteps(steps) if isinstance(steps, int) else steps
        check_block(block)
        self.block = block
        self._sizes = np.array(list(sizes.values()), np.int64)
        self._offsets = np.cumsum(self._sizes) - self._sizes
        self._seeds = np.array([_part_seed(seed, name) for name in sizes], np.uint64)
        by_step = {0: _checked("mixture.weights", weights, sizes)}
        for step, changed in sorted((stages or {}).items(), key=lambda stage: _stage_step(stage[0])):
            by_step[step] = _checked(f"mixture.stages.{step}", changed, sizes)
        limits = _limits(epochs or {}, sizes)
        starts = [(self.steps.span(step)[0], whole) for step, whole in by_step.items()]
        self._stretches, self._end = _stretches(starts, limits, self.parts)
        self._firsts = [stretch.first for stretch in self._stretches]

    def step(self, step: int) -> np.ndarray:
        """int64 [n]: the samples of step 0, 1, 2, ... Raises ValueError past the last step."""
        parts, epochs, places = self._draws(step)
        sizes, seeds = self._sizes[parts], self._seeds[parts]
        return self._offsets[parts] + shuffled(places, epochs, sizes, seeds, self.block)

    def epochs(self, step: int) -> np.ndarray:
        """int64 [n]: how often each sample's part had been passed through before."""
        return self._draws(step)[1]

    def counts(self, step: int) -> np.ndarray:
        """int64 [parts]: the samples drawn from each in steps 0, ..., step - 1."""
        return np.array(self._drawn(self.steps.span(step)[0]), np.int64)

    def check_horizon(self, total_steps: int) -> None:
        """Raises ValueError where the caps leave nothing to draw before `total_steps` are made."""
        if self._end is None:
            return
        first, count = self.steps.span(max(total_steps - 1, 0))
        if total_steps and first + count > self._end:
            raise ValueError(self._too_short(total_steps))

    def _draws(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 [n] each: the part that each draw of the step is from, of which of its epochs, and where."""
        first, count = self.steps.span(step)
        if self._end is not None and first + count > self._end:
            raise ValueError(self._too_short(step + 1))
        parts = self._parts(first, count)
        draws = np.array(self._drawn(first), np.int64)[parts]
        for part in np.unique(parts):
            places = np.flatnonzero(parts == part)
            draws[places] += np.arange(len(places))
        return parts, *np.divmod(draws, self._sizes[parts])

    def _parts(self, first: int, count: int) -> np.ndarray:
        """int64 [count]: which part each of the positions first, first + 1, ... draws from."""
        pieces = []
        while count:
            place = bisect_right(self._firsts, first)
            stretch = self._stretches[place - 1]
            end = self._firsts[place] if place < len(self._firsts) else first + count
            taken = min(count, end - first)
            pieces.append(stretch.deal.parts(first - stretch.first, taken))
            first, count = first + taken, count - taken
        return np.concatenate(pieces)

    def _drawn(self, position: int) -> list[int]:
        """The draws from each part before a position."""
        stretch = self._stretches[bisect_right(self._firsts, position) - 1]
        further = stretch.deal.counts(position - stretch.first)
        return [before + drawn for before, drawn in zip(stretch.drawn, further, strict=True)]

    def _too_short(self, wanted: int) -> str:
        assert self._end is not None
        end = self._end
        steps = bisect_right(range(end + 2), end, key=lambda step: self.steps.span(step)[0]) - 1
        return (
            f"mixture.epochs: every part that is drawn from has reached its cap after {steps:,} steps, "
            f"before the {wanted:,} asked for; raise a cap or draw the horizon in"
        )


@dataclass(frozen=True)
class _Stretch:
    """Positions of constant weights. first: the first. drawn: from each part before it."""

    first: int
    drawn: list[int]
    deal: Deal


def _stretches(
    stages: Sequence[tuple[int, Mapping[str, Fraction]]],
    limits: Mapping[str, int],
    parts: Sequence[str],
) -> tuple[list[_Stretch], int | None]:
    """All stretches, and the position from which there is nothing to draw, if there is one.

    stages: position and weights from there on. limits: draws, of the parts that have a cap.
    """
    stretches: list[_Stretch] = []
    position, drawn = 0, [0] * len(parts)
    for place, (_, weights) in enumerate(stages):
        end = stages[place + 1][0] if place + 1 < len(stages) else None
        while end is None or position < end:
            left = [
                limits[name] - n if name in limits else None for name, n in zip(parts, drawn, strict=True)
            ]
            live = [
                Fraction(0) if rest == 0 else weights[name] for name, rest in zip(parts, left, strict=True)
            ]
            if not any(live):
                return stretches, position
            deal = Deal(_integers(live))
            stops = [
                position + deal.position(part, rest - 1) + 1
                for part, rest in enumerate(left)
                if rest is not None and live[part]
            ]
            stop = min([*stops, *([] if end is None else [end])], default=None)
            stretches.append(_Stretch(position, drawn, deal))
            if stop is None:
                return stretches, None
            further = deal.counts(stop - position)
            position, drawn = stop, [a + b for a, b in zip(drawn, further, strict=True)]
    raise AssertionError("the last stage has no end")


def _integers(weights: Sequence[Fraction]) -> list[int]:
    """The smallest integers in the same proportion."""
    scale = math.lcm(*(weight.denominator for weight in weights))
    integers = [int(weight * scale) for weight in weights]
    common = math.gcd(*integers)
    return [integer // common for integer in integers]


def _checked(
    key: str, weights: Mapping[str, float | Fraction], sizes: Mapping[str, int]
) -> dict[str, Fraction]:
    """Weights in the order of the parts. Raises ValueError in one line that names `key`."""
    _refuse_unknown(key, weights, sizes)
    for name in sizes:
        if name not in weights:
            raise ValueError(f"{key}: {name} has none; give it a weight, 0 to leave it out")
    exact = {name: _number(f"{key}.{name}", weights[name], least=0) for name in sizes}
    if not any(exact.values()):
        raise ValueError(f"{key}: sum to 0; give at least one part a positive weight")
    return exact


def _limits(epochs: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, int]:
    """How often a part may be drawn, of those with a cap."""
    _refuse_unknown("mixture.epochs", epochs, sizes)
    limits = {}
    for name, cap in epochs.items():
        limits[name] = int(_number(f"mixture.epochs.{name}", cap) * sizes[name])
        if not limits[name]:
            raise ValueError(
                f"mixture.epochs.{name}: {cap} of {sizes[name]:,} samples is none; set its weight to 0"
            )
    return limits


def _refuse_unknown(key: str, named: Mapping[str, object], sizes: Mapping[str, int]) -> None:
    for name in named:
        if name not in sizes:
            raise ValueError(f"{key}.{name}: unknown part; the data has {', '.join(sizes)}")


def _number(key: str, value: object, least: int | None = None) -> Fraction:
    """A number as its decimal digits say. least: what it may be at least; None: more than 0."""
    numeric = isinstance(value, int | float | Fraction) and not isinstance(value, bool)
    if not numeric or not math.isfinite(value) or value < 0 or (least is None and not value):  # type: ignore
        what = "a positive number" if least is None else "a number from 0"
        raise ValueError(f"{key}: {value} is not {what}; give one")
    return Fraction(str(value))


def _stage_step(step: object) -> int:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"mixture.stages: {step} is not a step; give weights by step, as {{1000: {{...}}}}")
    return step


def _part_seed(seed: int, name: str) -> int:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return (seed ^ int.from_bytes(digest, "big")) & MASK
