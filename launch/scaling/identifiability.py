"""Which constants of E + A/N^alpha + B/D^beta the runs fix, and which they do not.

Profile of a constant: the lowest objective that any law has in which the constant is held at a value. Huber's
sum is the logarithm of no density that the noise is known to have, so how far the profile may rise is taken
from the bootstrap: in 95 % of resamples the fit to the resample lies less far below the best law that keeps
the constant of all runs. Where the profile stays below that, the runs do not exclude a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.linalg import null_space

from launch.scaling.objective import Objective, minimise
from launch.scaling.parametric import FEWEST, NAMES, Fit, Law, exp, logs, plain, usable
from launch.scaling.resample import LEVEL, counts
from launch.scaling.table import NAMED, Points

VALUES = 41  # of a constant, in its profile
REACH = 2.5  # how far a profile goes to either side, in parts of the bootstrap interval's length there
RESAMPLES = 400  # for how far a profile may rise
FACTOR = 10.0  # between the ends of an interval: A, B or E is known to no order of magnitude
VISIBLE = 1e-3  # of the loss: a term that is a smaller part of it is not seen
SPREAD = 1.4826  # of a normal distribution, over its median absolute deviation
OFF, LEAST = 8.0, 0.02  # spreads, and of the loss, beyond which a run is far off
ALIKE = 0.95  # a correlation from which two quantities are not told apart
LOGS = 3  # the first constants are positive, and looked at as logarithms


@dataclass(frozen=True)
class Profile:
    """values: of the constant; objectives: the minimum with each; limit: that the data do not exclude.

    low, high: where the profile crosses the limit; None where it does not, as far as `values` go.
    """

    constant: str
    values: np.ndarray
    objectives: np.ndarray
    limit: float
    low: float | None
    high: float | None

    def as_json(self) -> dict[str, object]:
        return {
            "values": [plain(value) for value in self.values],
            "objectives": self.objectives.tolist(),
            "limit": self.limit,
            "low": None if self.low is None else plain(self.low),
            "high": None if self.high is None else plain(self.high),
        }


def profiles(points: Points, fitted: Fit, resampled: Law, seed: int = 0) -> dict[str, Profile]:
    """Of each constant, by name. resampled: from parametric.bootstrap."""
    sizes = logs(points)
    objective = Objective(sizes)
    weights = counts(len(points), RESAMPLES, seed, usable(points))
    again = Objective(sizes, weights)
    best = objective.to_centred(fitted.constants())
    free, values = minimise(again, np.repeat(best[None], RESAMPLES, axis=0))
    found = {}
    for index, name in enumerate(NAMES):
        held = _held(objective, index)
        basis = null_space(held[None])
        fixed = minimise(again, free + np.outer(held @ best - free @ held, _along(held)), basis)[1]
        limit = fitted.objective + float(np.quantile(fixed - values, LEVEL))
        places = _places(resampled.constants()[:, index], float(fitted.constants()[index]), index < LOGS)
        starts = best + np.outer(places - held @ best, _along(held))
        lowest = _along_profile(objective, starts, basis)
        low, high = _crossings(places, lowest, fitted.objective, limit)
        own = exp if index < LOGS else np.array
        ends = [None if end is None else float(own(end)) for end in (low, high)]
        found[name] = Profile(name, np.asarray(own(places)), lowest, limit, *ends)
    return found


def correlations(resampled: Law) -> dict[str, float]:
    """Over resamples, of each pair of constants, A, B and E by their logarithms: {"A and alpha": 0.99}."""
    table = np.corrcoef(resampled.constants().T)
    return {
        f"{first} and {second}": float(table[i, j])
        for i, first in enumerate(NAMES)
        for j, second in enumerate(NAMES)
        if i < j
    }


def warnings(
    points: Points, fitted: Fit, resampled: Law, profiled: Mapping[str, Profile] | None = None
) -> list[str]:
    """What a reader of the fit should know, in plain words; a sentence or two each. Empty: nothing."""
    return [
        *_of_search(fitted),
        *_of_runs(points),
        *_of_outliers(points, fitted),
        *_of_terms(points, fitted),
        *_of_constants(fitted, resampled, profiled or {}),
    ]


def _of_search(fitted: Fit) -> list[str]:
    found = []
    if fitted.starts and fitted.reached < fitted.starts / 2:
        share = fitted.reached / fitted.starts
        found.append(
            f"Most starts miss the optimum: {fitted.reached} of {fitted.starts} of the grid reach it"
            f" ({share:.1%}). A fit from one start, or from a few, is likely to be another law."
        )
    if fitted.linear_reached < 2 and fitted.reached < 2:
        found.append("A single start reached the lowest objective found; a lower one may have been missed.")
    return found


def _of_runs(points: Points) -> list[str]:
    found = []
    if len(points) < 2 * FEWEST:
        found.append(
            f"{len(points)} runs for five constants: few are left to tell how good the fit is, and the"
            " intervals are rough."
        )
    together = float(np.corrcoef(np.log(points.parameters), np.log(points.tokens))[0, 1])
    if abs(together) > ALIKE:
        found.append(
            f"Size and tokens vary together (correlation {together:.3f} of their logarithms): the two terms"
            " can hardly be told apart. Add runs of the same size with fewer and with more tokens."
        )
    return found


def _of_outliers(points: Points, fitted: Fit) -> list[str]:
    """Runs that the law, whose objective hardly sees them, leaves far off."""
    residuals = fitted.residuals(points)
    spread = SPREAD * float(np.median(np.abs(residuals - np.median(residuals))))
    far = np.flatnonzero(np.abs(residuals) > max(OFF * spread, LEAST))
    if not len(far):
        return []
    far = far[np.argsort(-np.abs(residuals[far]))]
    names = ", ".join(f"{points.names[i]} ({np.expm1(residuals[i]):+.0%})" for i in far[:NAMED])
    more = f" and {len(far) - NAMED} more" if len(far) > NAMED else ""
    return [
        f"{len(far)} of {len(points)} runs are far off the law: {names}{more}. IsoFLOP minima follow such"
        " runs; where they went wrong, leave them out (an empty loss, or drop_highest)."
    ]


def _of_terms(points: Points, fitted: Fit) -> list[str]:
    losses = fitted.loss(points.parameters, points.tokens)
    found = []
    for term, values, of in (
        ("A/N^alpha", exp(fitted.log_A - fitted.alpha * np.log(points.parameters)), "on size"),
        ("B/D^beta", exp(fitted.log_B - fitted.beta * np.log(points.tokens)), "on tokens"),
        ("E", fitted.E, "on neither"),
    ):
        share = float(np.median(values / losses))
        if share < VISIBLE:
            found.append(
                f"{term} is {share:.2g} of the loss, in the median: what of the loss depends {of} is not to"
                " be seen in these runs."
            )
    return found


def _of_constants(fitted: Fit, resampled: Law, profiled: Mapping[str, Profile]) -> list[str]:
    found = []
    for name, (low, high) in resampled.intervals().items():
        if name in NAMES[:LOGS] and not high < FACTOR * low:
            found.append(
                f"{name} is known to no order of magnitude: its 95 % interval is {low:.3g} to {high:.3g}."
            )
        if name in ("alpha", "beta") and not low > 0:
            found.append(
                f"{name} may be 0 or less (95 % interval {low:.3g} to {high:.3g}): no trend is certain."
            )
    pairs = correlations(resampled)
    for level, exponent, of in (("A", "alpha", "size"), ("B", "beta", "tokens")):
        pair = f"{level} and {exponent}"
        if pairs[pair] > ALIKE:
            found.append(
                f"{pair} move together (correlation {pairs[pair]:.4f} over resamples): the runs fix the term"
                f" of {of} where they lie, and neither constant by itself. Quote both or neither."
            )
    for name, profile in profiled.items():
        sides = [side for side, end in (("smaller", profile.low), ("larger", profile.high)) if end is None]
        if sides:
            found.append(
                f"{name} = {getattr(fitted, name):.4g} is not fixed by the runs: {' and '.join(sides)} values"
                " fit about as well, as far as was looked"
                f" ({profile.values[0]:.3g} to {profile.values[-1]:.3g})."
            )
    return found


def _held(objective: Objective, index: int) -> np.ndarray:
    """The constant [5] as a linear function of the objective's centred unknowns."""
    return np.array([objective.to_raw(unit)[index] for unit in np.eye(len(NAMES))])


