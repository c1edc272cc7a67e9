"""The plan of a study as a table: every run, with what it takes."""

from __future__ import annotations

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch.report_page import duration
from launch.scaling.estimate import START_S, Pace, device_peak, probe
from launch.scaling.shapes import scientific, short
from launch.scaling.study import Plan, Sized
from train.hardware import total_memory

WIDTH = 200  # columns, of which the table needs some 150
NAMED = 5  # runs that a warning names


def seconds(plan: Plan, console: Console) -> list[float]:
    """The estimated time of each run; NaN where nothing is known."""
    study = plan.study
    if not study.probe:
        peak = study.peak or device_peak(plan.runs[0].config) or math.nan
        nodes = int((study.slurm or {}).get("nodes", 1)) if study.launcher == "slurm" else 1
        return [
            START_S + run.flops / (peak * study.utilization * nodes * (run.config.engine.ranks or 1))
            for run in plan.runs
        ]
    shapes = {run.step: run for run in reversed(plan.runs)}
    console.rule("a few steps of each shape, to see how long it takes")
    paces = probe([run.planned for run in shapes.values()], Path(study.trials), console, plan.at_once)
    by_size = dict(zip(shapes, paces, strict=True))
    return [_seconds(run, by_size[run.step]) for run in plan.runs]


def _seconds(run: Sized, pace: Pace) -> float:
    every = run.config.evaluation.every
    return pace.seconds(run.steps, 1 + ((run.steps - 1) // every if every else 0))


def show(plan: Plan, console: Console) -> None:
    """Print the table, and what to know of it."""
    times = seconds(plan, console)
    shown = Table(box=None, padding=(0, 1, 0, 0))
    shown.add_column("run", no_wrap=True)
    ruled = sorted({key for run in plan.runs for key in run.given})
    for column in (
        "parameters", "without emb.", "tokens", "steps", "tokens/N", "epochs", "FLOP",
        *(key.rpartition(".")[2] for key in ruled or ["optim.learning_rate"]), "memory", "time",
    ):  # fmt: skip
        shown.add_column(column, justify="right", no_wrap=True)
    for run, size, time in zip(plan.runs, plan.memory, times, strict=True):
        counts, epochs = run.shape.counts, plan.epochs(run)
        given = [f"{run.given[key]:g}" for key in ruled] or [f"{run.config.optim['learning_rate']:g}"]
        shown.add_row(
            run.name, short(counts.parameters), short(counts.parameters_without_embeddings),
            short(run.tokens), f"{run.steps:,}", f"{run.tokens / counts.parameters:.3g}",
            "" if epochs is None else f"{epochs:.2g}", f"{run.flops:.4g}", *given,
            _bytes(size), _time(time),
        )  # fmt: skip
    # Whole lines, which a narrower terminal wraps.
    Console(file=console.file, highlight=False, width=WIDTH).print(shown)
    whole = max(sum(times) / plan.at_once, max(times))
    flops = scientific(sum(run.flops for run in plan.runs))
    console.print(
        f"{len(plan.runs)} runs, {flops} FLOP, {plan.at_once} at a time: about {_time(whole)} where nothing"
        " was trained before",
        soft_wrap=True,
    )
    if plan.study.launcher != "slurm" and plan.in_memory < plan.at_once:
        console.print(
            f"warning: a rank takes up to {_bytes(plan.most)}, too much for"
            f" {plan.at_once} at a time in {_bytes(total_memory())}; set micro_batch, engine.zero_stage or"
            " parallel",
            soft_wrap=True,
        )
    if warning := repeated(plan):
        console.print(f"warning: {warning}", soft_wrap=True)


def repeated(plan: Plan) -> str:
    """What is to say of runs whose budget is more than the data; nothing where there are none."""
    runs = [run for run in plan.runs if (plan.epochs(run) or 0) > 1]
    if not runs:
        return ""
    most = max(plan.epochs(run) or 0 for run in runs)
    names = ", ".join(run.name for run in runs[:NAMED])
    more = f" and {len(runs) - NAMED} more" if len(runs) > NAMED else ""
    return (
        f"{len(runs)} runs see data more than once, up to {most:.3g} times, for it has {plan.unique:,}"
        f" training tokens: {names}{more}"
    )


def _bytes(number: float) -> str:
    unit = next(unit for unit in (30, 20) if number >= 2**unit or unit == 20)
    return f"{number / 2**unit:.3g} {'GiB' if unit == 30 else 'MiB'}"


def _time(value: float) -> str:
    return "?" if math.isnan(value) else duration(value)
