"""Which optimizer? Several are tuned by equally many runs, and compared on seeds that no tuning saw.

    python -m launch.compare [optimizers=[adamw,muon,soap]] [steps=400] [seeds=5] [tuning.runs=12]
        ['+overrides.lion=["optim.betas=[0.95,0.98]"]'] [dry_run=true] [key=value …]

Each optimizer's learning rate and weight decay are searched for around those in conf/optim (launch.tuning),
with one seed. The lowest loss of a search is too good, for it was chosen for being low: what is compared are
new runs with other seeds at the best setting. A winner is named only where their noise leaves no doubt
(launch.statistics). Everything else is the same for all: model, data and their order, steps, batch.

A run that is there is not trained again; killed, the study goes on by the same command. Writes results.json
and report.html into the directory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from data.cli import main_guard, one_line_errors
from launch.compare_page import finding, losses, page, seconds, spread
from launch.overrides import as_typed, exactly, refuse, split, top
from launch.report import X_AXES
from launch.report_page import duration
from launch.request import CONF
from launch.statistics import compared, winner
from launch.study import Planned, Trained, at_a_time, run_all
from launch.study_page import written
from launch.tuning import Point, best, edges, following
from train.config import RunConfig
from train.ranks import end_with

# Keys of a run that the study sets by itself, and what to set instead.
OWN = {"optim": "optimizers and overrides", "seed": "seeds", "horizon": "steps"}
TUNING_SEED = 0  # the seeds that are compared come after it
PROBE_STEPS = 20  # from whose last half the duration is estimated
START_S = 8.0  # until a process makes its first step, about


@dataclass(frozen=True)
class Tuning:
    runs: int
    learning_rates: int
    ratio: float

    def __post_init__(self) -> None:
        if not 1 <= self.learning_rates <= self.runs:
            raise ValueError(
                f"tuning.learning_rates: {self.learning_rates} is not from 1 to tuning.runs, {self.runs}"
            )
        if not self.ratio > 1:
            raise ValueError(f"tuning.ratio: {self.ratio} is not above 1; give for example 3")


@dataclass(frozen=True)
class Comparison:
    """The keys of conf/compare.yaml that are not a run's."""

    optimizers: list[str]
    overrides: dict[str, list[str]]
    steps: int
    seeds: int
    tuning: Tuning
    parallel: int | None
    trials: str
    dry_run: bool

    def __post_init__(self) -> None:
        for key in ("steps", "seeds", "parallel"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}: {value} is not positive; give a larger number")
        if len(set(self.optimizers)) < max(2, len(self.optimizers)):
            raise ValueError(f"optimizers: {self.optimizers} are not two or more; name each once")
        known = sorted(path.stem for path in (CONF / "optim").glob("*.yaml"))
        for key in ("optimizers", "overrides"):
            for name in getattr(self, key):
                if name not in known:
                    raise ValueError(f"{key}: {name} is none of {', '.join(known)}")
        for name, overrides in self.overrides.items():
            for override in overrides:
                if top(override) not in ("optim", "schedule") or override.startswith("optim="):
                    raise ValueError(
                        f"overrides.{name}: {override} is neither a setting of the optimizer (optim.…) nor a"
                        " schedule; what is to hold for all, set outside of overrides"
                    )


@dataclass
class Candidate:
    """An optimizer, and what its tuning has found so far. typed: the overrides of all of its runs; config:
    what they make."""

    name: str
    typed: tuple[str, ...]
    config: RunConfig
    ratio: float
    tuned: dict[Point, Trained] = field(default_factory=dict)

    def setting(self, point: Point) -> tuple[float, float]:
        """Learning rate and weight decay."""
        defaults = self.config.optim["learning_rate"], self.config.optim["weight_decay"]
        rate, decay = (
            float(f"{default * self.ratio**exponent:.3g}")
            for default, exponent in zip(defaults, point, strict=True)
        )
        return rate, decay

    def planned(self, point: Point, seed: int, *more: str) -> Planned:
        """A run at a point. more: further overrides."""
        rate, decay = self.setting(point)
        own = f"optim.learning_rate={rate:g}", f"optim.weight_decay={decay:g}", f"seed={seed}"
        return Planned(f"{self.name}-lr{rate:g}-wd{decay:g}-seed{seed}", (*self.typed, *own, *more))

    @property
    def found(self) -> dict[Point, float]:
        """What the tuning has found."""
        return {point: trained.loss for point, trained in self.tuned.items()}


