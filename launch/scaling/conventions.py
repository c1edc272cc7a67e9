"""How N and C are counted, and how far the exponents of one study move with it.

A convention says what a token costs in training: M FLOP. The other two follow, N = M / 6 and C = M D, so that
C = 6 N D under each of them, and D stays what it was. Which one is taken explains most of the difference
between the exponents of Kaplan et al. 2020 (arXiv 2001.08361) and Hoffmann et al. 2022 (arXiv 2203.15556):
Pearce and Song 2024 (arXiv 2406.12907), Porian et al. 2024 (arXiv 2406.19146).

The runs of an IsoFLOP curve have the same C under the convention by which their study was laid out, and under
no other. So the loss of each is first carried to the mean C of its curve, at its N, along a smooth surface
that is fitted under the convention: by the surface's difference between the two places, which leaves the run
its residual. The parametric law needs no such thing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from launch.scaling import isoflop, parametric
from launch.scaling.power import Estimate
from launch.scaling.surface import through
from launch.scaling.table import Points

# M by columns of a table: FLOP per token and unit. See launch.scaling.shapes for what they hold.
CONVENTIONS: dict[str, dict[str, float]] = {
    "with embeddings": {"all_parameters": 6},
    "without embeddings": {"body_parameters": 6},
    "with the head": {"body_parameters": 6, "head_parameters": 6},
    "with attention": {"body_parameters": 6, "head_parameters": 6, "attention_flops_per_token": 1},
}
LAWS = ("parametric", *isoflop.SIZES)
RESAMPLES = 500  # of the parametric law


@dataclass(frozen=True)
class Refit:
    """One law under one convention: N grows as C^a and D as C^b. note: why a law is lacking."""

    convention: str
    law: str
    a: Estimate | None
    b: Estimate | None
    note: str | None = None

    def as_json(self) -> dict[str, Any]:
        exponents = {key: value and value._asdict() for key, value in (("a", self.a), ("b", self.b))}
        return {"convention": self.convention, "law": self.law, **exponents, "note": self.note}


def available(points: Points) -> list[str]:
    """The conventions for which a table has the columns."""
    return [name for name, columns in CONVENTIONS.items() if columns.keys() <= points.extra.keys()]


def converted(points: Points, convention: str) -> Points:
    """The runs with N and C as counted under a convention. Raises ValueError where a column is lacking."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention: {convention!r} is none of {', '.join(CONVENTIONS)}")
    lacking = sorted(CONVENTIONS[convention].keys() - points.extra.keys())
    if lacking:
        raise ValueError(
            f"convention: counting {convention} needs the columns {', '.join(lacking)}; add them"
        )
    columns = CONVENTIONS[convention].items()
    cost = np.sum([points.extra[column] * each for column, each in columns], axis=0)
    return dataclasses.replace(points, parameters=cost / 6, flops=cost * points.tokens)


def carried(points: Points) -> Points:
    """The runs of each budget, with C = 6 N D, at their geometric mean C: other tokens, and the loss there.

    Raises ValueError where no smooth surface fits the runs.
    """
    surface = through(points)
    flops = points.flops.copy()
    for budget in np.unique(points.budget):
        own = points.budget == budget
        flops[own] = np.exp(np.log(points.flops[own]).mean())
    tokens = flops / (6 * points.parameters)
    there, here = (surface.loss(points.parameters, count) for count in (tokens, points.tokens))
    return dataclasses.replace(points, tokens=tokens, flops=flops, loss=points.loss * there / here)


def refit(points: Points, resamples: int = RESAMPLES, seed: int = 0) -> list[Refit]:
    """Every law under every convention that the table has the columns for.

    Raises ValueError where it has them for none.
    """
    points, _ = isoflop.finished(points)
    names = available(points)
    if not names:
        needed = sorted({column for columns in CONVENTIONS.values() for column in columns})
        raise ValueError(f"conventions: the table has none of the columns {', '.join(needed)}; add some")
    return [_refitted(converted(points, name), name, law, resamples, seed) for law in LAWS for name in names]


def moved(refits: Sequence[Refit]) -> dict[str, float]:
    """Of each law, how far apart the conventions put the exponent of N."""
    found: dict[str, list[float]] = {}
    for one in refits:
        if one.a is not None:
            found.setdefault(one.law, []).append(one.a.value)
    return {law: max(values) - min(values) for law, values in found.items()}


def _refitted(points: Points, convention: str, law: str, resamples: int, seed: int) -> Refit:
    try:
        if law != "parametric":
            found = isoflop.fit(carried(points), law, seed=seed)
            return Refit(convention, law, found.parameters.exponent, found.tokens.exponent)
        own = parametric.fit(points, grid=False)
        intervals = parametric.bootstrap(points, own, resamples, seed).intervals()
    except ValueError as error:
        return Refit(convention, law, None, None, str(error))
    a, b = (Estimate(float(getattr(own, key)), *_ends(intervals[key])) for key in ("a", "b"))
    return Refit(convention, law, a, b)


def _ends(interval: tuple[float, float]) -> tuple[float | None, float | None]:
    low, high = interval
    return (low, high) if low == low else (None, None)
