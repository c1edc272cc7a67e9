"""Compute-optimal sizes by IsoFLOP curves: Hoffmann et al. 2022 (arXiv 2203.15556), approach 2.

Of each budget, the size with the lowest loss is the vertex of a parabola in log N through all its runs (least
squares), or the lowest point of an Akima interpolation (Akima 1970) through the mean loss of each size. The
latter assumes no shape, and smooths nothing: noise moves its minima several times as far. A minimum that its
runs do not bracket is reported, and not used. Through the others go power laws of compute by least squares in
logarithms.

**Intervals.** Three budgets of five sizes leave a line through the minima one degree of freedom, and a
parabola two: to resample either of these residuals is to resample almost nothing. And the methods err by
themselves: an IsoFLOP curve is no parabola, which shifts the vertex where sizes lie unevenly about the
optimum, and shifts the exponent where they do so differently at each budget (Czech et al., "Problems with
Chinchilla Approach 2"). So resamples are drawn from a smooth surface through all runs at once, the parametric
law: at the N and D of each run its loss times exp(noise), normal noise with the spread of the runs about the
surface. How well n runs know this spread is drawn too, as n - 5 degrees of freedom over a chi-squared number,
which makes a linear estimate's interval that of Student's t. Repeated seeds are further runs to this spread.
The method, with its rule of what is bracketed, finds the minima of each resample; these are compared with the
minimum of the surface itself, so that an interval accounts for noise and for the method's own error. The
surface decides on the interval, never on the minima or the laws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from launch.scaling.minima import FINE, SIZES, Curve, Minimum, article, minimum, valley
from launch.scaling.power import LossLaw, PowerLaw, floored, line, loss_law, power_law
from launch.scaling.surface import Surface, through
from launch.scaling.table import Points

DRAWS = 4000
BEYOND = 1.0  # by how much in log N, either way, the surface's minimum is looked for outside of a grid
LOST = 0.05  # share of resamples that may lack a minimum without a word


@dataclass(frozen=True)
class Isoflop:
    """Minima of all budgets and the laws through those that are bracketed.

    loss: a pure power law. floored: with an irreducible loss, where there are three budgets. spread: of a
    run's log loss about the smooth surface, None where there is none. lost: share of the minima of resamples
    that were not bracketed. notes: what a reader must know, a line each.
    """

    method: str
    minima: tuple[Minimum, ...]
    parameters: PowerLaw
    tokens: PowerLaw
    loss: PowerLaw
    floored: LossLaw | None
    spread: float | None
    lost: float | None
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "minima": [minimum.as_json() for minimum in self.minima],
            "parameters": self.parameters.as_json(),
            "tokens": self.tokens.as_json(),
            "loss": self.loss.as_json(),
            "loss_with_floor": None if self.floored is None else self.floored.as_json(),
            "spread": self.spread,
            "lost": self.lost,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Resampled:
    """Minima of R resamples at B budgets.

    found: [3, B, R], log N, log D and loss. there: [B, R], whether bracketed; in two budgets or more of each
    resample. true: [3, B], of what they are drawn from. spread: of the noise. lost: share of resamples with
    fewer budgets, which are left out.
    """

    found: np.ndarray
    there: np.ndarray
    true: np.ndarray
    spread: float
    lost: float

    def errors(self, which: int, flops: np.ndarray) -> np.ndarray:
        """[R, 2] of the line through the minima's N (0), D (1) or loss (2). flops: [B]."""
        found, true = self.found[which], self.true[which][:, None]
        off = np.log(found) - np.log(true) if which == 2 else found - true
        return line(flops, off, self.there)

    def floored(self, flops: np.ndarray) -> np.ndarray:
        """[R' + 1, 3], for `loss_law`, of the resamples with three budgets or more."""
        whole = self.there.sum(axis=0) > 2
        found = floored(flops, self.found[2][:, whole], self.there[:, whole])
        return np.concatenate([floored(flops, self.true[2][:, None]), found])


def fit(points: Points, method: str = "parabola", draws: int = DRAWS, seed: int = 0) -> Isoflop:
    """The minima of every budget of `points`, and power laws through those that are bracketed.

    Args:
        method: "parabola" or "akima".
        draws: resamples that make the intervals.

    Raises:
        ValueError: fewer than two budgets bracket their minimum; in one line that says why of each.
    """
    if method not in SIZES:
        raise ValueError(f"method: {method!r} is none of {', '.join(SIZES)}")
    points, notes = finished(points)
    curves = [Curve.of(budget, runs) for budget, runs in points.isoflops()]
    minima = [minimum(one, method, points.loss[points.budget == one.budget]) for one in curves]
    used = [curve for curve, found in zip(curves, minima, strict=True) if found.bracketed]
    if len(used) < len(curves):
        notes.append(_unused(minima, method))
    if len(used) < 2:
        raise ValueError(f"a power law needs 2 or more bracketed minima; {'; '.join(notes) or 'add budgets'}")
    if len(used) == 2:
        notes.append("two budgets fix a power law, but nothing shows whether it is one")
    resampled = None
    try:
        resampled = resample(points, used, method, draws, seed)
    except ValueError as error:
        notes.append(f"no intervals: {error}")
    if resampled is not None and resampled.lost > LOST:
        notes.append(
            f"with new noise, {resampled.lost:.0%} of the minima are not bracketed any more: the runs bracket"
            " them barely; add sizes further off"
        )
    return _laws(method, minima, resampled, notes)


