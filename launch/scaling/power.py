"""Power laws of compute through a handful of points, with intervals from resampled fits.

A law is fitted once to what was measured and once to each of R resamples, of which it is known what should
have come out. The errors of these fits, estimate minus truth, are taken to be those of the fit to what was
measured: an interval goes from the estimate minus the upper to the estimate minus the lower quantile of the
errors. Where a method is off to one side by itself, its errors show this, and the interval stands beside the
estimate rather than around it; `bias` says by how much.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

LEVEL = 0.95
EXPONENTS = np.geomspace(0.005, 3, 80)  # at which a law with a floor is tried
ROUNDS = 8  # of looking closer, each at a quarter of the width
TINY = 1e-300
LARGEST = 700.0  # whose exponential is a float
NONE = 0.01  # nats per token, up to which a floor is as good as none


class Estimate(NamedTuple):
    """A value and its interval at LEVEL, None where nothing fixes it."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return self.low is not None


def estimate(value: float, errors: np.ndarray | None, noise: np.ndarray | None = None) -> Estimate:
    """errors: [R] of resampled fits, estimate minus truth; None: no interval. noise: [R'], errors of the
    measurement that the value is going to be compared with."""
    if errors is None:
        return Estimate(value)
    if noise is not None:
        errors = errors - np.random.default_rng(0).choice(noise, len(errors))
    low, high = value - np.quantile(errors, [(1 + LEVEL) / 2, (1 - LEVEL) / 2])
    return Estimate(value, float(low), float(high))


def _exp(log: Estimate) -> Estimate:
    """No end where it is beyond all floats."""
    value = math.exp(min(log.value, LARGEST))
    if log.low is None or log.high is None or log.high > LARGEST:
        return Estimate(value)
    return Estimate(value, math.exp(log.low), math.exp(log.high))


@dataclass(frozen=True)
class PowerLaw:
    """y = exp(level) (C / exp(pivot))^slope, y and C positive. errors: [R, 2] of level and slope, or None."""

    level: float
    slope: float
    pivot: float
    errors: np.ndarray | None = field(default=None, repr=False)

    @property
    def coefficient(self) -> float:
        """k of y = k C^slope."""
        return math.exp(min(self.level - self.slope * self.pivot, LARGEST))

    @property
    def exponent(self) -> Estimate:
        return estimate(self.slope, None if self.errors is None else self.errors[:, 1])

    @property
    def bias(self) -> float | None:
        """The median error of the exponent, which its interval already accounts for."""
        return None if self.errors is None else float(np.median(self.errors[:, 1]))

    def at(self, flops: float, noise: np.ndarray | None = None) -> Estimate:
        """y where C is that many FLOP. noise: see `estimate`, of log y."""
        place = math.log(flops) - self.pivot
        errors = None if self.errors is None else self.errors @ [1.0, place]
        return _exp(estimate(self.level + self.slope * place, errors, noise))

    def as_json(self) -> dict[str, Any]:
        return {
            "coefficient": self.coefficient,
            "exponent": self.exponent._asdict(),
            "bias": self.bias,
        }


def line(flops: np.ndarray, logs: np.ndarray, there: np.ndarray | None = None) -> np.ndarray:
    """Level and slope, [R, 2], of least-squares lines through logs [B, R] over log flops [B].

    The level is that at the mean of log flops. there: [B, R], which points a line goes through, two or more.
    """
    places = (np.log(flops) - np.log(flops).mean())[:, None]
    weights = np.ones_like(logs) if there is None else there.astype(float)
    count = weights.sum(axis=0)
    middle, mean = (weights * places).sum(axis=0) / count, (weights * logs).sum(axis=0) / count
    off = weights * (places - middle)
    slope = (off * logs).sum(axis=0) / (off * places).sum(axis=0)
    return np.stack([mean - slope * middle, slope], axis=-1)


def power_law(flops: np.ndarray, values: np.ndarray, errors: np.ndarray | None = None) -> PowerLaw:
    """The least-squares line in logarithms through values [B] at flops [B].

    errors: [R, 2], of `line`. Raises ValueError with fewer than two different flops.
    """
    budgets = len(np.unique(flops))
    if budgets < 2:
        raise ValueError(f"a power law needs 2 or more budgets and there are {budgets}; add some")
    level, slope = line(flops, np.log(values)[:, None])[0]
    return PowerLaw(float(level), float(slope), float(np.log(flops).mean()), errors)


