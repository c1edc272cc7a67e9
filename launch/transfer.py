"""Does the best learning rate stay where it is as a model grows? A parametrization's transfer certificate.

    python -m launch.transfer [widths=[64,128,256]] [parametrizations=[mup,standard]]
        [octaves=[-1,0,1,2,3,4,5]] [seeds=3] [steps=200] [key=value …]
    python -m launch.transfer depths=[2,4,8] parametrizations=[completep,standard]

Trains every size with every learning rate and seed, under each parametrization, whose base is the smallest
size; all else is equal. A seed's best learning rate is the vertex of the parabola through its lowest loss and
the two beside it, in octaves; how far it shifts from the smallest to the largest size is compared seed by
seed. (Figure 1 of muP, arXiv 2203.03466, and of CompleteP, arXiv 2505.01618, with intervals.)

A run that is there is not trained again; killed, the study goes on by the same command. Writes results.json
and report.html into the directory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

from data.cli import main_guard, one_line_errors
from launch.overrides import as_typed, refuse, spelled, split
from launch.request import CONF
from launch.study import Planned, Trained, run_all
from launch.study_page import written
from launch.transfer_page import finding, page, spread
from train.ranks import end_with

# Keys of a run that the study sets by itself, and what to set instead.
OWN = {"parametrization": "parametrizations", "seed": "seeds", "horizon": "steps"}
LEVEL = 0.95  # of the intervals
STAYS = 1.0  # octaves from the smallest to the largest size


@dataclass(frozen=True)
class Plan:
    """The keys of conf/transfer.yaml that are not a run's."""

    parametrizations: list[str]
    widths: list[int]
    depths: list[int] | None
    octaves: list[float]
    steps: int
    seeds: int
    parallel: int | None
    trials: str

    def __post_init__(self) -> None:
        for key in ("steps", "seeds", "parallel"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}: {value} is not positive; give a larger number")
        for key in ("octaves", "depths" if self.depths else "widths", "parametrizations"):
            values = getattr(self, key)
            least = {"octaves": 3, "parametrizations": 1}.get(key, 2)
            if len(set(values)) < max(least, len(values)):
                raise ValueError(f"{key}: {values} are not {least} or more different ones")
        known = sorted(path.stem for path in (CONF / "parametrization").glob("*.yaml"))
        for name in self.parametrizations:
            if name not in known:
                raise ValueError(f"parametrizations: {name} is none of {', '.join(known)}")
        if self.depths and "mup" in self.parametrizations:
            raise ValueError("parametrizations: muP keeps the depth; with depths, give [completep,standard]")

    @property
    def key(self) -> str:
        """Of `model`, in which the sizes differ."""
        return "layers" if self.depths else "width"

    @property
    def sizes(self) -> list[int]:
        return sorted(self.depths or self.widths)

    @property
    def rates(self) -> list[float]:
        """In octaves, in their order."""
        return sorted(self.octaves)


@dataclass(frozen=True)
class Optimum:
    """Where in octaves a loss is lowest. bracketed: whether what was tried goes on to both sides of it."""

    octave: float
    bracketed: bool


def optimum(octaves: Sequence[float], losses: Sequence[float]) -> Optimum:
    """Of one row of losses [octaves], ascending in the octave; infinite where a run diverged."""
    best = int(np.argmin(losses))
    if best in (0, len(losses) - 1) or not math.isfinite(losses[best]):
        return Optimum(octaves[best], bracketed=False)
    near = slice(best - 1, best + 2)
    if not np.isfinite(losses[near]).all():
        return Optimum(octaves[best], bracketed=True)
    curvature, slope, _ = np.polyfit(octaves[near], losses[near], 2)
    vertex = -slope / (2 * curvature) if curvature > 0 else octaves[best]
    return Optimum(float(vertex), bracketed=True)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of seeds and its confidence interval, after Student; all of the line for a single one."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = student.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return mean, mean - float(half), mean + float(half)


def study(node: DictConfig, console: Console) -> dict[str, Any]:
    """Everything that a composed conf/transfer.yaml asks for, as written to results.json.

    Raises ValueError in one line on what is wrong with a key, the data or a run.
    """
    plan, run_node = split(node, Plan)
    typed = as_typed(run_node, without=(*OWN, "name", "directory"))
    base_rate = float(run_node.optim.learning_rate)
    cells = [
        (name, size, octave, seed)
        for seed in range(plan.seeds)
        for octave in plan.rates
        for size in plan.sizes
        for name in plan.parametrizations
    ]
    planned = [_planned(plan, run_node, typed, *cell) for cell in cells]
    console.print(
        f"{len(plan.parametrizations)} parametrizations x {len(plan.sizes)} sizes x {len(plan.rates)}"
        f" learning rates x {plan.seeds} seeds: {len(set(planned))} runs of {plan.steps:,} steps",
        soft_wrap=True,
    )
    trained = dict(zip(cells, run_all(planned, Path(plan.trials), console, plan.parallel), strict=True))
    return {
        "settings": dataclasses.asdict(plan) | {"learning_rate": base_rate},
        "run": typed,
        "key": plan.key,
        "sizes": plan.sizes,
        "octaves": plan.rates,
        "parametrizations": [_described(plan, name, trained) for name in plan.parametrizations],
    }


