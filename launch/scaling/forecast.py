"""What a law says of a budget, of a size, and of a data set that cannot grow.

All of it is of the parametric law L(N, D) (launch.scaling.parametric) with C = per * N * D, `per` being what
the fitted runs spent; intervals are those of its resamples. Beside it stands what the power laws through the
IsoFLOP minima say of the same budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from launch.scaling.constrained import Constrained
from launch.scaling.isoflop import Isoflop
from launch.scaling.parametric import Fit, Law, plain
from launch.scaling.power import Estimate
from launch.scaling.resample import interval
from launch.scaling.table import Points

OFF = 2.0  # times the best size, and a part of it
NEAR = 1.05  # times what was fitted, which is as good as fitted: budgets are of whole steps
DOUBTFUL = 100.0  # times what was fitted, beyond which no run shows anything


@dataclass(frozen=True)
class Fitted:
    """What a forecast is made from. resampled: constants [S]. per: FLOP per parameter and token. points: the
    fitted runs. constrained: the law of repeated data, and its resamples."""

    law: Fit
    resampled: Law
    isoflop: Isoflop | None
    constrained: tuple[Constrained, Constrained] | None
    per: float
    points: Points


def beyond(fitted: Fitted, found: dict[str, Any]) -> list[tuple[str, float]]:
    """Of a part of a forecast, the quantities that no fitted run comes near: over the largest fitted one if
    above it, over the smallest if below."""
    outside = []
    for key, own in (
        ("budget", "flops"),
        ("parameters", "parameters"),
        ("tokens", "tokens"),
        ("unique_tokens", "tokens"),
    ):
        value = found.get(key)
        value = value["value"] if isinstance(value, dict) else value
        least, most = float(getattr(fitted.points, own).min()), float(getattr(fitted.points, own).max())
        if value is not None and not least / NEAR <= value <= most * NEAR:
            outside.append((key, value / (most if value > most else least)))
    return outside


def at_budget(fitted: Fitted, flops: float) -> dict[str, Any]:
    """Best N, D and loss of `flops` with intervals, and the cost of other sizes."""

    def best(index: int) -> Callable[[Law], np.ndarray]:
        return lambda law: np.asarray(law.optimum(flops, fitted.per)[index])

    found: dict[str, Any] = {
        "budget": flops,
        "parameters": _estimate(fitted, best(0)),
        "tokens": _estimate(fitted, best(1)),
        "loss": _estimate(fitted, best(2)),
        "off": [_off(fitted, flops, times) for times in (1 / OFF, OFF)],
    }
    if fitted.isoflop is not None:
        powers = fitted.isoflop
        of = {"parameters": powers.parameters, "tokens": powers.tokens, "loss": powers.floored or powers.loss}
        found["isoflop"] = {key: law.at(flops)._asdict() for key, law in of.items()}
    return found


def at_size(fitted: Fitted, parameters: float) -> dict[str, Any]:
    """The D with which `parameters` are the best for their compute, that C, and the loss."""

    def tokens(law: Law) -> np.ndarray:
        return np.asarray(law.tokens_for(parameters))

    return {
        "parameters": parameters,
        "tokens": _estimate(fitted, tokens),
        "budget": _estimate(fitted, lambda law: fitted.per * parameters * tokens(law)),
        "loss": _estimate(fitted, lambda law: law.loss(parameters, tokens(law))),
    }


def at_data(fitted: Fitted, unique: float, flops: float | None) -> dict[str, Any]:
    """What `unique` tokens allow: seen once, and, with the law of repeated data, again and again with
    `flops`."""
    found: dict[str, Any] = {
        "unique_tokens": unique,
        "parameters": _estimate(fitted, lambda law: np.asarray(law.parameters_for(unique))),
        "budget": _estimate(fitted, lambda law: fitted.per * unique * np.asarray(law.parameters_for(unique))),
        "loss": _estimate(fitted, lambda law: law.loss(law.parameters_for(unique), unique)),
    }
    if flops is not None and fitted.constrained is not None:
        found["repeated"] = _repeated(fitted, unique, flops)
    return found


def _estimate(fitted: Fitted, of: Callable[[Law], np.ndarray]) -> dict[str, float | None]:
    """A function of the constants, with the interval of the resamples."""
    with np.errstate(all="ignore"):
        return _between(of(fitted.law), of(fitted.resampled))


def _between(value: Any, drawn: Any) -> dict[str, float | None]:
    """drawn: [S], of the resamples."""
    low, high = interval(np.where(np.isfinite(drawn), drawn, np.nan))
    return {key: plain(number) for key, number in Estimate(float(value), low, high)._asdict().items()}


def _off(fitted: Fitted, flops: float, times: float) -> dict[str, Any]:
    """What it costs to train `times` the best size with the same compute: loss, and the compute that the best
    size would need for the same loss, as a share of `flops`."""

    def excess(law: Law) -> np.ndarray:
        size, tokens, least = law.optimum(flops, fitted.per)
        return np.asarray(law.loss(size * times, tokens / times) - least)

    def wasted(law: Law) -> np.ndarray:
        size, tokens, least = law.optimum(flops, fitted.per)
        loss = law.loss(size * times, tokens / times)
        # On the frontier the loss above E falls as C ** -(alpha beta / (alpha + beta)).
        power = law.alpha * law.beta / (law.alpha + law.beta)
        return np.asarray(1 - ((loss - law.E) / (least - law.E)) ** (-1 / power))

    return {"times": times, "loss": _estimate(fitted, excess), "wasted": _estimate(fitted, wasted)}


def _repeated(fitted: Fitted, unique: float, flops: float) -> dict[str, Any]:
    """The best N and D of `flops` where only `unique` tokens are to be had."""
    assert fitted.constrained is not None
    found = [law.optimum(flops, unique, fitted.per) for law in fitted.constrained]
    of = dict(zip(("parameters", "tokens", "loss"), zip(*found, strict=True), strict=True))
    of["epochs"] = tuple(np.maximum(1.0, tokens / unique) for tokens in of["tokens"])
    return {key: _between(*values) for key, values in of.items()}