def _along(held: np.ndarray) -> np.ndarray:
    """The direction [5] in which the constant grows by 1 and the predictions near the centre change least."""
    last = int(np.flatnonzero(held)[-1])
    direction = np.zeros(len(held))
    direction[last] = 1 / held[last]
    return direction


def _places(resampled: np.ndarray, estimate: float, is_log: bool) -> np.ndarray:
    """Values [VALUES] of a constant around the estimate, which is one of them."""
    low, high = np.nanquantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    furthest = np.log(1e6) if is_log else 3.0
    below = min(REACH * max(estimate - low, 1e-6), furthest)
    above = min(REACH * max(high - estimate, 1e-6), furthest)
    half = np.linspace(0, 1, VALUES // 2 + 1)
    return np.concatenate([(estimate - below * half)[:0:-1], estimate + above * half])


def _along_profile(objective: Objective, starts: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """The lowest objective [K] at each place of a profile, its neighbours' laws being tried as starts too."""
    at, lowest = minimise(objective, starts, basis)
    for shift in (1, -1) * 3:
        # A neighbour's law, moved along what is free to the place's own value of the constant.
        near = starts + (np.roll(at, shift, axis=0) - starts) @ basis @ basis.T
        tried, values = minimise(objective, near, basis)
        better = values < lowest
        at[better], lowest[better] = tried[better], values[better]
    return lowest


def _crossings(
    places: np.ndarray, lowest: np.ndarray, minimum: float, limit: float
) -> tuple[float | None, float | None]:
    """Where a profile first rises to the limit on either side of its middle; None: nowhere.

    The root of the rise is nearly straight near the minimum, and is what is interpolated.
    """
    middle = len(places) // 2
    rises = np.sqrt(np.maximum(lowest - minimum, 0)) - np.sqrt(limit - minimum)
    ends: list[float | None] = []
    for order in (np.arange(middle, -1, -1), np.arange(middle, len(places))):
        above = np.flatnonzero(rises[order] >= 0)
        if not len(above) or above[0] == 0:
            ends.append(None)
            continue
        inner, outer = order[above[0] - 1], order[above[0]]
        share = -rises[inner] / (rises[outer] - rises[inner])
        ends.append(float(places[inner] + share * (places[outer] - places[inner])))
    return ends[0], ends[1]
