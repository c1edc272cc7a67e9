"""What repeated data are worth: the law of Muennighoff et al. 2023 (arXiv 2305.16264, section 3).

    L = E + A/N'^alpha + B/D'^beta
    D' = U_D + U_D R_D* (1 - exp(-R_D/R_D*)),    U_D = min(unique tokens, D),    R_D = D/U_D - 1
    N' = U_N + U_N R_N* (1 - exp(-R_N/R_N*)),    U_N = min(N best for U_D, N),   R_N = N/U_N - 1

A repetition is worth less than new tokens, and parameters beyond what the unique tokens call for are worth
less than the others; R_D* and R_N* say after how many that sets in. The constants of the base law are those
of a fit to runs without repetition, and held, as there; which N is the best for U_D follows from them. Only
runs that repeat data enter. The objective is that of the base law.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from launch.scaling.objective import DELTA, huber, minimise, mixture
from launch.scaling.parametric import Law, plain
from launch.scaling.resample import counts, interval
from launch.scaling.table import Points

FACTOR = 10.0  # between the ends of an interval: known to no order of magnitude
FEWEST = 4  # runs that repeat data: two more than constants
REPEATED = 1.01  # passes over the data, from which on a run repeats them
STARTS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # of R_D* and of R_N*
PLACES = 600  # into which the six decades of sizes that are looked at for the best one are divided


@dataclass(frozen=True)
class Constrained:
    """The law. base: its five constants, floats, or arrays [S] of resamples, as those here.

    repeats: R_D*. excess: R_N*; infinite where no run had more parameters than its unique tokens call for.
    """

    base: Law
    repeats: float | np.ndarray
    excess: float | np.ndarray

    def loss(
        self,
        parameters: float | np.ndarray,
        tokens: float | np.ndarray,
        unique_tokens: float | np.ndarray,
    ) -> np.ndarray:
        """Nats per token; whatever shape the constants and arguments broadcast to."""
        unique, repeated = _split(tokens, unique_tokens)
        useful, beyond = _split(parameters, self.base.parameters_for(unique))
        return self.base.loss(
            useful * np.exp(_worth(beyond, np.log(self.excess))[0]),
            unique * np.exp(_worth(repeated, np.log(self.repeats))[0]),
        )

    def optimum(
        self, flops: float, unique_tokens: float, per: float = 6.0
    ) -> tuple[float | np.ndarray, float | np.ndarray, np.ndarray]:
        """N, D and loss of the lowest loss with C = per * N * D and so many distinct tokens.

        The best of sizes 2.3 % apart, from a hundredth of the best one for new data to 10,000 times it: a
        larger one has fewer tokens to repeat.
        """
        middle = np.log(self.base.optimum(flops, per)[0])
        sizes = np.exp(np.asarray(middle)[..., None] + np.linspace(-2, 4, PLACES + 1) * math.log(10))
        tokens = flops / per / sizes
        every = Constrained(
            Law(*(np.asarray(value)[..., None] for value in np.moveaxis(self.base.constants(), -1, 0))),
            np.asarray(self.repeats)[..., None],
            np.asarray(self.excess)[..., None],
        )
        losses = every.loss(sizes, tokens, unique_tokens)
        best = losses.argmin(axis=-1)[..., None]
        return tuple(np.take_along_axis(of, best, axis=-1)[..., 0] for of in (sizes, tokens, losses))  # type: ignore[return-value]

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Of resampled constants, at 95 %."""
        return {name: interval(np.asarray(getattr(self, name))) for name in ("repeats", "excess")}


@dataclass(frozen=True)
class Fit(Constrained):
    """At the minimum of the objective, a sum over `runs` runs, all of which repeat data."""

    objective: float
    runs: int

    def as_json(self) -> dict[str, float | int | None]:
        """repeats, excess: None where infinite."""
        names = ("repeats", "excess", "objective")
        return {name: plain(getattr(self, name)) for name in names} | {"runs": self.runs}


def repeating(points: Points) -> np.ndarray:
    """Which runs have gone over their data more than once, bool [n]."""
    if points.unique_tokens is None:
        return np.zeros(len(points), dtype=bool)
    return points.tokens >= REPEATED * points.unique_tokens


def fit(points: Points, base: Law) -> Fit:
    """R_D* and R_N* that fit the runs which repeat data best.

    Args:
        points: others among them are left aside.
        base: fitted to runs that repeat nothing (parametric.fit of points.select(~repeating(points))).

    Raises:
        ValueError: too few runs repeat data, or the base law has no best size.
    """
    runs = _runs(points)
    if not (base.alpha > 0 and base.beta > 0):
        raise ValueError(
            f"the base law has no best size, as alpha = {base.alpha:.3g} and beta = {base.beta:.3g} are not"
            " both positive; add runs that repeat no data"
        )
    objective = _Objective(runs, base, np.ones((1, len(runs))))
    starts = np.log([(repeats, excess) for repeats in STARTS for excess in STARTS])
    at, values = minimise(objective, starts, objective.free)
    repeats, excess = np.exp(at[values.argmin()])
    return Fit(
        base, float(repeats), float(excess) if objective.bounded else math.inf, float(values.min()), len(runs)
    )


