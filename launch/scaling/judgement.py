"""A law is judged by runs that it has not seen: those of the largest budget, unless another is named.

The laws are fitted to all other budgets. The parametric law predicts the loss of every held-out run; the
IsoFLOP laws the best loss and the best size of the held-out budget. Intervals are for what is measured: they
hold the uncertainty of the fit and the noise of the held-out run or minimum itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from launch.scaling import isoflop, parametric
from launch.scaling.fits import Fits, fits_of
from launch.scaling.isoflop import Isoflop
from launch.scaling.minima import Curve, minimum
from launch.scaling.parametric import Fit, Law
from launch.scaling.power import LEVEL, Estimate, LossLaw, PowerLaw
from launch.scaling.surface import through
from launch.scaling.table import Points

RESAMPLES = 1000
ORDER = ("IsoFLOP, parabola", "parametric", "IsoFLOP, akima")  # in which laws make the headline


@dataclass(frozen=True)
class Prediction:
    """of: the quantity, "loss" (nats per token) or "parameters". run: whose, or None for a budget's best."""

    law: str
    of: str
    run: str | None
    flops: float
    measured: float
    predicted: Estimate

    @property
    def error(self) -> float:
        """Of the prediction, relative to what is measured."""
        return self.predicted.value / self.measured - 1

    @property
    def inside(self) -> bool | None:
        """Whether what is measured lies in the interval; None where there is none."""
        low, high = self.predicted.low, self.predicted.high
        return None if low is None or high is None else low <= self.measured <= high

    def as_json(self) -> dict[str, Any]:
        own = {key: value for key, value in vars(self).items() if key != "predicted"}
        return own | {"predicted": self.predicted._asdict(), "error": self.error, "inside": self.inside}


@dataclass(frozen=True)
class Judgement:
    """fits: the laws, and what they were fitted to. held: the runs of the held-out budget. predictions: of
    every law. notes: what a reader must know, a line each."""

    fits: Fits
    held: Points
    predictions: tuple[Prediction, ...]
    notes: tuple[str, ...]

    @property
    def budget(self) -> float:
        return float(self.held.budget[0])

    @property
    def times(self) -> float:
        """The held-out budget over the largest fitted one."""
        return self.budget / float(self.fits.points.budget.max())

    @property
    def headline(self) -> Prediction | None:
        """What IsoFLOP parabolas say of the best loss of the held-out budget, or of its lowest run where
        that is not bracketed: they assume least of how the loss depends on N and D, and their intervals have
        held what they were tried on (MEASURED.md). Where they are of two budgets only, or without an
        interval: what the parametric law says of the run that it expects to be the best, chosen before its
        loss is looked at. Or else what there is."""
        losses = [one for one in self.predictions if one.of == "loss"]
        laws = [name for name in ORDER if any(one.law == name for one in losses)]
        parabola = self.fits.isoflops.get("parabola")
        if parabola is None or parabola.floored is None or parabola.spread is None:
            laws.sort(key=lambda name: name != "parametric")
        first = [one for one in losses if one.law == laws[0]] if laws else []
        return min(first, key=lambda one: one.predicted.value, default=None)

    def as_json(self) -> dict[str, Any]:
        return {
            "budget": self.budget,
            "fitted": len(self.fits.points),
            "times": self.times,
            "headline": None if self.headline is None else self.headline.as_json(),
            "predictions": [one.as_json() for one in self.predictions],
            "notes": list(self.notes),
        }


