"""The laws of loss by size and data through the same runs, with what resampling says of each."""

from __future__ import annotations

from dataclasses import dataclass

from launch.scaling import isoflop, parametric
from launch.scaling.isoflop import Isoflop
from launch.scaling.minima import SIZES
from launch.scaling.parametric import Fit, Law, Progress
from launch.scaling.table import Points


@dataclass(frozen=True)
class Fits:
    """points: the runs. resampled: the parametric law, again and again. isoflops: by method. notes: why a law
    is not there, a line each."""

    points: Points
    parametric: Fit | None
    resampled: Law | None
    isoflops: dict[str, Isoflop]
    notes: tuple[str, ...]


def fits_of(
    points: Points,
    resamples: int,
    seed: int,
    grid: bool = False,
    progress: tuple[Progress | None, Progress | None] = (None, None),
) -> Fits:
    """A law that the runs do not allow is not there.

    Args:
        grid: as of `parametric.fit`.
        progress: told of the starts of that fit, and of its resamples.
    """
    law = resampled = None
    isoflops, notes = {}, []
    try:
        law = parametric.fit(points, grid=grid, progress=progress[0])
        resampled = parametric.bootstrap(points, law, resamples, seed, progress[1])
    except ValueError as error:
        notes.append(f"no parametric law: {error}")
    for method in SIZES:
        try:
            isoflops[method] = isoflop.fit(points, method, seed=seed)
        except ValueError as error:
            notes.append(f"no IsoFLOP law by {method}: {error}")
    return Fits(points, law, resampled, isoflops, tuple(notes))
