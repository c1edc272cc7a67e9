"""A smooth surface of the loss over N and D through all runs, and how far the runs scatter about it.

It has the form of the parametric law, L = E + A / N^alpha + B / D^beta (arXiv 2203.15556, eq. 2), but is
fitted by plain least squares of log residuals: it serves to draw runs with new noise, for which the spread of
the residuals must be that of normal noise. The law itself, robust and with what is known of its constants, is
launch.scaling.parametric.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import chi2

from launch.scaling.table import Points

EXPONENTS = np.geomspace(0.05, 1.6, 14)  # of which each pair is tried as a start
MOST = 50.0  # of a drawn log loss, beyond which there is nothing to compute with
TINY = 1e-9  # nats per token: a surface that goes lower is taken to be here


@dataclass(frozen=True)
class Surface:
    """constants: E, log A, log B, alpha, beta, for N and D in units of their geometric means, exp(centre).

    spread: of log residuals, with `freedom` degrees of freedom: of the runs, less those of the constants.
    """

    constants: np.ndarray
    centre: tuple[float, float] = field(repr=False)
    spread: float
    freedom: int

    def loss(self, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """L of arrays of one shape, nats per token."""
        return _loss(self.constants, np.log(parameters) - self.centre[0], np.log(tokens) - self.centre[1])

    def drawn(self, points: Points, draws: int, random: np.random.Generator) -> np.ndarray:
        """Losses [n, draws] that the runs might have had: the surface's, times exp(normal noise).

        The noise of each draw has a spread of its own, as well as it is known: freedom * spread^2 over a
        chi-squared number of that freedom. So that few draws have steady quantiles, these numbers are even
        quantiles of their distribution, and each noise is drawn along with its opposite.
        """
        half = draws // 2
        even = chi2.ppf((np.arange(half) + 0.5) / half, self.freedom)
        noise = self.spread * np.sqrt(self.freedom / even) * random.standard_normal((len(points), half))
        own = self.loss(points.parameters, points.tokens)[:, None]
        return own * np.exp(np.concatenate([noise, -noise], axis=1).clip(-MOST, MOST))


def through(points: Points) -> Surface:
    """Raises ValueError where the runs do not suffice, or no such surface falls with both N and D."""
    points.require(6, "a smooth surface of the loss")
    n, d = np.log(points.parameters), np.log(points.tokens)
    centre = float(n.mean()), float(d.mean())
    n, d, logs = n - centre[0], d - centre[1], np.log(points.loss)

    def residuals(constants: np.ndarray) -> np.ndarray:
        return np.log(np.maximum(_loss(constants, n, d), TINY)) - logs

    def slopes(constants: np.ndarray) -> np.ndarray:
        _, a, b, alpha, beta = constants
        of_n, of_d = np.exp(a - alpha * n), np.exp(b - beta * d)
        whole = np.maximum(_loss(constants, n, d), TINY)
        return np.stack([np.ones_like(n), of_n, of_d, -n * of_n, -d * of_d], axis=1) / whole[:, None]

    found = [
        least_squares(residuals, start, slopes, x_scale=0.1, max_nfev=300)
        for start in _starts(n, d, points.loss)
    ]
    if not found:
        raise ValueError("no smooth surface through the runs falls with both N and D; add sizes and budgets")
    best = min(found, key=lambda one: one.cost)
    freedom = len(points) - len(best.x)
    return Surface(best.x, centre, math.sqrt(2 * best.cost / freedom), freedom)


def _loss(constants: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    floor, a, b, alpha, beta = constants
    return floor + np.exp(a - alpha * n) + np.exp(b - beta * d)


def _starts(n: np.ndarray, d: np.ndarray, loss: np.ndarray, count: int = 3) -> list[list[float]]:
    """The best pairs of exponents of a grid, with E, A and B by linear least squares."""
    alpha, beta = np.array(list(itertools.product(EXPONENTS, EXPONENTS))).T[:, :, None]
    terms = np.stack([np.ones((len(alpha), len(n))), np.exp(-alpha * n), np.exp(-beta * d)], axis=2)
    terms /= loss[:, None]
    levels = np.linalg.pinv(terms).sum(axis=2)
    squares = ((np.einsum("snk,sk->sn", terms, levels) - 1) ** 2).sum(axis=1)
    best = [s for s in np.argsort(squares) if levels[s, 1] > 0 and levels[s, 2] > 0][:count]
    return [
        [levels[s, 0], math.log(levels[s, 1]), math.log(levels[s, 2]), alpha[s, 0], beta[s, 0]] for s in best
    ]