def _unused(minima: Sequence[Minimum], method: str) -> str:
    """Which budgets are not used, and why. Those of too few sizes to be meant as a curve are only counted."""
    few = [one for one in minima if one.sizes < SIZES[method]]
    open_ended = [f"{one.budget:.3g} FLOP: {one.reason}" for one in minima if one.reason and one not in few]
    said = []
    if open_ended:
        more = f"{len(open_ended)} of {len(minima)} budgets do not bracket their minimum and are not used"
        said.append(f"{more}: {'; '.join(open_ended)}")
    if few:
        more = f"fewer than the {SIZES[method]} sizes that {article(method)} needs"
        said.append(f"{len(few)} of {len(minima)} budgets have {more}, and are not used")
    return "; ".join(said)


def _laws(
    method: str, minima: Sequence[Minimum], resampled: Resampled | None, notes: Sequence[str]
) -> Isoflop:
    used = [one for one in minima if one.bracketed]
    flops = np.array([one.flops for one in used])
    found = np.array([[one.parameters, one.tokens, one.loss] for one in used]).T

    def law(which: int) -> PowerLaw:
        return power_law(flops, found[which], None if resampled is None else resampled.errors(which, flops))

    with_floor = None
    if len(used) > 2:
        with_floor = loss_law(flops, found[2], None if resampled is None else resampled.floored(flops))
    spread, lost = (None, None) if resampled is None else (resampled.spread, resampled.lost)
    return Isoflop(method, tuple(minima), law(0), law(1), law(2), with_floor, spread, lost, tuple(notes))


def finished(points: Points) -> tuple[Points, list[str]]:
    """The runs with a loss, and a note on those without."""
    there = np.isfinite(points.loss)
    if there.all():
        return points, []
    lost = [name for name, good in zip(points.names, there, strict=True) if not good]
    return points.select(there), [f"left out, they diverged: {', '.join(lost)}"]


def resample(points: Points, curves: Sequence[Curve], method: str, draws: int, seed: int) -> Resampled:
    """Minima of all runs with new noise, at the budgets of the curves.

    Raises ValueError where no smooth surface fits the runs, it has no minimum at a budget, or most resamples
    bracket fewer than two.
    """
    surface = through(points)
    losses = surface.drawn(points, draws, np.random.default_rng(seed))
    again = [remade(surface, curve, losses[points.budget == curve.budget], method) for curve in curves]
    found, true = (np.stack([one[part] for one in again], axis=1) for part in (0, 2))
    there = np.stack([bracketed for _, bracketed, _ in again])
    whole = there.sum(axis=0) > 1
    if whole.mean() < 0.5:
        raise ValueError("with new noise, most resamples do not bracket two minima; add sizes or seeds")
    lost = 1 - float(there.mean())
    return Resampled(found[:, :, whole], there[:, whole], true, surface.spread, lost)


def remade(
    surface: Surface, curve: Curve, losses: np.ndarray, method: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minima of losses [n, R] that were drawn from a surface: log N, log D and loss [3, R], whether bracketed
    [R], and what the surface itself has [3].

    Raises ValueError where the surface has no minimum at this budget.
    """
    wide = np.linspace(curve.sizes[0] - BEYOND, curve.sizes[-1] + BEYOND, 2 * FINE)
    clean = surface.loss(np.exp(wide), np.exp(curve.log_tokens(wide)))
    place, loss, inside = valley(wide, clean[:, None])
    if not inside[0]:
        raise ValueError(f"a smooth surface through all runs has no minimum near {curve.budget:.3g} FLOP")
    true = np.stack([place, curve.log_tokens(place), loss])[:, 0]
    with np.errstate(over="ignore", invalid="ignore"):
        place, loss, bracketed = curve.lowest(method, losses)
        bracketed &= np.isfinite(place) & np.isfinite(loss) & (loss > 0)  # noise may throw a vertex anywhere
    found = np.where(bracketed, [place, curve.log_tokens(place), loss], 1.0)
    return found, bracketed, true