def study(node: DictConfig, console: Console) -> dict[str, Any] | None:
    """Everything that a composed conf/compare.yaml asks for, as written to results.json; None in a dry run.

    Raises ValueError in one line on what is wrong with a key, the data or a run.
    """
    plan, run_node = split(node, Comparison)
    typed = as_typed(run_node, without=(*OWN, "name", "directory"))
    warmup = run_node.schedule.get("warmup")
    candidates = [_candidate(plan, typed, name, warmup) for name in plan.optimizers]
    _announce(plan, candidates, console)
    if plan.dry_run:
        return None
    _tune(plan, candidates, console)
    seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + plan.seeds)
    console.rule(f"{plan.seeds} new seeds of each")
    planned = [one.planned(best(one.found), seed) for one in candidates for seed in seeds]
    trained = run_all(planned, Path(plan.trials), console, plan.parallel)
    found = [
        _described(one, trained[number * plan.seeds : (number + 1) * plan.seeds], seeds)
        for number, one in enumerate(candidates)
    ]
    samples = {own["name"]: losses(own) for own in found if len(losses(own)) == plan.seeds}
    pairs = compared(samples) if plan.seeds > 1 else []
    return {
        "settings": dataclasses.asdict(plan),
        "run": typed,
        "parallel": plan.parallel or at_a_time(candidates[0].config),
        "optimizers": found,
        "pairs": [dataclasses.asdict(pair) | {"apart": pair.apart} for pair in pairs],
        "winner": winner(pairs),
    }


def _candidate(plan: Comparison, typed: Sequence[str], name: str, warmup: float | None) -> Candidate:
    """warmup: of the runs' schedule, and of another that the optimizer asks for."""
    steps = f"horizon.steps={plan.steps}", "horizon.tokens=null", "horizon.epochs=null"
    whole = exactly((*typed, *steps), "optim", name)
    for override in plan.overrides.get(name, []):
        group, _, choice = override.partition("=")
        whole = exactly(whole, group, choice, warmup=warmup) if group == "schedule" else (*whole, override)
    return Candidate(name, whole, Planned(name, whole).config(), plan.tuning.ratio)


