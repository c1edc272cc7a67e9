"""Learning-rate schedules over the steps, as one self-contained HTML page.

    python -m launch.schedules                                    # all of conf/schedule
    python -m launch.schedules cosine wsd wsd,decay=100,shape=linear --steps 1000
    python -m launch.schedules --run runs/a runs/b                # planned learning rate and global batch

A schedule is a choice of conf/schedule, with other settings after commas.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from hydra import compose, initialize_config_dir
from plotly.subplots import make_subplots

from data.cli import instantiate, main_guard
from data.files import write
from launch.report_page import style
from launch.request import CONF
from train.config import RunConfig, load, steps, total_steps
from train.optim.schedules import Schedule
from train.rundir import RunDir

POINTS = 2000  # about so many are drawn of a curve
HEIGHT = 420  # pixels of a plot

Trace = dict[str, Any]  # of plotly; where it stands: the title of its plot


def multipliers(text: str, total: int) -> Trace:
    """The curve of a schedule, spelled as on the command line, over `total` steps.

    Raises ValueError, or one of Hydra's errors, where it is not one, or does not fit.
    """
    name, *settings = text.split(",")
    overrides = [f"schedule={name}", *(f"schedule.{setting}" for setting in settings)]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        schedule = instantiate(compose("config", overrides=overrides).schedule, "schedule")
    if isinstance(schedule, Schedule):
        schedule.check_horizon(total)
    return {"name": text, **curve(lambda step: schedule(step, total), total)}


def learning_rate(rundir: RunDir, config: RunConfig) -> Trace:
    """The curve of a run's learning rate."""
    schedule, rule = instantiate(config.schedule, "schedule"), instantiate(config.optim, "optim")
    total = planned_steps(rundir, config)
    return {
        "name": str(rundir.path),
        **curve(lambda step: rule.learning_rate * schedule(step, total), total),
    }


def global_batch(rundir: RunDir, config: RunConfig) -> Trace:
    """The curve of a run's sequences per step: as they are from a step on, until the next that is given."""
    total = planned_steps(rundir, config)
    stages = [stage for stage in steps(config).stages if stage.step < total]
    held = [*stages, stages[-1]]  # to the last step
    return {
        "name": str(rundir.path),
        "x": [*(stage.step for stage in stages), total - 1],
        "y": [stage.global_batch for stage in held],
        "line": {"shape": "hv"},
        "text": [
            f"of {stage.sequence_length:,} tokens: {stage.global_batch * stage.sequence_length:,}"
            for stage in held
        ],
    }


def curve(value: Callable[[int], float], total: int) -> Trace:
    """A value at steps that lie close enough to draw, the first and the last of `total` among them."""
    drawn = sorted({*range(0, total, max(1, total // POINTS)), total - 1})
    return {"x": drawn, "y": [value(step) for step in drawn]}


def planned_steps(rundir: RunDir, config: RunConfig) -> int:
    """The steps of a run's horizon. Raises ValueError where they are not known before it trains."""
    if config.horizon.epochs is None:
        return total_steps(config, samples=0)
    if not rundir.environment.exists():
        raise ValueError(
            f"{rundir.path}: has not begun to train, and how many steps horizon.epochs are is not known"
            " before; start it, or set horizon.steps"
        )
    return json.loads(rundir.environment.read_text())["total_steps"]


def figure(plots: dict[str, list[Trace]]) -> go.Figure:
    """The plots, by their titles, below one another; a curve looks alike wherever it has the same name."""
    names = list(dict.fromkeys(trace["name"] for traces in plots.values() for trace in traces))
    whole = make_subplots(rows=len(plots), subplot_titles=list(plots), vertical_spacing=0.26 / len(plots))
    shown: set[str] = set()  # in the legend
    for row, traces in enumerate(plots.values(), 1):
        for trace in traces:
            name = trace["name"]
            whole.add_scatter(
                **trace | {"line": {**style(names.index(name)), "width": 2, **trace.get("line", {})}},
                mode="lines",
                legendgroup=name,
                showlegend=name not in shown,
                hovertemplate="step %{x:,}<br><b>%{y:.4g}</b>" + " %{text}" * ("text" in trace),
                row=row,
                col=1,
            )
            shown.add(name)
    whole.update_xaxes(title_text="optimizer step, from 0", exponentformat="B")
    whole.update_yaxes(rangemode="tozero", exponentformat="power")
    return whole.update_layout(
        template="plotly_white", height=HEIGHT * len(plots), margin={"t": 50, "b": 50}, showlegend=True
    )


def main() -> None:
    parser = ArgumentParser(
        prog="python -m launch.schedules", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("schedules", nargs="*", metavar="SCHEDULE", help="default: all, without --run")
    parser.add_argument("--run", nargs="+", type=Path, metavar="RUN", default=[], help="directories of runs")
    parser.add_argument("--steps", type=_positive, default=1000, help="of the schedules (default 1000)")
    parser.add_argument("--output", type=Path, metavar="FILE", default=Path("runs/schedules.html"))
    arguments = parser.parse_args()
    chosen = arguments.schedules
    if not chosen and not arguments.run:
        chosen = sorted(path.stem for path in (CONF / "schedule").glob("*.yaml"))
    runs = [(RunDir(directory), load(RunDir(directory).config)) for directory in arguments.run]
    plots = {
        "multiplier of the peak learning rate": [multipliers(text, arguments.steps) for text in chosen],
        "learning rate": [learning_rate(*run) for run in runs],
        "global batch, sequences per step": [global_batch(*run) for run in runs],
    }
    page = figure({title: traces for title, traces in plots.items() if traces}).to_html(
        config={"displaylogo": False, "showSendToCloud": False}
    )
    try:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write(arguments.output, page)
    except OSError as error:
        raise ValueError(
            f"--output: {arguments.output} cannot be written ({error.strerror}); name another file"
        ) from None
    print(f"schedules: {arguments.output}")


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ArgumentTypeError(f"{text} is below 1")
    return int(text)


if __name__ == "__main__":
    main_guard(main)