def judge(
    points: Points, budget: float | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> Judgement:
    """Hold out one budget, the largest where none is named, and predict its runs.

    Raises ValueError where there is no such budget, or no other.
    """
    points, notes = isoflop.finished(points)
    budgets = np.unique(points.budget)
    if len(budgets) < 2:
        raise ValueError(
            f"judgement: the table has {len(budgets)} budget; it needs one to fit and one to hold out"
        )
    if budget is not None and budget not in budgets:
        raise ValueError(f"judgement: no runs have the budget {budget:.4g}; name one of {_listed(budgets)}")
    chosen = float(budgets[-1] if budget is None else budget)
    held, rest = points.select(points.budget == chosen), points.select(points.budget != chosen)
    found = judged(fits_of(rest, resamples, seed), held, seed)
    return replace(found, notes=(*notes, *found.fits.notes, *found.notes))


def judged(fits: Fits, held: Points, seed: int) -> Judgement:
    """What laws say of runs of another budget."""
    predictions, notes = list[Prediction](), list[str]()
    if fits.parametric is not None and fits.resampled is not None:
        predictions += _by_parametric(fits.parametric, fits.resampled, fits.points, held, seed)
    for law in fits.isoflops.values():
        found, warnings = _by_isoflop(law, fits.points, held, seed)
        predictions += found
        notes += warnings
    return Judgement(fits, held, tuple(predictions), tuple(notes))


def _listed(budgets: np.ndarray) -> str:
    return ", ".join(f"{budget:.4g}" for budget in budgets)


def _by_parametric(fitted: Fit, law: Law, rest: Points, held: Points, seed: int) -> list[Prediction]:
    """The held-out runs. law: resampled. Their noise is that of the residuals, normal, and known as well as
    these tell."""
    resamples = len(law.constants())
    freedom = len(rest) - len(parametric.NAMES)
    spread = math.sqrt(float((fitted.residuals(rest) ** 2).sum()) / freedom)
    noise = spread * np.random.default_rng(seed).standard_t(freedom, (len(held), resamples))
    predicted = fitted.loss(held.parameters, held.tokens)
    again = np.log(law.loss(held.parameters[:, None], held.tokens[:, None])) + noise
    ends = np.exp(np.quantile(again, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)).T
    return [
        Prediction(
            "parametric", "loss", held.names[i], float(held.flops[i]), float(held.loss[i]),
            Estimate(float(predicted[i]), *ends[i].tolist()),
        )
        for i in range(len(held))
    ]  # fmt: skip


def _by_isoflop(law: Isoflop, rest: Points, held: Points, seed: int) -> tuple[list[Prediction], list[str]]:
    """The minimum of the held-out budget; or, where its runs do not bracket one, the lowest of them."""
    method = law.method
    curve = Curve.of(float(held.budget[0]), held)
    best = minimum(curve, method, held.loss)
    loss: PowerLaw | LossLaw = law.loss if law.floored is None else law.floored
    name = f"IsoFLOP, {method}"
    if best.reason is not None:
        lowest = int(np.argmin(held.loss))
        flops = float(held.flops[lowest])
        noise = None
        if law.spread is not None:
            noise = law.spread * np.random.default_rng(seed).standard_normal(isoflop.DRAWS)
        only = Prediction(
            name, "loss", held.names[lowest], flops, float(held.loss[lowest]), loss.at(flops, noise)
        )
        return [only], [
            f"{name}: the held-out budget does not bracket its minimum ({best.reason}), so that its lowest"
            " run, which may lie above, stands for it"
        ]
    errors = _measured(rest, held, curve, method, seed)
    wanted = (("loss", loss, best.loss, 2), ("parameters", law.parameters, best.parameters, 0))
    return [
        Prediction(
            name, of, None, best.flops, measured, by.at(best.flops, None if errors is None else errors[i])
        )
        for of, by, measured, i in wanted
    ], []


def _measured(rest: Points, held: Points, curve: Curve, method: str, seed: int) -> np.ndarray | None:
    """Errors [3, R] of a minimum as it is measured, in log N, log D, log loss; None where nothing tells."""
    try:
        surface = through(rest)
        losses = surface.drawn(held, isoflop.DRAWS, np.random.default_rng(seed + 1))
        found, bracketed, true = isoflop.remade(surface, curve, losses, method)
    except ValueError:
        return None
    found, true = np.vstack([found[:2], np.log(found[2:])]), np.append(true[:2], np.log(true[2]))
    return (found - true[:, None])[:, bracketed] if bracketed.any() else None
