"""Whether the intervals of scaling laws hold what they say: studies of a planted law, fitted again and again.

    python -m launch.bench_scaling [--simulations 100] [--json coverage.json]

Every simulation draws the losses of a study from a known law, with noise, and fits them. Counted is how often
the 95 % intervals contain the planted exponent, for a in N ~ C^a of the IsoFLOP minima, and for a, alpha and
beta of the parametric law; and how often the measured loss of a run at the optimum of 4 times the largest
budget lies in the interval of the law that has not seen it. The naive column is the usual interval of a
straight line through the minima of parabolas, by Student's t, which takes each of these to be right.
"""

from __future__ import annotations

import json
import math
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy.stats import linregress, t

from data.cli import main_guard
from data.files import write
from launch.scaling import judgement
from launch.scaling.isoflop import Isoflop
from launch.scaling.power import LEVEL, Estimate
from launch.scaling.table import Points, points

LOWEST = 1e17  # FLOP of the smallest budget
RESAMPLES = 300  # of the parametric law


@dataclass(frozen=True)
class Design:
    """A study of a planted law.

    alpha, beta, a, b, floor: of L = floor + a / N^alpha + b / D^beta. budgets, ratio: how many, and how many
    times as large as the one before each is. sizes: of each budget, evenly spaced in log N from the middle
    over `reach` to the middle times it. middle: times the best N of the smallest and of the largest budget,
    and in between on a line in logarithms. noise: standard deviation of the log loss. seeds: runs of a size.
    """

    alpha: float = 0.34
    beta: float = 0.28
    a: float = 406.4
    b: float = 410.7
    floor: float = 1.69
    budgets: int = 3
    ratio: float = 4.0
    sizes: int = 5
    reach: float = 4.0
    middle: tuple[float, float] = (1.0, 1.0)
    noise: float = 1e-3
    seeds: int = 1

    @property
    def exponent(self) -> float:
        """a of N ~ C^a."""
        return self.beta / (self.alpha + self.beta)

    def best(self, flops: np.ndarray | float) -> np.ndarray | float:
        """N of the lowest loss with C = 6 N D."""
        level = self.alpha * self.a / (self.beta * self.b)
        return level ** (1 / (self.alpha + self.beta)) * (flops / 6) ** self.exponent

    def loss(self, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return self.floor + self.a / parameters**self.alpha + self.b / tokens**self.beta

    def drawn(self, random: np.random.Generator) -> Points:
        """The study's runs, and last one at the optimum of `ratio` times the largest budget."""
        flops = LOWEST * self.ratio ** np.arange(self.budgets)
        middles = np.log(self.best(flops)) + np.log(np.geomspace(*self.middle, self.budgets))
        steps = np.linspace(-1, 1, self.sizes).repeat(self.seeds) * math.log(self.reach)
        sizes = np.exp(middles[:, None] + steps).ravel()
        beyond = flops[-1] * self.ratio
        sizes = np.append(sizes, self.best(beyond))
        budget = np.append(flops.repeat(len(steps)), beyond)
        tokens = budget / (6 * sizes)
        noise = self.noise * random.standard_normal(len(sizes))
        return points(sizes, tokens, self.loss(sizes, tokens) * np.exp(noise), budget=budget)


# With exponents like those of Hoffmann et al., or three times as far apart.
UNEVEN = {"alpha": 0.465, "beta": 0.155, "a": 400.0, "b": 400.0}
DESIGNS = {
    "3 budgets x 5 sizes": Design(),
    "noise 0.003": Design(noise=3e-3),
    "3 seeds, noise 0.003": Design(noise=3e-3, seeds=3),
    "sizes drift off the best": Design(middle=(1.0, 0.4)),
    "alpha 3 beta, drift": Design(middle=(1.0, 0.4), **UNEVEN),  # type: ignore[arg-type]
    "5 x 9, wide, drift": Design(budgets=5, sizes=9, reach=16.0, middle=(1.5, 0.6)),
}


def simulate(design: Design, seed: int) -> dict[str, Estimate | None]:
    """Of one simulation every estimate, by the names of `truths`; of the run beyond, predicted / measured.
    What could not be fitted is not there."""
    judged = judgement.judge(design.drawn(np.random.default_rng(seed)), resamples=RESAMPLES, seed=seed)
    fits = judged.fits
    found: dict[str, Estimate | None] = {
        f"a, {method}": law.parameters.exponent for method, law in fits.isoflops.items()
    }
    if "parabola" in fits.isoflops:
        found["a, parabola, naive"] = _naive(fits.isoflops["parabola"])
    if fits.parametric is not None and fits.resampled is not None:
        intervals = fits.resampled.intervals()
        for name in ("a", "alpha", "beta"):
            found[f"{name}, parametric"] = Estimate(float(getattr(fits.parametric, name)), *intervals[name])
    for one in judged.predictions:
        if one.of == "loss":
            scaled = [None if x is None else x / one.measured for x in one.predicted]
            found[f"loss at 4 C, {one.law}"] = Estimate(*scaled)  # type: ignore[arg-type]
    return found


def _naive(fitted: Isoflop) -> Estimate | None:
    used = [one for one in fitted.minima if one.bracketed]
    if len(used) < 3:
        return None
    line = linregress(*np.log([(one.flops, one.parameters) for one in used]).T)
    half = line.stderr * t.ppf((1 + LEVEL) / 2, len(used) - 2)
    return Estimate(line.slope, line.slope - half, line.slope + half)


def truths(design: Design) -> dict[str, float]:
    """What each estimate should be."""
    exponents = dict.fromkeys(
        ("a, parabola", "a, parabola, naive", "a, akima", "a, parametric"), design.exponent
    )
    laws = ("parametric", "IsoFLOP, parabola", "IsoFLOP, akima")
    return {
        **exponents,
        "alpha, parametric": design.alpha,
        "beta, parametric": design.beta,
        **{f"loss at 4 C, {law}": 1.0 for law in laws},
    }


def coverage(design: Design, found: list[dict[str, Estimate | None]]) -> list[dict[str, Any]]:
    """Of each quantity over all simulations: how often it was estimated with an interval and how often that
    held the truth, the estimates' mean and standard deviation, and half the median interval."""
    rows = []
    for name, true in truths(design).items():
        known = [one for simulation in found if (one := simulation.get(name)) and one.low is not None]
        lows, highs = (np.array([getattr(one, end) for one in known], dtype=float) for end in ("low", "high"))
        values = np.array([one.value for one in known])
        rows.append(
            {
                "quantity": name,
                "planted": true,
                "mean": float(values.mean()) if known else None,
                "deviation": float(values.std()) if known else None,
                "half_interval": float(np.median(highs - lows) / 2) if known else None,
                "covered": int(((lows <= true) & (true <= highs)).sum()),
                "estimated": len(known),
                "simulations": len(found),
            }
        )
    return rows


def table(name: str, rows: list[dict[str, Any]]) -> Table:
    shown = Table(title=name, title_justify="left", box=None, padding=(0, 1, 0, 0))
    shown.add_column("quantity", no_wrap=True, min_width=30)
    for column in ("planted", "mean", "deviation", "half", "covered"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        numbers = (row[key] for key in ("planted", "mean", "deviation", "half_interval"))
        written = ["" if number is None else f"{number:.4f}" for number in numbers]
        shown.add_row(row["quantity"], *written, f"{row['covered']} of {row['estimated']}")
    return shown


def main() -> None:
    parser = ArgumentParser(
        prog="python -m launch.bench_scaling",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--simulations", type=int, default=100, help="of each design")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    arguments = parser.parse_args()
    if arguments.simulations < 1:
        raise ValueError(f"--simulations: {arguments.simulations} is not positive; give a larger number")
    console, figures = Console(highlight=False), {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("simulations", total=len(DESIGNS) * arguments.simulations)
        for name, design in DESIGNS.items():
            found = []
            for seed in range(arguments.simulations):
                found.append(simulate(design, seed))
                progress.advance(task)
            figures[name] = coverage(design, found)
            console.print(table(name, figures[name]))
    if arguments.json:
        write(arguments.json, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main_guard(main)
