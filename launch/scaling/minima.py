"""The minimum of an IsoFLOP curve: the best size of one budget, and whether its runs bracket it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from launch.scaling.table import SAME, Points

SIZES = {"parabola": 3, "akima": 5}  # that a method needs; Akima's slope at a point is of five points
FINE = 801  # points at which an interpolation is looked at


@dataclass(frozen=True)
class Minimum:
    """Of one budget: the best N and D, and their loss; NaN where the runs do not bracket it.

    flops: geometric mean of the runs'. sizes: how many different ones. reason: why it is not bracketed, and
    what to do; None where it is.
    """

    budget: float
    flops: float
    sizes: int
    parameters: float
    tokens: float
    loss: float
    reason: str | None

    @property
    def bracketed(self) -> bool:
        return self.reason is None

    def as_json(self) -> dict[str, Any]:
        own = {key: None if value != value else value for key, value in vars(self).items()}
        return own | {"bracketed": self.bracketed}


@dataclass(frozen=True)
class Curve:
    """The n runs of one budget, to be looked at with many losses.

    log_n, log_d: [n]. sizes: [S], increasing, log N of each different size. mean: [S, n], the matrix that
    averages runs of a size. length: coefficients of log D as a polynomial in log N, of the degree that the
    sizes allow, up to 2: what a token costs need not be 6 N.
    """

    budget: float
    flops: float
    log_n: np.ndarray
    log_d: np.ndarray
    sizes: np.ndarray
    mean: np.ndarray
    length: np.ndarray = field(repr=False)

    @classmethod
    def of(cls, budget: float, runs: Points) -> Curve:
        log_n, log_d = np.log(runs.parameters), np.log(runs.tokens)
        order = np.argsort(log_n, kind="stable")
        starts = np.diff(log_n[order], prepend=-np.inf) > SAME
        group = np.empty(len(runs), dtype=int)
        group[order] = np.cumsum(starts) - 1
        member = group == np.arange(group.max() + 1)[:, None]
        mean = member / member.sum(axis=1, keepdims=True)
        centre = log_n - log_n.mean()
        length = np.polynomial.Polynomial.fit(centre, log_d, min(2, len(mean) - 1), domain=[-1, 1]).coef
        flops = math.exp(np.log(runs.flops).mean())
        return cls(budget, flops, log_n, log_d, mean @ log_n, mean, length)

    def log_tokens(self, log_n: np.ndarray) -> np.ndarray:
        """log D of sizes of any shape, at this budget."""
        return np.polynomial.Polynomial(self.length)(log_n - self.log_n.mean())

    def parabola(self, losses: np.ndarray) -> np.ndarray:
        """Coefficients [3, R] in log N less its mean, the highest power first. losses: [n, R]."""
        return np.linalg.pinv(np.vander(self.log_n - self.log_n.mean(), 3)) @ losses

    def line(self, method: str, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """To be drawn: N [FINE] over the runs' range and the loss [FINE] there. losses: [n]."""
        fine = np.linspace(self.sizes[0], self.sizes[-1], FINE)
        if method == "akima":
            return np.exp(fine), Akima1DInterpolator(self.sizes, self.mean @ losses)(fine)
        return np.exp(fine), np.polyval(self.parabola(losses[:, None])[:, 0], fine - self.log_n.mean())

    def lowest(self, method: str, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """log N and loss [R] of the minimum of each of the losses [n, R], and whether it is bracketed.

        Bracketed: the lowest size is neither the smallest nor the largest, and the fit opens upward and has
        its minimum between these two.
        """
        means = self.mean @ losses
        inner = ~np.isin(np.argmin(means, axis=0), (0, len(means) - 1))
        if method == "akima":
            fine = np.linspace(self.sizes[0], self.sizes[-1], FINE)
            place, loss, inside = valley(fine, Akima1DInterpolator(self.sizes, means)(fine))
            return place, loss, inner & inside
        square, slope, level = self.parabola(losses)
        bend = np.where(square > 0, square, 1.0)
        place = self.log_n.mean() - slope / (2 * bend)
        inside = (square > 0) & (place > self.sizes[0]) & (place < self.sizes[-1])
        return place, level - slope**2 / (4 * bend), inner & inside


def valley(places: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Place and value [R] of the lowest of values [M, R] at even places [M], refined by a parabola through it
    and its neighbours; and whether it has both of these."""
    at = np.argmin(values, axis=0)
    inside = (at > 0) & (at < len(places) - 1)
    at = at.clip(1, len(places) - 2)
    before, here, after = (values[at + step, np.arange(values.shape[1])] for step in (-1, 0, 1))
    bend = before - 2 * here + after
    shift = 0.5 * (before - after) / np.where(bend > 0, bend, np.inf)
    return places[at] + shift * (places[1] - places[0]), here - 0.25 * (before - after) * shift, inside


def minimum(curve: Curve, method: str, losses: np.ndarray) -> Minimum:
    """Of the losses [n] of one budget."""
    count, needed = len(curve.sizes), SIZES[method]
    reason, place, loss = None, math.nan, math.nan
    if count < needed:
        what = "all runs have the same size" if count == 1 else f"it has {count} different sizes"
        reason = f"{what} and {article(method)} needs {needed}; add sizes"
    else:
        at = int(np.argmin(curve.mean @ losses))
        places, lowest, bracketed = curve.lowest(method, losses[:, None])
        if bracketed[0]:
            place, loss = float(places[0]), float(lowest[0])
        elif at in (0, count - 1):
            which, more = ("smallest", "smaller") if at == 0 else ("largest", "larger")
            reason = (
                f"the {which} size, {math.exp(curve.sizes[at]):.4g}, has the lowest loss; add {more} ones"
            )
        elif method == "parabola" and curve.parabola(losses[:, None])[0, 0] <= 0:
            reason = "the parabola opens downward; add sizes further off, or seeds"
        else:
            reason = f"the lowest point of {article(method)} is not between the sizes; add sizes"
    tokens = math.exp(float(curve.log_tokens(np.array(place)))) if reason is None else math.nan
    size = math.exp(place) if reason is None else math.nan
    return Minimum(curve.budget, curve.flops, count, size, tokens, loss, reason)


def article(method: str) -> str:
    return "a parabola" if method == "parabola" else "an Akima interpolation"