@dataclass(frozen=True)
class LossLaw:
    """L = floor + height (C / exp(pivot))^-decay, nats per token.

    own: [3], floor, height and decay. resampled: [R + 1, 3], of what resamples were drawn from, and of the
    fits to R resamples; or None.
    """

    own: np.ndarray
    pivot: float
    resampled: np.ndarray | None = field(default=None, repr=False)

    @property
    def floor(self) -> Estimate:
        return self._estimate(lambda c: c[..., 0])

    @property
    def coefficient(self) -> Estimate:
        """k of L = floor + k C^-exponent."""
        return _exp(self._estimate(lambda c: np.log(np.maximum(c[..., 1], TINY)) + c[..., 2] * self.pivot))

    @property
    def exponent(self) -> Estimate:
        return self._estimate(lambda c: c[..., 2])

    def at(self, flops: float, noise: np.ndarray | None = None) -> Estimate:
        """The loss where C is that many FLOP. noise: see `estimate`, of the log loss."""
        place = math.log(flops) - self.pivot
        log = self._estimate(lambda c: np.log(c[..., 0] + c[..., 1] * np.exp(-c[..., 2] * place)), noise)
        return _exp(log)

    def _estimate(self, of: Callable[[np.ndarray], np.ndarray], noise: np.ndarray | None = None) -> Estimate:
        """A function of constants [..., 3]."""
        if self.resampled is None:
            return Estimate(float(of(self.own)))
        true, *_ = values = of(self.resampled)
        return estimate(float(of(self.own)), values[1:] - true, noise)

    @property
    def note(self) -> str | None:
        """A warning where the losses do not fix the floor."""
        low = self.floor.value if self.floor.low is None else self.floor.low
        return None if low > NONE else "the losses do not fix the floor: none at all fits them about as well"

    def as_json(self) -> dict[str, Any]:
        constants = {name: getattr(self, name)._asdict() for name in ("floor", "coefficient", "exponent")}
        return constants | {"note": self.note}


def floored(flops: np.ndarray, losses: np.ndarray, there: np.ndarray | None = None) -> np.ndarray:
    """floor, height and decay, [R, 3], of L = floor + height (C / pivot)^-decay by least squares.

    flops: [B]. losses: [B, R]. there: [B, R], which losses count. The pivot is the geometric mean of flops.
    For each of EXPONENTS, floor and height, neither below 0, follow in closed form (variable projection); and
    again for exponents ever nearer to the best. Where the floor reaches 0 is a kink, which slopes miss.
    """
    places = (np.log(flops) - np.log(flops).mean())[:, None]
    weights = np.ones_like(losses) if there is None else there.astype(float)
    weights = weights / weights.sum(axis=0)
    mean = (weights * losses).sum(axis=0)

    def solved(decay: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Floor, height, mean square, [R], at decay [1] or [R]."""
        basis = np.exp(-places * decay)
        middle = (weights * basis).sum(axis=0)
        off = weights * (basis - middle)
        height = (off * losses).sum(axis=0) / (off * basis).sum(axis=0)
        floor = mean - height * middle
        alone = (weights * basis * losses).sum(axis=0) / (weights * basis**2).sum(axis=0)
        height = np.where(floor < 0, alone, height)
        floor = np.where(height < 0, mean, np.maximum(floor, 0.0))
        height = np.maximum(height, 0.0)
        return floor, height, (weights * (losses - floor - height * basis) ** 2).sum(axis=0)

    squares = np.stack([solved(np.array([decay]))[2] for decay in EXPONENTS])
    decay, step = EXPONENTS[np.argmin(squares, axis=0)], EXPONENTS[1] / EXPONENTS[0]
    for _ in range(ROUNDS):
        near = [decay * step**side for side in (-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1)]
        best = np.argmin([solved(one)[2] for one in near], axis=0)
        decay, step = np.choose(best, near), step**0.25
    floor, height, _ = solved(decay)
    return np.stack([floor, height, decay], axis=1)


def loss_law(flops: np.ndarray, losses: np.ndarray, resampled: np.ndarray | None = None) -> LossLaw:
    """The law with a floor through losses [B] at flops [B].

    resampled: [R + 1, 3], of `floored`, the first of what the others were drawn from. Raises ValueError with
    fewer than three different flops.
    """
    budgets = len(np.unique(flops))
    if budgets < 3:
        raise ValueError(f"a law with a floor needs 3 or more budgets and there are {budgets}; add some")
    return LossLaw(floored(flops, losses[:, None])[0], float(np.log(flops).mean()), resampled)
