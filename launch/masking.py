"""Does it matter which tokens a masked language model has to guess? Random, whole-word and knowledge masking
at equal steps, compared on the entities of held-out text.

    python -m launch.masking [--seeds 3] [--directory runs/masking] [experiment=ernie-tiny key=value …]

Trains one run per masking and seed, all with the same data, model and steps (what is there already goes on),
evaluates each on one task that none was trained on alone, all entities masked (objective=knowledge-entities),
and writes results.json and report.html. Knowledge masking adds phrases after a third of the steps, entities
after two; it alone is told which tokens are entities, by the same list that the task is made of.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import plotly.graph_objects as go
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student_t

from data.cli import instantiate, main_guard
from data.files import write
from launch.evaluate import evaluate_run
from launch.request import CONF

MASKINGS = {"random": "masked", "whole word": "masked-whole-word", "knowledge": "knowledge"}
TASK = "knowledge-entities"


def study(directory: Path, seeds: int, overrides: list[str], console: Console) -> dict[str, Any]:
    """Train and evaluate every run: per masking and seed the loss in nats per token of a held-out entity."""
    results: dict[str, Any] = {"overrides": overrides, "losses": {}, "labels": {}}
    for masking, objective in MASKINGS.items():
        for seed in range(seeds):
            run = directory / f"{objective}-{seed}"
            chosen = [f"objective={objective}", f"seed={seed}", f"name={run.name}", f"directory={run}"]
            stages = _stages(overrides) if objective == "knowledge" else []
            console.rule(f"{masking}, seed {seed}")
            command = [sys.executable, "-m", "train", *overrides, *chosen, *stages]
            status = subprocess.run(command, cwd=CONF.parent).returncode
            if status:
                sys.exit(status)  # the run has said why
            result = evaluate_run(run, _task())
            results["losses"].setdefault(masking, []).append(result.loss)
            results["labels"].setdefault(masking, []).append(result.tokens_evaluated)
    return results


def _stages(overrides: list[str]) -> list[str]:
    """The steps from which phrases and entities take part. Raises ValueError without horizon.steps."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        steps = compose("config", overrides=overrides).horizon.steps
    if not steps:
        raise ValueError("horizon.steps: must be set, for stages are counted in steps")
    return [f"objective.stages.phrase={steps // 3}", f"objective.stages.entity={2 * steps // 3}"]


def _task() -> Any:
    """The entities to guess: the same ones for every run."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("evaluate", overrides=[f"objective={TASK}", "run=any"])
    return instantiate(node.objective, "objective")


def interval(values: list[float]) -> tuple[float, float]:
    """Mean of at least two values, and half the width of its 95 % confidence interval (Student's t)."""
    return mean(values), student_t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))


def differences(losses: dict[str, list[float]], base: str = "random") -> dict[str, list[float]]:
    """Each masking's loss less that of `base` with the same seed."""
    return {
        name: [a - b for a, b in zip(values, losses[base], strict=True)]
        for name, values in losses.items()
        if name != base
    }


def figure(losses: dict[str, list[float]]) -> go.Figure:
    """Every seed a point, beside it the mean with its interval."""
    plot = go.Figure()
    for name, values in losses.items():
        centre, half = interval(values)
        plot.add_scatter(
            x=[name] * len(values), y=values, mode="markers", marker={"size": 9, "color": "#56B4E9"}
        )
        plot.add_scatter(
            x=[name], y=[centre], error_y={"array": [half]}, mode="markers",
            marker={"size": 13, "color": "#0072B2", "symbol": "diamond"},
        )  # fmt: skip
    plot.update_layout(
        title="Held-out entities, masked whole, by what training masked"
        "<br><sup>points: seeds; diamonds: means with 95 % intervals; lower is better</sup>",
        yaxis_title="nats per token of an entity",
        showlegend=False,
        template="plotly_white",
    )
    return plot


def table(losses: dict[str, list[float]]) -> Table:
    """Means, and differences paired by seed, with their intervals."""
    shown = Table("masking", "loss on held-out entities", "less random, by seed", title="Masking study")
    less = differences(losses)
    for name, values in losses.items():
        centre, half = interval(values)
        paired = "" if name not in less else "{:+.4f} ± {:.4f}".format(*interval(less[name]))
        shown.add_row(name, f"{centre:.4f} ± {half:.4f}", paired)
    return shown


def main() -> None:
    parser = ArgumentParser(
        prog="python -m launch.masking", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, choices=range(2, 11), default=3, help="runs per masking (2 to 10)"
    )
    parser.add_argument("--directory", type=Path, default=Path("runs/masking"))
    parser.add_argument(
        "overrides", nargs="*", default=["experiment=ernie-tiny"], help="as of python -m train"
    )
    arguments = parser.parse_intermixed_args()
    console = Console(highlight=False)
    results = study(arguments.directory, arguments.seeds, arguments.overrides, console)
    losses = results["losses"]
    write(arguments.directory / "results.json", json.dumps(results, indent=1) + "\n")
    figure(losses).write_html(arguments.directory / "report.html", include_plotlyjs=True)
    console.print(table(losses))
    console.print(f"{arguments.directory / 'report.html'}")


if __name__ == "__main__":
    main_guard(main)