def bootstrap(points: Points, fitted: Fit, bases: Law, seed: int = 0) -> Constrained:
    """The law refitted to runs drawn with replacement, each time on another base law.

    Args:
        bases: resampled, each of shape [S] (parametric.bootstrap); so what is not known of the base law is in
            the result too. NaN where a base law has no best size.
    """
    runs = _runs(points)
    rises = np.flatnonzero((np.asarray(bases.alpha) > 0) & (np.asarray(bases.beta) > 0))
    usable = Law(*bases.constants()[rises].T)
    objective = _Objective(runs, usable, counts(len(runs), len(rises), seed))
    known = np.log([float(fitted.repeats), float(fitted.excess) if objective.bounded else 1.0])
    at, lowest = minimise(objective, np.repeat(known[None], len(rises), axis=0), objective.free)
    for other in STARTS[::2]:  # with few runs a resample may prefer quite another value
        tried, values = minimise(objective, np.full_like(at, math.log(other)), objective.free)
        at, lowest = np.where((values < lowest)[:, None], tried, at), np.minimum(values, lowest)
    found = np.full((len(np.asarray(bases.alpha)), 2), np.nan)
    with np.errstate(over="ignore"):
        found[rises] = np.exp(at)
    return Constrained(
        bases, found[:, 0], found[:, 1] if objective.bounded else np.full(len(found), math.inf)
    )


def warnings(fitted: Fit, resampled: Constrained) -> list[str]:
    """What a reader of the fit should know, in plain words. Empty: nothing."""
    found = []
    for name, value, (low, high) in (
        ("R_D*", fitted.repeats, resampled.intervals()["repeats"]),
        ("R_N*", fitted.excess, resampled.intervals()["excess"]),
    ):
        if value == math.inf:
            found.append(
                f"{name} is not fixed: no run has more parameters than its distinct tokens call for, so that"
                " larger models than these are taken to be worth their full size."
            )
        elif not high < FACTOR * low:
            found.append(
                f"{name} is known to no order of magnitude: its 95 % interval is {low:.3g} to {high:.3g}."
            )
    return found


class _Objective:
    """The sum of Huber losses [S] over log R_D* and log R_N* [S, 2], its gradient and Hessian.

    bounded: whether any run has parameters in excess, so that R_N* matters. free: the directions to search.
    """

    def __init__(self, runs: Points, base: Law, weights: np.ndarray) -> None:
        unique, repeated = _split(runs.tokens, runs.unique_tokens)
        column = Law(*(np.reshape(value, (-1, 1)) for value in np.moveaxis(base.constants(), -1, 0)))
        useful, excess = _split(runs.parameters, column.parameters_for(unique))
        self.weights, self.log_loss = weights, np.log(runs.loss)
        self.exponents = np.stack([column.alpha, column.beta])  # [2, S, 1]
        self.beyond = np.stack([excess, np.broadcast_to(repeated, excess.shape)])  # [2, S, n]
        self.bounded = bool((excess > 0).any())
        self.free = np.eye(2) if self.bounded else np.eye(2)[:, :1]
        self.levels = np.stack(  # of the log terms, before what is beyond; [3, S, n]
            [
                column.log_A - column.alpha * np.log(useful),
                np.broadcast_to(column.log_B - column.beta * np.log(unique), excess.shape),
                np.broadcast_to(column.log_E, excess.shape),
            ]
        )

    def values(self, at: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return self.derivatives(at, rows)[0]

    def derivatives(self, at: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        of = rows if self.levels.shape[1] > 1 else np.zeros(len(rows), dtype=int)
        stars = at.T[::-1, :, None]  # of N' first, as in the terms
        worth, slope, bend = -self.exponents[:, of] * _worth(self.beyond[:, of], stars)
        terms = self.levels[:, of].copy()
        terms[:2] += worth
        shares, predicted = mixture(terms.transpose(1, 0, 2))
        residuals = predicted - self.log_loss
        losses, pulls = huber(residuals)
        weights = self.weights[of]
        pulls = weights * pulls
        share = shares[:, :2].transpose(1, 0, 2)
        moved = share * slope  # [2, S, n], of the log loss by each unknown
        curved = weights * (np.abs(residuals) < DELTA) - pulls
        hessian = np.einsum("isn,jsn,sn->sij", moved, moved, curved)
        own = (pulls * share * (slope**2 + bend)).sum(axis=2)  # [2, S]
        hessian[:, range(2), range(2)] += own.T
        gradient = (pulls * moved).sum(axis=2).T
        return (weights * losses).sum(axis=1), gradient[:, ::-1], hessian[:, ::-1, ::-1]


def _worth(beyond: np.ndarray, log_star: np.ndarray) -> np.ndarray:
    """log(1 + R* (1 - exp(-R/R*))) and its first and second derivative by log R*: [3, ...]."""
    star = np.exp(np.clip(log_star, -30, 30))
    left = np.exp(-beyond / star)
    gain = -star * np.expm1(-beyond / star)
    rise = gain - beyond * left
    ratio = rise / (1 + gain)
    return np.stack([np.log1p(gain), ratio, (rise - beyond**2 * left / star) / (1 + gain) - ratio**2])


def _split(amount: float | np.ndarray, useful: float | np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """What is useful of an amount, and the rest in parts of that."""
    first = np.minimum(amount, np.asarray(useful))
    return first, amount / first - 1


def _runs(points: Points) -> Points:
    """Those that repeat data. Raises ValueError where they are too few."""
    runs = points.select(repeating(points))
    if len(runs) < FEWEST:
        column = "" if points.unique_tokens is not None else "the table has no column unique_tokens; "
        raise ValueError(
            f"the law of repeated data needs {FEWEST} runs or more with fewer unique_tokens than tokens, and"
            f" {len(runs)} have; {column}add such runs"
        )
    return runs
