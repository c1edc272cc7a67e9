"""The best sizes by the minimum over training curves: Hoffmann et al. 2022 (arXiv 2203.15556), approach 1.

At each of many amounts of compute, the lowest of all curves that reach it belongs to a size and to the tokens
that this size has seen by then. Power laws go through these points by least squares in logarithms. A point
counts where the lowest curve has both smaller and larger sizes beside it.

A curve's loss in the middle of a run is that of a learning rate that is still high: under a schedule that
decays to the end of the run, the envelope is too high except where a run ends. Its points are not independent
either: a few sizes make all of them, in steps. So intervals are of resampled runs, each taken whole. They are
on the long side, as a resample leaves gaps where sizes were evenly laid; with fewer than FEWEST runs there
are none.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from launch.scaling.power import LossLaw, PowerLaw, floored, line

KEYS = ("parameters", "tokens", "loss")
COLUMNS = ("parameters", "tokens", "flops", "loss")
POINTS = 100  # amounts of compute
FEWEST = 8  # runs, for intervals
DRAWS = 500


@dataclass(frozen=True)
class Run:
    """The curve of a run. parameters: N. tokens, flops, loss: [T], of increasing flops."""

    name: str
    parameters: float
    tokens: np.ndarray = field(repr=False)
    flops: np.ndarray = field(repr=False)
    loss: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Frontier:
    """The envelope of all curves, and the laws through it.

    flops, parameters, tokens, loss: [M], of the points that count. size, length, least: N, D and L by C.
    notes: what a reader must know, a line each.
    """

    flops: np.ndarray
    parameters: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    size: PowerLaw
    length: PowerLaw
    least: LossLaw
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "envelope": {key: getattr(self, key).tolist() for key in ("flops", *KEYS)},
            "parameters": self.size.as_json(),
            "tokens": self.length.as_json(),
            "loss_with_floor": self.least.as_json(),
            "notes": list(self.notes),
        }


def fit(runs: Sequence[Run], draws: int = DRAWS, seed: int = 0) -> Frontier:
    """Raises ValueError where the envelope has too few sizes; in one line."""
    compute = _compute(runs)
    table = _interpolated(runs, compute)
    sizes = np.array([run.parameters for run in runs])
    found, there = envelope(sizes, table)
    distinct = len(np.unique(found[0, there]))
    if distinct < 3:
        raise ValueError(
            f"minimum over training curves: {distinct} sizes are the best somewhere between smaller and"
            " larger ones, and a law needs 3 or more; add sizes, or longer runs"
        )
    random = np.random.default_rng(seed)
    again = [random.integers(len(runs), size=len(runs)) for _ in range(draws if len(runs) >= FEWEST else 0)]
    resampled = [envelope(sizes[rows], table[:, rows]) for rows in again]
    resampled = [one for one in resampled if len(np.unique(one[0][0, one[1]])) > 2]
    notes = [] if again else [f"no intervals: {len(runs)} curves, and resamples of them need {FEWEST}"]
    size, length, least = _laws(compute, [(found, there), *resampled])
    parameters, tokens, loss = found[:, there]
    return Frontier(compute[there], parameters, tokens, loss, size, length, least, tuple(notes))


def _laws(
    compute: np.ndarray, found: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[PowerLaw, PowerLaw, LossLaw]:
    """compute: [M]. found: of all runs, and of R resamples, N, D and loss [3, M] and which count [M]."""
    values, there = np.stack([one for one, _ in found], axis=2), np.stack([one for _, one in found], axis=1)
    pivot, resampled = float(np.log(compute).mean()), len(found) > 1

    def law(logs: np.ndarray) -> PowerLaw:
        lines = line(compute, logs, there)
        level, slope = lines[0].tolist()
        return PowerLaw(level, slope, pivot, lines[1:] - lines[0] if resampled else None)

    least = floored(compute, values[2], there)
    losses = LossLaw(least[0], pivot, least if resampled else None)
    return law(np.log(values[0])), law(np.log(values[1])), losses


def envelope(sizes: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """N, D and loss [3, M] of the lowest curve at each compute, and whether it counts [M].

    sizes: [K]. table: [2, K, M], log D and loss, NaN where a curve does not reach.
    """
    tokens, loss = table
    reached = np.isfinite(loss)
    best = np.argmin(np.where(reached, loss, np.inf), axis=0)
    at = best, np.arange(loss.shape[1])
    present = np.where(reached, sizes[:, None], np.nan)
    chosen = sizes[best]
    smaller, larger = (present < chosen).any(axis=0), (present > chosen).any(axis=0)
    there = smaller & larger
    found = np.stack([chosen, np.exp(tokens[at]), loss[at]])
    return np.where(there, found, 1.0), there


def _compute(runs: Sequence[Run]) -> np.ndarray:
    """Log-spaced, [POINTS], from where two curves have begun to where but one goes on."""
    starts, ends = sorted(run.flops[0] for run in runs), sorted(run.flops[-1] for run in runs)
    return np.geomspace(starts[1], max(ends[-2], starts[1]), POINTS)


def _interpolated(runs: Sequence[Run], compute: np.ndarray) -> np.ndarray:
    """log D and loss [2, K, M] of each curve at compute [M], by lines in log C."""
    places = np.log(compute)
    rows = [
        [
            np.interp(places, np.log(run.flops), values, math.nan, math.nan)
            for values in (np.log(run.tokens), run.loss)
        ]
        for run in runs
    ]
    return np.array(rows).swapaxes(0, 1)


def curves(rows: Sequence[Mapping[str, Any]]) -> list[Run]:
    """Runs from one row for each loss that was logged, with name, parameters, tokens, flops and loss.

    Raises ValueError where a row lacks one of these or there are fewer than three curves of two points.
    """
    by_name: dict[str, list[list[float]]] = {}
    for number, row in enumerate(rows, 1):
        lacking = [key for key in ("name", *COLUMNS) if key not in row]
        if lacking:
            raise ValueError(f"curves: row {number} has no {', '.join(lacking)}; give them for every row")
        try:
            values = [float(row[key]) for key in COLUMNS]
        except (TypeError, ValueError):
            raise ValueError(f"curves: row {number} holds something else than numbers; correct it") from None
        if all(0 < value < math.inf for value in values):
            by_name.setdefault(str(row["name"]), []).append(values)
    found = []
    for name, points in by_name.items():
        n, tokens, flops, loss = np.array(sorted(points, key=lambda point: point[2])).T
        if len(np.unique(flops)) > 1:
            found.append(Run(name, float(n[0]), tokens, flops, loss))
    if len(found) < 3:
        raise ValueError(f"curves: {len(found)} runs have two losses or more, and an envelope needs 3 runs")
    return found


def read(path: str | Path, kind: str = "train") -> list[Run]:
    """The curves of a CSV file; of one with a column `kind`, its rows of that kind.

    Raises ValueError as `curves` does, and OSError.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            return curves([row for row in csv.DictReader(file) if row.get("kind", kind) == kind])
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from None
