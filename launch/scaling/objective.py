"""What the parametric laws minimise, and the minimiser, for many starts or resamples at once.

The objective (Hoffmann et al. 2022, arXiv 2203.15556, section 3.3 and appendix D.3) is a sum over runs of
Huber losses of log residuals, delta = 1e-3, with the predicted log loss a log-sum-exp of three terms:

    z = (a - alpha log N, b - beta log D, e),    A = exp(a), B = exp(b), E = exp(e)

Noise is larger than delta, so this is close to the sum of absolute residuals: smooth, but in pieces. Damped
Newton steps with the exact Hessian get to the bottom of it where a quasi-Newton method slows down.

Shapes: S starts or resamples, n runs, 5 unknowns (a, b, e, alpha, beta).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

DELTA = 1e-3
TOLERANCE = 1e-12  # of the objective: a step that promises a smaller part of it ends the search
NOTHING = 1e-25  # the same where the objective is 0
ROUNDS = 300


class Smooth(Protocol):
    """A function of S points [S, k]. rows: which of the S, where only some are looked at."""

    def values(self, at: np.ndarray, rows: np.ndarray) -> np.ndarray: ...

    def derivatives(self, at: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


def mixture(terms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From log terms [S, 3, n]: the share of each in their sum [S, 3, n], and the log of the sum [S, n]."""
    highest = terms.max(axis=1, keepdims=True)
    shares = np.exp(terms - highest)
    total = shares.sum(axis=1, keepdims=True)
    shares /= total
    return shares, (highest + np.log(total))[:, 0]


def huber(residuals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The Huber loss of each residual, and its slope."""
    slopes = np.clip(residuals, -DELTA, DELTA)
    return slopes * (residuals - slopes / 2), slopes


class Objective:
    """The sum of Huber losses [S] of L(N, D) = E + A/N^alpha + B/D^beta, its gradient and Hessian.

    Args:
        sizes: log N, log D and log L, each [n].
        weights: of the runs [S, n], how often each counts; all once where None.
        centred: the unknowns are a - alpha mean(log N) and b - beta mean(log D) in place of a and b. These
            hardly depend on the exponents, so that the problem is far better conditioned.
    """

    def __init__(
        self,
        sizes: tuple[np.ndarray, np.ndarray, np.ndarray],
        weights: np.ndarray | None = None,
        centred: bool = True,
    ) -> None:
        x, y, self.log_loss = sizes
        self.centre = np.array([x.mean(), y.mean()]) if centred else np.zeros(2)
        self.x, self.y = x - self.centre[0], y - self.centre[1]
        self.weights = np.ones((1, len(x))) if weights is None else weights

    def to_centred(self, raw: np.ndarray) -> np.ndarray:
        """(a, b, e, alpha, beta) [S, 5] to the unknowns of this objective."""
        at = np.array(raw, dtype=float)
        at[..., :2] -= at[..., 3:] * self.centre
        return at

    def to_raw(self, at: np.ndarray) -> np.ndarray:
        """The reverse of to_centred."""
        raw = np.array(at, dtype=float)
        raw[..., :2] += raw[..., 3:] * self.centre
        return raw

    def values(self, at: np.ndarray, rows: np.ndarray) -> np.ndarray:
        _, predicted = mixture(self._terms(at))
        return (self._weights(rows) * huber(predicted - self.log_loss)[0]).sum(axis=1)

    def gradients(self, at: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values [S] and gradients [S, 5]."""
        shares, predicted = mixture(self._terms(at))
        losses, slopes = huber(predicted - self.log_loss)
        weights = self._weights(rows)
        pulls = shares * (weights * slopes)[:, None]
        gradient = np.concatenate(
            [pulls.sum(axis=2), -(pulls[:, 0] @ self.x)[:, None], -(pulls[:, 1] @ self.y)[:, None]], axis=1
        )
        return (weights * losses).sum(axis=1), gradient

    def derivatives(self, at: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values [S], gradients [S, 5] and Hessians [S, 5, 5]."""
        shares, predicted = mixture(self._terms(at))
        residuals = predicted - self.log_loss
        losses, slopes = huber(residuals)
        weights = self._weights(rows)
        slopes = weights * slopes
        jacobian = np.concatenate([shares, -shares[:, :1] * self.x, -shares[:, 1:2] * self.y], axis=1)
        gradient = (jacobian @ slopes[:, :, None])[:, :, 0]
        # The second derivative of the log-sum-exp is sum_k share_k dz_k dz_k^T - jacobian jacobian^T.
        curved = weights * (np.abs(residuals) < DELTA) - slopes
        hessian = (jacobian * curved[:, None]) @ jacobian.transpose(0, 2, 1)
        pulls = shares * slopes[:, None]
        hessian[:, range(3), range(3)] += pulls.sum(axis=2)
        for level, exponent, logs in ((0, 3, self.x), (1, 4, self.y)):
            cross = pulls[:, level] @ logs
            hessian[:, level, exponent] -= cross
            hessian[:, exponent, level] -= cross
            hessian[:, exponent, exponent] += pulls[:, level] @ logs**2
        return (weights * losses).sum(axis=1), gradient, hessian

    def _terms(self, at: np.ndarray) -> np.ndarray:
        terms = np.empty((len(at), 3, len(self.x)))
        terms[:, 0] = at[:, 0, None] - at[:, 3, None] * self.x
        terms[:, 1] = at[:, 1, None] - at[:, 4, None] * self.y
        terms[:, 2] = at[:, 2, None]
        return terms

    def _weights(self, rows: np.ndarray) -> np.ndarray:
        return self.weights if len(self.weights) == 1 else self.weights[rows]


def minimise(
    function: Smooth, starts: np.ndarray, free: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A local minimum from each start [S, k]: where it is, and its values [S].

    Newton's method on the absolute eigenvalues of the Hessian, so that it also goes down where the function
    is not convex, with the damping of Levenberg and Marquardt.

    Args:
        free: orthonormal directions [k, j] in which to search; all where None.
    """
    basis = np.eye(starts.shape[1]) if free is None else free
    at, found = np.array(starts, dtype=float), np.full(len(starts), np.inf)
    damping = np.full(len(starts), 1e-4)  # in parts of the largest eigenvalue
    rows = np.arange(len(starts))  # still on their way
    for _ in range(ROUNDS):
        found[rows], gradient, hessian = function.derivatives(at[rows], rows)
        sizes, axes = np.linalg.eigh(basis.T @ hessian @ basis)
        sizes = np.abs(sizes)
        slopes = ((gradient @ basis)[:, None] @ axes)[:, 0]
        damped = sizes + damping[rows, None] * sizes.max(axis=1, keepdims=True) + 1e-300
        step = -(axes @ (slopes / damped)[:, :, None])[:, :, 0] @ basis.T
        promised = (slopes**2 / damped * (1 - sizes / damped / 2)).sum(axis=1)
        reached = function.values(at[rows] + step, rows)
        lower = reached < found[rows]
        at[rows[lower]] += step[lower]
        found[rows[lower]] = reached[lower]
        damping[rows] = np.where(lower, damping[rows] / 8, damping[rows] * 8).clip(1e-12)
        rows = rows[(promised > TOLERANCE * found[rows] + NOTHING) & (damping[rows] < 1e6)]
        if not len(rows):
            break
    return at, found