def _planned(
    plan: Plan, node: DictConfig, typed: Sequence[str], name: str, size: int, octave: float, seed: int
) -> Planned:
    """One run. Of the base a parametrization makes nothing else, so that it is trained once for all."""
    base = plan.sizes[0]
    own = [f"model.{plan.key}={size}", f"seed={seed}"]
    own += [f"optim.learning_rate={node.optim.learning_rate * 2**octave:.6g}"]
    own += [f"horizon.steps={plan.steps}", "horizon.tokens=null", "horizon.epochs=null"]
    if name != "standard" and size != base:
        keys = ("width", "layers") if name == "completep" else ("width",)
        of_base = {key: node.model[key] for key in keys} | {plan.key: base}
        own += [f"parametrization={name}", "~parametrization.base"]
        own += [f"+parametrization.base={spelled(of_base)}"]
        called = name
    else:
        own += ["parametrization=standard"]
        called = "base" if size == base else "standard"
    return Planned(f"{called}-{plan.key}{size}-octave{octave:g}-seed{seed}", (*typed, *own))


def _described(plan: Plan, name: str, trained: dict[tuple[str, int, float, int], Trained]) -> dict[str, Any]:
    """What results.json says of a parametrization."""
    seeds = range(plan.seeds)
    losses = {
        size: [[trained[name, size, octave, seed].loss for octave in plan.rates] for seed in seeds]
        for size in plan.sizes
    }
    if lost := [size for size in plan.sizes if not np.isfinite(losses[size]).any(axis=1).all()]:
        raise ValueError(f"octaves: every run of {plan.key} {lost[0]} under {name} diverged; give lower ones")
    optima = {size: [optimum(plan.rates, row) for row in losses[size]] for size in plan.sizes}
    shifts = [optima[plan.sizes[-1]][seed].octave - optima[plan.sizes[0]][seed].octave for seed in seeds]
    bracketed = {size: all(one.bracketed for one in optima[size]) for size in plan.sizes}
    shift = interval(shifts)
    return {
        "name": name,
        "sizes": [
            {
                "size": size,
                "losses": [
                    [value if math.isfinite(value) else None for value in row] for row in losses[size]
                ],
                "optima": [one.octave for one in optima[size]],
                "optimum": _json(interval([one.octave for one in optima[size]])),
                "bracketed": bracketed[size],
            }
            for size in plan.sizes
        ],
        "shift": _json(shift),
        "verdict": verdict(shift, bracketed[plan.sizes[0]] and bracketed[plan.sizes[-1]]),
    }


def verdict(shift: tuple[float, float, float], bracketed: bool) -> str:
    """Of a shift and its interval: stays, moves, or open."""
    mean, low, high = shift
    if not bracketed:
        return "not bracketed"
    if low >= -STAYS and high <= STAYS:
        return "stays"
    return "moves" if low > STAYS or high < -STAYS else "open"


def _json(values: tuple[float, float, float]) -> dict[str, float | None]:
    return dict(zip(("mean", "low", "high"), map(_finite, values), strict=True))


def _finite(value: float) -> float | None:
    """As JSON has it."""
    return value if math.isfinite(value) else None


def table(results: dict[str, Any]) -> Table:
    """A row for each parametrization."""
    shown = Table(
        box=None, padding=(0, 2, 0, 0), title="best learning rate, in octaves", title_justify="left"
    )
    shown.add_column("parametrization")
    for size in results["sizes"]:
        shown.add_column(f"{results['key']} {size}", justify="right")
    shown.add_column("shift", justify="right")
    shown.add_column("")
    for own in results["parametrizations"]:
        best = (
            f"{one['optimum']['mean']:+.2f}" + ("" if one["bracketed"] else " (edge)") for one in own["sizes"]
        )
        shown.add_row(own["name"], *best, spread(own["shift"]), own["verdict"])
    return shown


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="transfer")
@one_line_errors
def main(node: DictConfig) -> None:
    refuse(HydraConfig.get().overrides.task, OWN)
    console = Console(highlight=False)
    results = study(node, console)
    report = written(Path(node.directory), results, page(results))
    console.print(table(results))
    for line in finding(results):
        console.print(line, markup=False, soft_wrap=True)
    console.print(str(report), soft_wrap=True)


if __name__ == "__main__":
    end_with(lambda: main_guard(main))
