"""L(N, D) = E + A/N^alpha + B/D^beta, fitted to runs (Hoffmann et al. 2022, arXiv 2203.15556, approach 3).

The objective is theirs (launch.scaling.objective), and so is the grid of 4,500 starts, each followed by BFGS
with the analytic gradient in their coordinates. Most of these starts stop early, on plains where one of the
terms has vanished, so the minimum is looked for by other means too: the best of the grid are polished by
Newton steps, and so are starts for which A, B and E come from linear regression at given exponents. The
objective is a sum over runs, not a mean: the mean of such small losses lets BFGS stop at once, which is what
became of the published constants (Besiroglu et al. 2024, arXiv 2404.10102).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from launch.scaling.objective import DELTA, Objective, minimise
from launch.scaling.resample import Progress, counts, interval
from launch.scaling.table import Points

NAMES = ("A", "B", "E", "alpha", "beta")
FEWEST = 7  # runs: two more than constants
DISTINCT = 3  # sizes and lengths: with fewer, a term's level and its exponent cannot be told apart
# (a, b, e, alpha, beta), in Hoffmann et al., appendix D.3.
GRID = np.array(
    [
        (a, b, e, alpha, beta)
        for alpha, beta, e, a, b in itertools.product(
            (0, 0.5, 1, 1.5, 2), (0, 0.5, 1, 1.5, 2), (-1, -0.5, 0, 0.5, 1), range(0, 26, 5), range(0, 26, 5)
        )
    ],
    dtype=float,
)
EXPONENTS = (0.1, 0.2, 0.3, 0.45, 0.7, 1.0, 1.5)  # alpha and beta of the linear starts
REACHED = 1e-6  # of the minimum: so far above it a start may end and have reached it
CHUNK = 100  # starts or resamples between two reports of progress


@dataclass(frozen=True)
class Law:
    """The constants, each a float, or an array [S] of resamples. N: parameters, D: tokens, C: FLOP.

    log_A and log_B are kept because A and B can be too large for a float.
    """

    log_A: float | np.ndarray
    log_B: float | np.ndarray
    log_E: float | np.ndarray
    alpha: float | np.ndarray
    beta: float | np.ndarray

    @property
    def A(self) -> float | np.ndarray:
        return exp(self.log_A)

    @property
    def B(self) -> float | np.ndarray:
        return exp(self.log_B)

    @property
    def E(self) -> float | np.ndarray:
        return exp(self.log_E)

    @property
    def a(self) -> float | np.ndarray:
        """The best N grows as C^a."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> float | np.ndarray:
        """The best D grows as C^b."""
        return self.alpha / (self.alpha + self.beta)

    def loss(self, parameters: float | np.ndarray, tokens: float | np.ndarray) -> np.ndarray:
        """Nats per token; whatever shape the constants, N and D broadcast to."""
        terms = (
            self.log_A - self.alpha * np.log(parameters),
            self.log_B - self.beta * np.log(tokens),
            self.log_E,
        )
        with np.errstate(invalid="ignore"):  # NaN stays NaN
            return np.exp(np.logaddexp(np.logaddexp(terms[0], terms[1]), terms[2]))

    def optimum(
        self, flops: float | np.ndarray, per: float = 6.0
    ) -> tuple[float | np.ndarray, float | np.ndarray, np.ndarray]:
        """N, D and loss of the lowest loss with C = per * N * D (Hoffmann et al., equation 4).

        NaN where an exponent is not positive, so that there is no such point.
        """
        ratio = np.log(flops) - math.log(per)
        parameters = exp(self._log_g() + self.a * ratio)
        tokens = exp(self.b * ratio - self._log_g())
        return parameters, tokens, self.loss(parameters, tokens)

    def tokens_for(self, parameters: float | np.ndarray) -> float | np.ndarray:
        """D with which N parameters are the best for their compute, whatever k in C = k N D."""
        return exp((np.log(parameters) * self.b - self._log_g()) / self.a)

    def parameters_for(self, tokens: float | np.ndarray) -> float | np.ndarray:
        """N that is the best for its compute when trained on D tokens: the reverse of tokens_for."""
        return exp((np.log(tokens) * self.a + self._log_g()) / self.b)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Of resampled constants: the 95 % interval of each, and of a and b."""
        found = {}
        for name in (*NAMES, "a", "b"):
            if name in ("A", "B", "E"):  # some can be too large for a float, their logarithms never
                low, high = interval(np.asarray(getattr(self, f"log_{name}")))
                found[name] = float(exp(low)), float(exp(high))
            else:
                found[name] = interval(np.asarray(getattr(self, name)))
        return found

    def constants(self) -> np.ndarray:
        """(log A, log B, log E, alpha, beta), [5] or [S, 5]."""
        return np.stack([self.log_A, self.log_B, self.log_E, self.alpha, self.beta], axis=-1)

    def _log_g(self) -> float | np.ndarray:
        """log G, with N = G (C/6)^a and D = (C/6)^b / G."""
        rises = (np.asarray(self.alpha) > 0) & (np.asarray(self.beta) > 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.log(self.alpha) + self.log_A - np.log(self.beta) - self.log_B
        return np.where(rises, ratio / (np.asarray(self.alpha) + self.beta), np.nan)[()]


@dataclass(frozen=True)
class Fit(Law):
    """The law at the minimum of the objective, which is a sum over `runs` runs.

    starts, reached: of the grid, and how many of them ended within REACHED of the minimum; linear_starts,
    linear_reached: the same of those from linear regression.
    """

    objective: float
    runs: int
    starts: int
    reached: int
    linear_starts: int
    linear_reached: int

    def residuals(self, points: Points) -> np.ndarray:
        """log of the measured loss over the predicted one [n]."""
        return np.log(points.loss) - np.log(self.loss(points.parameters, points.tokens))

    def as_json(self) -> dict[str, float | int | None]:
        names = (*NAMES, "a", "b", "objective")
        counted = ("runs", "starts", "reached", "linear_starts", "linear_reached")
        return {name: plain(getattr(self, name)) for name in names} | {
            name: getattr(self, name) for name in counted
        }


def fit(points: Points, grid: bool = True, progress: Progress | None = None) -> Fit:
    """The law that fits the runs best.

    Args:
        grid: follow Hoffmann et al.'s starts too, about 10 ms each. They say how hard the minimum is to
            find; the linear starts alone have found the same one wherever both were tried.

    Raises:
        ValueError: too few runs, sizes or lengths.
    """
    check(points)
    sizes = logs(points)
    objective = Objective(sizes)
    starts = linear_starts(sizes)
    at, values = minimise(objective, objective.to_centred(starts))
    ended = _follow_grid(sizes, progress) if grid else (np.empty((0, 5)), np.empty(0))
    best = np.argsort(ended[1])[:5]
    polished = minimise(objective, objective.to_centred(ended[0][best]))
    every = np.concatenate([at, polished[0]]), np.concatenate([values, polished[1]])
    lowest = int(np.nanargmin(every[1]))
    minimum = float(every[1][lowest])
    near = minimum * (1 + REACHED) + REACHED * DELTA**2 * len(points)
    log_a, log_b, log_e, alpha, beta = objective.to_raw(every[0][lowest]).tolist()
    return Fit(
        log_a,
        log_b,
        log_e,
        alpha,
        beta,
        minimum,
        len(points),
        starts=len(ended[1]),
        reached=int((ended[1] <= near).sum()),
        linear_starts=len(starts),
        linear_reached=int((values <= near).sum()),
    )


def bootstrap(
    points: Points, fitted: Fit, resamples: int = 1000, seed: int = 0, progress: Progress | None = None
) -> Law:
    """The constants [resamples] of fits to runs drawn with replacement.

    Each resample is fitted from the constants of all runs, and from those of the resample before it: starts
    that are spread as the constants themselves are.
    """
    weights = counts(len(points), resamples, seed, usable(points))
    sizes = logs(points)
    found = []
    for start in range(0, resamples, CHUNK):
        objective = Objective(sizes, weights[start : start + CHUNK])
        first = np.repeat(objective.to_centred(fitted.constants())[None], len(objective.weights), axis=0)
        at, values = minimise(objective, first)
        again, lower = minimise(objective, np.roll(at, 1, axis=0))
        found.append(objective.to_raw(np.where((lower < values)[:, None], again, at)))
        if progress:
            progress(start + len(first), resamples)
    return Law(*np.concatenate(found).T)


def check(points: Points) -> None:
    """Raises ValueError where no law of five constants can be fitted to the runs."""
    points.require(FEWEST, "the law E + A/N^alpha + B/D^beta", DISTINCT)


def logs(points: Points) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log N, log D and log L, each [n]."""
    return np.log(points.parameters), np.log(points.tokens), np.log(points.loss)


