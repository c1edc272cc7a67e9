"""Scaling laws: from budgets to runs, from runs to a law, from a law to a prediction.

    python -m launch.scaling plan study=NAME [key=value …]     what would be trained, and what it takes
    python -m launch.scaling run study=NAME [key=value …]      train it; points.csv and curves.csv
    python -m launch.scaling fit study=NAME                    all laws, judged by the largest budget
    python -m launch.scaling fit table=FILE directory=DIR …    the same of any CSV or JSON of runs
    python -m launch.scaling report study=NAME                 report.html of what was fitted
    python -m launch.scaling forecast study=NAME budget=1e21   best size, tokens and loss; or parameters=…,
                                                               unique_tokens=…

A study is a YAML in conf/study. A run that is there is not trained again; killed, the study goes on by the
same command.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from data.cli import main_guard, one_line_errors
from launch.overrides import refuse
from launch.request import CONF
from launch.scaling.commands import fit, forecast, report
from launch.scaling.plan import show
from launch.scaling.study import OWN, plan_of
from launch.scaling.training import train
from train.ranks import end_with


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="scaling")
@one_line_errors
def plan(node: DictConfig) -> None:
    refuse(HydraConfig.get().overrides.task, OWN)
    show(plan_of(node), Console(highlight=False))


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="scaling")
@one_line_errors
def run(node: DictConfig) -> None:
    refuse(HydraConfig.get().overrides.task, OWN)
    console = Console(highlight=False)
    planned = plan_of(node)
    show(planned, console)
    train(planned, console, Path(node.directory))


COMMANDS: dict[str, Callable[[], None]] = {
    "plan": plan,
    "run": run,
    "fit": fit,
    "report": report,
    "forecast": forecast,
}


@one_line_errors
def main() -> None:
    """Raises ValueError where the command is none."""
    given = sys.argv[1] if len(sys.argv) > 1 else "nothing"
    if given in ("-h", "--help"):
        print(__doc__)
        return
    if given not in COMMANDS:
        raise ValueError(f"{given}: is no command; give one of {', '.join(COMMANDS)} first")
    sys.argv[1:2] = []
    main_guard(COMMANDS[given])


if __name__ == "__main__":
    end_with(main)
