"""All laws through one table of runs, with the judgement of the budget that they have not seen.

A law that a table does not allow is not there, and a line says why; the others are fitted all the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import Progress

from launch.scaling import constrained, conventions, frontier, identifiability, isoflop, judgement, parametric
from launch.scaling.fits import Fits, fits_of
from launch.scaling.forecast import Fitted
from launch.scaling.isoflop import Isoflop
from launch.scaling.minima import SIZES, Curve
from launch.scaling.parametric import Fit, Law
from launch.scaling.table import Points, clustered, read

CURVE = 3  # runs of a budget, to be held out where budgets are found from the runs
FORMAT = 1  # of what `fit` returns
METHOD = "parabola"  # whose power laws a forecast shows
STRICTEST = "akima"  # which lacks what all others lack
DRAWN = 60  # points of a line
Found = TypeVar("Found")


@dataclass(frozen=True)
class Request:
    """The keys of conf/laws.yaml that are not a study's, and two that are."""

    directory: str
    table: str | None
    curves: str | None
    columns: dict[str, str] | None
    drop_highest: int
    hold_out: bool
    grid: bool
    resamples: int
    seed: int
    budget: float | None
    parameters: float | None
    unique_tokens: float | None

    def __post_init__(self) -> None:
        if self.resamples < 100:
            raise ValueError(f"resamples: {self.resamples} are too few for an interval; give 100 or more")
        if self.drop_highest < 0:
            raise ValueError(
                f"drop_highest: {self.drop_highest} is below 0; give how many losses to leave out"
            )
        for key in ("budget", "parameters", "unique_tokens"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{key}: {value} is not a positive number; give such as 1e21")


@dataclass(frozen=True)
class Runs:
    """The table's runs. kept: without the highest losses. fitted: of these, what laws are fitted to.
    notes: what a reader must know, a line each."""

    every: Points
    kept: Points
    fitted: Points
    notes: tuple[str, ...]


def runs_of(request: Request) -> Runs:
    """Raises ValueError, OSError: as `table.read`; or nothing would be left."""
    assert request.table is not None
    every = read(request.table, request.columns)
    if request.drop_highest >= len(every):
        raise ValueError(f"drop_highest: {request.drop_highest} of {len(every)} runs leaves none; give fewer")
    kept, notes = every.without_highest(request.drop_highest), list(every.notes)
    if not request.hold_out or len(np.unique(kept.budget)) < 2:
        return Runs(every, kept, kept, (*notes, *_again(kept)))
    budgets, counts = np.unique(kept.budget, return_counts=True)
    held = budgets[-1]
    curves = budgets[1:][counts[1:] >= CURVE]
    if len(curves) and np.array_equal(every.budget, clustered(every.flops)):
        held = curves[-1]  # of budgets that nobody planned, stray runs are no judges
        if stray := int((kept.budget > held).sum()):
            notes.append(f"{stray} runs with more compute than the curve that is held out are left out")
            kept = kept.select(kept.budget <= held)
    fitted = kept.select(kept.budget < held)
    return Runs(every, kept, fitted, (*notes, *_again(fitted)))


def _again(points: Points) -> list[str]:
    """What is to say of runs that see their data more than once."""
    again = constrained.repeating(points)
    if not again.any() or points.unique_tokens is None:
        return []
    most = float((points.tokens / points.unique_tokens).max())
    return [
        f"{int(again.sum())} of {len(points)} fitted runs see data again, up to {most:.3g} times; all laws"
        " but that of repeated data count it as new, which holds to about 4 times (arXiv 2305.16264)"
    ]


def fit(request: Request, console: Console) -> dict[str, Any]:
    """Everything that fit.json holds, and the report shows.

    Raises:
        ValueError: what is wrong with a key or the table, in one line; or no law can be fitted.
        OSError: the table cannot be read.
    """
    runs, notes = runs_of(request), list[str]()

    def attempted(name: str, make: Callable[[], Found]) -> Found | None:
        try:
            return make()
        except ValueError as error:
            notes.append(f"{name}: {error}")
            return None

    def seconds(name: str, make: Callable[[], Found]) -> Found | None:
        with console.status(name):
            return attempted(name, make)

    fitted, held = runs.fitted, runs.kept.select(runs.kept.budget > runs.fitted.budget.max())
    fits = _fits(request, fitted, console)
    notes += fits.notes
    found: dict[str, Any] = {
        "format": FORMAT,
        "request": dataclasses.asdict(request),
        "runs": {"table": len(runs.every), "kept": len(runs.kept), "fitted": len(fitted)},
        "shared": runs.every.shared,
        "points": _rows(runs),
        "parametric": seconds("parametric law", lambda: _parametric(request, runs, fits)),
        "isoflop": {method: _isoflop(fitted, fits.isoflops.get(method)) for method in SIZES},
        "frontier": seconds("minimum over training curves", lambda: _frontier(request, runs)),
        "constrained": seconds("law of repeated data", lambda: _constrained(request, fitted)),
        "conventions": seconds("conventions", lambda: _conventions(request, fitted)),
        "judgement": judgement.judged(fits, held, request.seed).as_json() if len(held) else None,
    }
    if request.hold_out and not len(held):
        notes.append("judgement: the table has 1 budget; it needs one to fit and one to hold out")
    if found["parametric"] is None and not fits.isoflops:
        more = f"; {len(held)} runs are held out, and hold_out=false fits them too" if len(held) else ""
        why = "; ".join(note for note in notes if not note.startswith(f"no IsoFLOP law by {STRICTEST}"))
        raise ValueError(f"{request.table}: no law can be fitted; {why}{more}")
    return found | {"notes": [*runs.notes, *notes]}


def for_forecast(request: Request) -> tuple[Fitted, list[str]]:
    """The laws that a forecast needs, and why some are not there. Raises ValueError as `fit`."""
    runs = runs_of(request)
    points, notes = runs.fitted, list(runs.notes)
    if held := len(runs.kept) - len(points):
        notes.append(f"{held} runs of the largest budget are held out of this; hold_out=false fits them too")
    law = parametric.fit(points, grid=False)
    resampled = parametric.bootstrap(points, law, request.resamples, request.seed)
    notes += identifiability.warnings(points, law, resampled)
    powers, repeated = None, None
    try:
        powers = isoflop.fit(points, METHOD, seed=request.seed)
        notes += [f"IsoFLOP law: {note}" for note in powers.notes]
    except ValueError as error:
        notes.append(f"IsoFLOP law: {error}")
    try:
        repeated = _repeated(request, points)
    except ValueError as error:
        notes.append(f"law of repeated data: {error}")
    per = points.flops / (points.parameters * points.tokens)
    middle = float(np.exp(np.log(per).mean()))
    if max(per.max() / middle, middle / per.min()) > 1.1:
        notes.append(
            f"a token costs the runs {per.min():.3g} to {per.max():.3g} FLOP for each parameter, and larger"
            f" models nearer to 6: the forecast counts {middle:.3g}"
        )
    return Fitted(law, resampled, powers, repeated, middle, points), notes


def _rows(runs: Runs) -> list[dict[str, Any]]:
    """Every run, and what has become of it."""
    kept, fitted = set(runs.kept.names), set(runs.fitted.names)
    return [
        {
            "name": name,
            **{
                key: float(getattr(runs.every, key)[i])
                for key in ("parameters", "tokens", "flops", "loss", "budget")
            },
            "use": "fitted" if name in fitted else "held out" if name in kept else "left out",
        }
        for i, name in enumerate(runs.every.names)
    ]


def _fits(request: Request, points: Points, console: Console) -> Fits:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:

        def bar(name: str) -> Callable[[int, int], None]:
            task = progress.add_task(name)
            return lambda done, total: progress.update(task, completed=done, total=total)

        bars = bar("starts of the parametric law"), bar("its resamples")
        return fits_of(points, request.resamples, request.seed, request.grid, bars)


def _parametric(request: Request, runs: Runs, fits: Fits) -> dict[str, Any] | None:
    points, law, resampled = fits.points, fits.parametric, fits.resampled
    if law is None or resampled is None:
        return None
    profiled = identifiability.profiles(points, law, resampled, request.seed)
    found = {
        "fit": law.as_json(),
        "intervals": {name: _ends(ends) for name, ends in resampled.intervals().items()},
        "profiles": {name: profile.as_json() for name, profile in profiled.items()},
        "correlations": identifiability.correlations(resampled),
        "warnings": identifiability.warnings(points, law, resampled, profiled),
        "residuals": dict(zip(points.names, law.residuals(points).tolist(), strict=True)),
        "lines": _lines(law, points),
        "with_all": None,
    }
    if len(runs.every) > len(runs.kept):
        budgets = set(np.unique(points.budget))
        whole = runs.every.select(np.array([one in budgets for one in runs.every.budget]))
        found["with_all"] = _with_all(request, whole)
    return found


def _with_all(request: Request, points: Points) -> dict[str, Any]:
    """The law with the runs that were left out."""
    law = parametric.fit(points, grid=False)
    resampled = parametric.bootstrap(points, law, request.resamples, request.seed)
    intervals = {name: _ends(ends) for name, ends in resampled.intervals().items()}
    return {"fit": law.as_json(), "intervals": intervals}


def _lines(law: Fit | Law, points: Points) -> list[dict[str, Any]]:
    """The law along each budget's runs, to be drawn."""
    found = []
    for budget, runs in points.isoflops():
        if len(np.unique(runs.parameters)) < 3:
            continue
        curve = Curve.of(budget, runs)
        sizes = np.linspace(curve.sizes[0], curve.sizes[-1], DRAWN)
        n, d = np.exp(sizes), np.exp(curve.log_tokens(sizes))
        found.append({"budget": budget, "parameters": n.tolist(), "loss": law.loss(n, d).tolist()})
    return found


def _isoflop(points: Points, law: Isoflop | None) -> dict[str, Any] | None:
    if law is None:
        return None
    method, lines = law.method, []
    for budget, runs in points.isoflops():
        curve = Curve.of(budget, runs)
        if len(curve.sizes) >= SIZES[method]:
            n, loss = curve.line(method, runs.loss)
            step = max(1, len(n) // DRAWN)
            lines.append({"budget": budget, "parameters": n[::step].tolist(), "loss": loss[::step].tolist()})
    return law.as_json() | {"lines": lines}


def _frontier(request: Request, runs: Runs) -> dict[str, Any] | None:
    """Through the curves of what is fitted, and of runs that are not in the table."""
    if request.curves is None:
        return None
    unseen = {*runs.every.names, *runs.every.lost} - set(runs.fitted.names)
    curves = [run for run in frontier.read(request.curves) if run.name not in unseen]
    law = frontier.fit(curves, seed=request.seed)
    drawn = [{"name": run.name, "flops": _thinned(run.flops), "loss": _thinned(run.loss)} for run in curves]
    return law.as_json() | {"curves": drawn}


def _constrained(request: Request, points: Points) -> dict[str, Any] | None:
    laws = _repeated(request, points)
    if laws is None:
        return None
    law, resampled = laws
    intervals = {name: _ends(ends) for name, ends in resampled.intervals().items()}
    again = points.select(constrained.repeating(points))
    predicted = law.loss(again.parameters, again.tokens, again.unique_tokens)  # type: ignore[arg-type]
    return {
        "fit": law.as_json(),
        "intervals": intervals,
        "warnings": constrained.warnings(law, resampled),
        "residuals": dict(zip(again.names, np.log(again.loss / predicted).tolist(), strict=True)),
    }


def _repeated(request: Request, points: Points) -> tuple[constrained.Fit, constrained.Constrained] | None:
    """The law of repeated data and its resamples, on the law of the runs that repeat none; None where none
    repeats, and nothing is amiss."""
    repeating = constrained.repeating(points)
    if not repeating.any():
        return None
    new = points.select(~repeating)
    base = parametric.fit(new, grid=False)
    law = constrained.fit(points, base)
    bases = parametric.bootstrap(new, base, request.resamples, request.seed)
    return law, constrained.bootstrap(points, law, bases, request.seed)


def _conventions(request: Request, points: Points) -> dict[str, Any] | None:
    if not conventions.available(points):
        return None
    refits = conventions.refit(points, seed=request.seed)
    return {"refits": [one.as_json() for one in refits], "moved": conventions.moved(refits)}


def _thinned(values: np.ndarray, most: int = 200) -> list[float]:
    return [float(value) for value in values[:: max(1, len(values) // most)]]


def _ends(ends: tuple[float, float]) -> list[float | None]:
    return [parametric.plain(end) for end in ends]