def usable(points: Points) -> Callable[[np.ndarray], np.ndarray]:
    """Of counts [S, n] of the runs, which rows leave as many distinct sizes and lengths as the law needs."""
    columns = [np.unique(values, return_inverse=True)[1] for values in (points.parameters, points.tokens)]
    places = [(column[:, None] == np.arange(column.max() + 1)).astype(float) for column in columns]

    def enough(drawn: np.ndarray) -> np.ndarray:
        distinct = [(drawn @ place > 0).sum(axis=1) for place in places]
        return (np.minimum(*distinct) >= DISTINCT) & ((drawn > 0).sum(axis=1) >= len(NAMES))

    return enough


def linear_starts(sizes: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    """(a, b, e, alpha, beta) [S, 5]: at each pair of exponents, A, B and E by regression of relative errors.

    A term that comes out negative starts at a thousandth of the loss.
    """
    x, y, log_loss = sizes
    middle = x.mean(), y.mean()
    found = []
    for alpha, beta in itertools.product(EXPONENTS, EXPONENTS):
        terms = np.stack(
            [np.exp(-alpha * (x - middle[0])), np.exp(-beta * (y - middle[1])), np.ones_like(x)], axis=1
        )
        levels = np.linalg.lstsq(terms / np.exp(log_loss)[:, None], np.ones_like(x), rcond=None)[0]
        a, b, e = np.log(levels.clip(1e-3 * math.exp(log_loss.mean())))
        found.append((a + alpha * middle[0], b + beta * middle[1], e, alpha, beta))
    return np.array(found)


def _follow_grid(
    sizes: tuple[np.ndarray, np.ndarray, np.ndarray], progress: Progress | None
) -> tuple[np.ndarray, np.ndarray]:
    """Where BFGS ends from each start of the grid, (a, b, e, alpha, beta) [S, 5], and the objective there."""
    objective, row = Objective(sizes, centred=False), np.zeros(1, dtype=int)

    def value_and_gradient(at: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = objective.gradients(at[None], row)
        return float(value[0]), gradient[0]

    ends = []
    with np.errstate(all="ignore"):  # a line search may look far away
        for index, start in enumerate(GRID, 1):
            ends.append(minimize(value_and_gradient, start, jac=True, method="BFGS"))
            if progress and index % CHUNK == 0:
                progress(index, len(GRID))
    values = np.array([end.fun for end in ends])
    return np.array([end.x for end in ends]), np.where(np.isfinite(values), values, np.inf)


def plain(value: float | np.ndarray) -> float | None:
    """A number for JSON: None where it is none."""
    return float(value) if np.isfinite(value) else None


def exp(value: float | np.ndarray) -> float | np.ndarray:
    """Infinite where it is too large for a float."""
    with np.errstate(over="ignore"):
        result = np.exp(value)
    return float(result) if np.ndim(result) == 0 else result
