"""How large may the batch be? Branches of a run, from one of its checkpoints, with batches of several sizes.

    python -m launch.critical_batch run=runs/demo batches=[4,8,16,32,64] [step=500] [tokens=2_000_000]
        [scaling=sqrt] [tolerance=0.01] [overrides=[engine.ranks=2]]

All branches train on the same samples in the same order, and are compared on held-out text after equally
many tokens: the critical batch is where the loss begins to exceed the best one (branched training: Merrill et
al. 2025, arXiv 2505.23971; whole runs: Zhang et al. 2024, arXiv 2410.21676). It grows with training, so it is
that of this step. The learning rate stays at the run's of that step, times a rule: the root of the batch's
ratio to the run's, for optimizers that divide by the gradient's size (Malladi et al. 2022, arXiv 2205.10287),
or the ratio itself, for SGD (Goyal et al. 2017, arXiv 1706.02677). What else changes later in the run
(curriculum, mixture) stays as it is at that step. The optimizer's averages are the run's: a branch needs
enough steps to renew them. Each batch is trained once, so the tolerance should be above what seeds differ by.

Writes results.json and report.html into the directory, where a branch that is there is not trained again.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import yaml
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from data.cli import instantiate, main_guard, one_line_errors
from launch import study_page
from launch.overrides import as_typed, split
from launch.report_page import NONE, style
from launch.request import CONF, require_run
from launch.study import Planned, Trained, run_all
from launch.study_page import Axis, Line, folded, paragraph, plot, plots, section, written
from train.checkpoint import newest_good, path_of, read_state, steps
from train.config import RunConfig, check_world, load, to_container
from train.config import steps as steps_of
from train.divergence import position
from train.ranks import end_with
from train.records import read_metrics
from train.rundir import RunDir

SCALINGS: dict[str, Callable[[float], float]] = {
    "sqrt": math.sqrt,
    "linear": float,
    "none": lambda ratio: 1.0,
}
STEPS = 100  # of the largest batch, where no tokens are asked for
POINTS = 50  # of a branch's training curve


@dataclass(frozen=True)
class Plan:
    """The keys of conf/critical_batch.yaml."""

    run: str
    batches: list[int]
    step: int | None
    tokens: int | None
    scaling: str
    tolerance: float
    overrides: list[str]
    parallel: int | None
    directory: str | None

    def __post_init__(self) -> None:
        if len(set(self.batches)) < max(2, len(self.batches)) or min(self.batches) < 1:
            raise ValueError(f"batches: {self.batches} are not two or more different ones, all positive")
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling: {self.scaling} is none of {', '.join(SCALINGS)}")
        if not 0 < self.tolerance < math.inf:
            raise ValueError(f"tolerance: {self.tolerance} is not a positive number; give one")
        for key in ("tokens", "parallel"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}: {value} is not positive; give a larger number")


@dataclass(frozen=True)
class Fork:
    """Where the branches leave the run, and what its next step would be.

    place: of that step in the order of the data. global_batch: sequences, each of sequence_length tokens.
    noise_scale: last measured until then, in tokens.
    """

    config: RunConfig
    step: int
    place: int
    global_batch: int
    sequence_length: int
    learning_rate: float
    noise_scale: float | None


def fork_of(run: str, step: int | None) -> Fork:
    """Raises ValueError where the run has no such checkpoint, or none that it can be branched from."""
    rundir = RunDir(run)
    config = load(rundir.config)
    there = steps(rundir.checkpoints)
    found = newest_good(rundir.checkpoints, print) if step is None else step
    if found not in there:
        listed = ", ".join(map(str, there)) or "none"
        raise ValueError(
            f"step: {run} has no checkpoint of step {step}, but of {listed}; choose one of these"
        )
    place = position(found, read_state(path_of(rundir.checkpoints, found))["passed_over"])
    for level, begins in (config.objective.get("stages") or {}).items():
        if begins > place:
            raise ValueError(
                f"step: objective.stages.{level} of {run} begins later, at step {begins}, which branches"
                " would reach after unequal tokens; choose a later step"
            )
    total = json.loads(rundir.environment.read_text())["total_steps"]
    multiplier = instantiate(config.schedule, "schedule")(found, total)
    if multiplier == 0:
        raise ValueError(f"step: the learning rate of {run} is 0 after step {found}; choose an earlier step")
    stage = steps_of(config).stage(place)
    scales = [r for r in read_metrics(rundir.metrics) if r["kind"] == "noise" and r["step"] <= found]
    return Fork(
        config,
        found,
        place,
        stage.global_batch,
        stage.sequence_length,
        config.optim["learning_rate"] * multiplier,
        scales[-1]["scale"] if scales else None,
    )


def tokens_of(fork: Fork, plan: Plan) -> int:
    """Of each branch: as many as are asked for, or the next larger number that all batches divide."""
    step = math.lcm(*plan.batches) * fork.sequence_length
    wanted = plan.tokens or STEPS * max(plan.batches) * fork.sequence_length
    return -(-wanted // step) * step


def branch(fork: Fork, plan: Plan, batch: int) -> Planned:
    """One branch. Raises ValueError where steps of such a batch are none."""
    length, whole = fork.sequence_length, fork.config.sequence_length
    if batch * length % whole:
        raise ValueError(
            f"batches: {batch} sequences of {length} tokens are no whole number of {whole}; choose a multiple"
            f" of {whole // length}"
        )
    settings = to_container(fork.config)
    made = tokens_of(fork, plan) // (batch * length)
    settings["fork"] = {"run": plan.run, "step": fork.step}
    settings["model"]["init_from"] = None
    settings["horizon"] = {"steps": fork.step + made, "tokens": None, "epochs": None}
    settings["curriculum"] = {
        **{step: stage for step, stage in (settings["curriculum"] or {}).items() if step < fork.place},
        fork.place: {"sequence_length": length, "global_batch": batch},
    }
    if settings["mixture"]["stages"]:
        stages = settings["mixture"]["stages"].items()
        settings["mixture"]["stages"] = {step: weights for step, weights in stages if step <= fork.place}
    settings["schedule"] = {"_target_": "train.optim.schedules.Constant", "warmup": 0}
    settings["optim"]["learning_rate"] = rate_of(fork, plan, batch)
    if settings["micro_batch"]:
        settings["micro_batch"] = math.gcd(settings["micro_batch"], batch * length // whole)
    settings["evaluation"] |= {"every": None, "prompt": None}
    settings["checkpoint"] |= {"every": None, "keep": 1, "keep_every": None}
    settings["divergence"]["nonfinite"] = "stop"  # a result, too
    settings["divergence"]["spike"] = "report"
    settings["stop"]["time_limit"] = None
    settings["log"]["every"] = max(1, made // POINTS)
    settings["noise"]["every"] = None
    settings["track"]["wandb"] = "disabled"
    typed = as_typed(OmegaConf.create(settings), without=("name", "directory"))
    planned = Planned(f"batch-{batch}", (*typed, *plan.overrides))
    try:
        config = planned.config()
        check_world(config, config.engine.ranks or 1)
    except ValueError as error:
        raise ValueError(f"batches: with {batch}, {error}") from None
    return planned


def rate_of(fork: Fork, plan: Plan, batch: int) -> float:
    """The learning rate of a branch."""
    return fork.learning_rate * SCALINGS[plan.scaling](batch / fork.global_batch)


def critical(losses: Mapping[int, float], tolerance: float) -> tuple[int, int | None]:
    """The largest batch up to which the loss stays within the tolerance of the best one, counted from that
    one on; and the next larger batch, which does not. None: there is no larger one."""
    best = min(losses, key=lambda batch: losses[batch])
    larger = sorted(batch for batch in losses if batch >= best)
    beyond = next((batch for batch in larger if losses[batch] > losses[best] + tolerance), None)
    within = max(batch for batch in larger if beyond is None or batch < beyond)
    return within, beyond


def measure(plan: Plan, console: Console) -> dict[str, Any]:
    """Train the branches; what results.json holds. Raises ValueError on what is wrong with a key or a run."""
    fork = fork_of(plan.run, plan.step)
    batches, tokens = sorted(plan.batches), tokens_of(fork, plan)
    planned = [branch(fork, plan, batch) for batch in batches]
    console.print(
        f"{len(batches)} branches of {plan.run} from step {fork.step}, of {tokens:,} tokens each; the run's"
        f" batch is {fork.global_batch} sequences of {fork.sequence_length} tokens, its learning rate"
        f" {fork.learning_rate:.3g}",
        soft_wrap=True,
    )
    trained = run_all(planned, _directory(plan), console, plan.parallel)
    losses = {batch: one.loss for batch, one in zip(batches, trained, strict=True)}
    if min(losses.values()) == math.inf:
        raise ValueError("scaling: all branches diverged; choose batches nearer to the run's, or none")
    within, beyond = critical(losses, plan.tolerance)
    return {
        "settings": dataclasses.asdict(plan),
        "fork": {key: value for key, value in vars(fork).items() if key != "config"},
        "tokens": tokens,
        "branches": [
            _outcome(fork, plan, batch, tokens, one) for batch, one in zip(batches, trained, strict=True)
        ],
        "critical": {"within": within, "beyond": beyond},
    }


def _outcome(fork: Fork, plan: Plan, batch: int, tokens: int, trained: Trained) -> dict[str, Any]:
    records = [record for record in trained.records("train") if record["loss"] is not None]
    return {
        "global_batch": batch,
        "steps": tokens // (batch * fork.sequence_length),
        "learning_rate": rate_of(fork, plan, batch),
        "loss": None if trained.diverged else trained.loss,
        "diverged": trained.diverged,
        "directory": str(trained.directory),
        "curve": {key: [record[key] for record in records] for key in ("tokens", "loss")},
    }


def _directory(plan: Plan) -> Path:
    return Path(plan.directory or f"{plan.run.rstrip('/')}-critical-batch")


def finding(results: dict[str, Any]) -> str:
    """In a few sentences: the critical batch, and beside it the noise scale."""
    fork, found = results["fork"], results["critical"]
    length, scale = fork["sequence_length"], fork["noise_scale"]
    smallest, within, beyond = results["branches"][0]["global_batch"], found["within"], found["beyond"]
    sizes = f"{within:,} sequences ({within * length:,} tokens)"
    if beyond is None:
        said = f"The critical batch is {sizes} or larger: no larger one was tried."
    else:
        said = (
            f"The critical batch is between {sizes} and {beyond:,} sequences ({beyond * length:,} tokens):"
            f" from there on the loss after {results['tokens']:,} tokens exceeds the best by more than"
            f" {results['settings']['tolerance']:g} nats per token."
        )
        if within == smallest:
            said += " Smaller ones were not tried, and may be better still."
    return said + ("" if scale is None else f" The gradient noise scale there was {scale:,.0f} tokens.")


def page(results: dict[str, Any]) -> str:
    """The whole page."""
    branches = results["branches"]
    settings = {key: results[key] for key in ("settings", "fork", "tokens")}
    body = [
        paragraph(finding(results), "lead"),
        study_page.table(_HEAD, _rows(results)),
        plots([_losses(results), _curves(branches)]),
        section("Settings", folded("of the measurement", yaml.safe_dump(settings, sort_keys=False))),
    ]
    run, step = results["settings"]["run"], results["fork"]["step"]
    return study_page.page(f"Critical batch of {run} at step {step}", "critical batch size", "".join(body))


_HEAD = ("global batch", "tokens per step", "steps", "learning rate", "validation loss", "above the best")


def _rows(results: dict[str, Any]) -> list[Sequence[str]]:
    """Of each branch what stands in the table."""
    best = min(one["loss"] for one in results["branches"] if one["loss"] is not None)
    length = results["fork"]["sequence_length"]
    return [
        (
            f"{one['global_batch']:,}",
            f"{one['global_batch'] * length:,}",
            f"{one['steps']:,}",
            f"{one['learning_rate']:.3g}",
            "diverged" if one["loss"] is None else f"{one['loss']:.4f}",
            NONE if one["loss"] is None else f"{one['loss'] - best:.4f}",
        )
        for one in results["branches"]
    ]


def _losses(results: dict[str, Any]) -> str:
    """The loss by batch, with the limit and the gradient noise scale."""
    length, scale = results["fork"]["sequence_length"], results["fork"]["noise_scale"]
    found = [one for one in results["branches"] if one["loss"] is not None]
    batches, losses = [one["global_batch"] for one in found], [one["loss"] for one in found]
    limit = min(losses) + results["settings"]["tolerance"]

    def sizes(values: Sequence[float]) -> list[Sequence[float]]:
        return [values, [value * length for value in values]]

    ends = [batches[0], batches[-1]]
    lines = [
        Line("validation loss", style(0)["color"], sizes(batches), losses),
        Line("best and tolerance", style(1)["color"], sizes(ends), [limit] * 2, dash="dash", mode="lines"),
    ]
    if scale is not None:
        heights = [min(losses), max(limit, *losses)]
        place = sizes([scale / length] * 2)
        lines.append(Line("noise scale", style(2)["color"], place, heights, dash="dot", mode="lines"))
    xs = [
        Axis(f"global batch ({unit})", unit, log=True, format={"tickmode": "array", "tickvals": ticks})
        for unit, ticks in zip(("sequences", "tokens"), sizes(batches), strict=True)
    ]
    note = "after equally many tokens, on held-out text"
    return plot("Loss by batch", note, xs, Axis("nats per token"), lines)


def _curves(branches: Sequence[dict[str, Any]]) -> str:
    lines = []
    for index, one in enumerate(branches):
        look, x, y = style(index), [one["curve"]["tokens"]], one["curve"]["loss"]
        lines.append(Line(f"{one['global_batch']:,}", look["color"], x, y, look["dash"], mode="lines"))
    note = "by global batch; each point is the mean of the steps since the one before"
    return plot("Training loss", note, [Axis("training tokens")], Axis("nats per token"), lines)


def table(results: dict[str, Any]) -> Table:
    """A row for each branch."""
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for column in _HEAD:
        shown.add_column(column, justify="right")
    for row in _rows(results):
        shown.add_row(*row)
    return shown


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="critical_batch")
@one_line_errors
def main(node: DictConfig) -> None:
    require_run(node)
    if OmegaConf.is_missing(node, "batches"):
        raise ValueError("batches: must be set, for example batches=[8,16,32,64]")
    plan, _ = split(node, Plan)
    console = Console(highlight=False)
    results = measure(plan, console)
    report = written(_directory(plan), results, page(results))
    console.print(table(results))
    console.print(finding(results), markup=False, soft_wrap=True)
    console.print(str(report), soft_wrap=True)


if __name__ == "__main__":
    end_with(lambda: main_guard(main))
