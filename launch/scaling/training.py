"""The runs of a planned study, trained: their points and curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from data.shards import read_manifest
from launch.launchers import Here, Launcher, Slurm
from launch.scaling.study import Plan, Sized, Study
from launch.scaling.table import Points, write, write_rows
from launch.study import Trained, attempt

POINTS, CURVES = "points.csv", "curves.csv"


def train(plan: Plan, console: Console, directory: Path) -> Points:
    """Train what is not there, the longest first, so that none runs on alone; write points and curves.

    Raises:
        ValueError: when all others have ended and are written, that runs have failed; or as run_all.
        SystemExit: as run_all.
    """
    study, order = plan.study, sorted(plan.runs, key=lambda run: -run.flops)
    planned, launcher = [run.planned for run in order], launcher_of(study)
    found = attempt(planned, Path(study.trials), console, plan.at_once, launcher)
    trained = {run.name: one for run, one in zip(order, found, strict=True) if one}
    failed = [run.name for run in plan.runs if run.name not in trained]
    if not trained:
        raise ValueError(f"all {len(failed)} runs failed, see above; the same command tries them again")
    ended = [(run, trained[run.name]) for run in plan.runs if run.name in trained]
    points = points_of(plan, ended)
    directory.mkdir(parents=True, exist_ok=True)
    write(directory / POINTS, points)
    write_rows(directory / CURVES, [row for run, one in ended for row in _curve(run, one)])
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(plan.runs)} runs failed, see above, and are not in {directory / POINTS}:"
            f" {', '.join(failed)}; the same command tries them again"
        )
    return points


def launcher_of(study: Study) -> Launcher:
    """Raises ValueError where it cannot be."""
    if study.launcher == "slurm":
        return Slurm(Path(study.trials) / "slurm", study.slurm or {})
    return Here(torchrun=study.launcher == "torchrun")


def points_of(plan: Plan, ended: Sequence[tuple[Sized, Trained]]) -> Points:
    """The table of runs that have ended; the loss is the last on held-out text, NaN where a run diverged."""
    runs = [run for run, _ in ended]

    def column(numbers: Sequence[float]) -> np.ndarray:
        return np.array(numbers, dtype=float)

    tokens = column([run.tokens for run in runs])
    columns = {key: column([run.shape.columns[key] for run in runs]) for key in runs[0].shape.columns}
    manifest = read_manifest(plan.prepared)
    return Points(
        parameters=column([run.parameters for run in runs]),
        tokens=tokens,
        flops=column([run.flops for run in runs]),
        loss=column([math.nan if one.diverged else one.loss for _, one in ended]),
        budget=column([run.budget for run in runs]),
        unique_tokens=np.minimum(tokens, math.inf if plan.unique is None else plan.unique),
        names=[run.name for run in runs],
        extra=columns
        | {
            "learning_rate": column([run.config.optim["learning_rate"] for run in runs]),
            "global_batch": column([run.config.global_batch for run in runs]),
            "seed": column([run.config.seed for run in runs]),
        },
        shared={"tokenizer": manifest["tokenizer"]["tokenizer.json"][:12], "data": plan.prepared.name},
    )


def _curve(run: Sized, trained: Trained) -> list[dict[str, Any]]:
    """A row for each loss that was logged: of the steps since the one before, or on held-out text."""
    named = {"name": run.name, "parameters": run.parameters, "budget": run.budget}
    return [
        named | {"kind": kind} | {key: record[key] for key in ("step", "tokens", "flops", "loss")}
        for kind in ("train", "eval")
        for record in trained.records(kind)
        if record["loss"] is not None
    ]