def _announce(plan: Comparison, candidates: Sequence[Candidate], console: Console) -> None:
    """Say how many runs there will be, and by a few steps of each optimizer how long they will take."""
    each = plan.tuning.runs + plan.seeds
    parallel = plan.parallel or at_a_time(candidates[0].config)
    console.print(
        f"{len(candidates)} optimizers x ({plan.tuning.runs} runs to tune + {plan.seeds} seeds) ="
        f" {len(candidates) * each} runs of {plan.steps:,} steps, {parallel} at a time"
    )
    if plan.steps < 2 * PROBE_STEPS:
        return
    console.rule(f"{PROBE_STEPS} steps of each, to see how long it takes")
    probes = run_all([_probe(one) for one in candidates], Path(plan.trials), console, plan.parallel)
    whole = 0.0
    for one, probe in zip(candidates, probes, strict=True):
        if probe.diverged:
            raise ValueError(f"optimizers: {one.name} diverges from the start: {probe.diverged}")
        every = one.config.evaluation.every
        evaluations = each + (plan.seeds * (plan.steps - 1) // every if every else 0)
        step, evaluation = _seconds(probe)
        whole += each * (START_S + plan.steps * step) + evaluations * evaluation
    console.print(f"about {duration(whole / parallel)} in all, where nothing was trained before")


def _probe(candidate: Candidate) -> Planned:
    """A few steps of an optimizer, under a schedule that fits into them, and too short to diverge."""
    whole = exactly(candidate.typed, "schedule", "constant", warmup=0)
    few = f"horizon.steps={PROBE_STEPS}", "optim.learning_rate=1e-8"
    rare = "evaluation.every=null", "checkpoint.every=null", f"log.every={PROBE_STEPS // 2}"
    return Planned(f"{candidate.name}-probe", (*whole, *few, *rare))


def _seconds(probe: Trained) -> tuple[float, float]:
    """Of a step, and of an evaluation."""
    half, end = probe.records("train")
    step = (end["tokens"] - half["tokens"]) / end["tokens_per_s"] / (end["step"] - half["step"])
    return step, probe.records("eval")[-1]["elapsed_s"] - end["elapsed_s"]


def _tune(plan: Comparison, candidates: Sequence[Candidate], console: Console) -> None:
    """Search for each optimizer's setting, all of them in the same rounds."""
    number, tuning = 0, plan.tuning
    while True:
        wanted = [
            (one, point)
            for one in candidates
            for point in following(
                one.found, tuning.runs, tuning.learning_rates, one.config.optim["weight_decay"] > 0
            )
        ]
        if not wanted:
            break
        number += 1
        console.rule(f"tuning, round {number}")
        planned = [one.planned(point, TUNING_SEED, "evaluation.every=null") for one, point in wanted]
        trained = run_all(planned, Path(plan.trials), console, plan.parallel)
        for (one, point), run in zip(wanted, trained, strict=True):
            one.tuned[point] = run
    for one in candidates:
        if one.tuned[best(one.found)].diverged:
            raise ValueError(
                f"overrides.{one.name}: every run to tune diverged, down to a learning rate of"
                f" {one.setting(best(one.found))[0]:g}; set a lower optim.learning_rate"
            )


def _described(candidate: Candidate, trained: Sequence[Trained], seeds: Sequence[int]) -> dict[str, Any]:
    """What results.json says of an optimizer."""
    return {
        "name": candidate.name,
        "best": _setting(candidate, best(candidate.found)),
        "edges": edges(candidate.found),
        "tuning": [_setting(candidate, point) | _outcome(run) for point, run in candidate.tuned.items()],
        "runs": [
            {"seed": seed, **_outcome(run), "curve": _curve(run)}
            for seed, run in zip(seeds, trained, strict=True)
        ],
    }


def _setting(candidate: Candidate, point: Point) -> dict[str, float]:
    return dict(zip(("learning_rate", "weight_decay"), candidate.setting(point), strict=True))


def _outcome(trained: Trained) -> dict[str, Any]:
    loss = None if trained.diverged else trained.loss
    return {"loss": loss, "diverged": trained.diverged, "directory": str(trained.directory)}


def _curve(trained: Trained) -> dict[str, list[float]]:
    """The validation loss and what was spent until then, as columns."""
    records = [record for record in trained.records("eval") if record["loss"] is not None]
    return {key: [record[key] for record in records] for key in (*X_AXES, "loss")}


def table(results: dict[str, Any]) -> Table:
    """A row for each optimizer."""
    shown = Table(box=None, padding=(0, 1, 0, 0))
    shown.add_column("optimizer", no_wrap=True)
    for column in ("learning rate", "weight decay", "validation loss", "time of a run"):
        shown.add_column(column, justify="right", no_wrap=True)
    for own in results["optimizers"]:
        rate, decay = own["best"].values()
        shown.add_row(own["name"], f"{rate:g}", f"{decay:g}", spread(own), duration(seconds(own)))
    return shown


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="compare")
@one_line_errors
def main(node: DictConfig) -> None:
    refuse(HydraConfig.get().overrides.task, OWN)
    console = Console(highlight=False)
    results = study(node, console)
    if results is None:
        return
    report = written(Path(node.directory), results, page(results))
    console.print(table(results))
    console.print(finding(results), markup=False)
    console.print(str(report), soft_wrap=True)


if __name__ == "__main__":
    end_with(lambda: main_guard(main))
