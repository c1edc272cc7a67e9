"""Does it matter which tokens a masked language model has to guess? Random, whole-word and knowledge masking
at equal steps, compared on the entities of held-out text.

    python -m launch.masking [--seeds 3] [--directory runs/masking] [experiment=ernie-tiny key=value …]

Trains one run per masking and seed, all with the same data, model and steps, as many at a time as there are
cores, and evaluates each on one task that none was trained on alone, all entities masked
(objective=knowledge-entities). What is there is not trained again. Knowledge masking adds phrases after a
third of the steps, entities after two; it alone is told which tokens are entities, by the same list that the
task is made of. Writes results.json and report.html.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hydra import compose
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student_t

from data.cli import instantiate, one_line_errors
from launch import study_page
from launch.evaluate import evaluate_run
from launch.overrides import composing
from launch.report_page import style
from launch.study import Planned, run_all
from launch.study_page import Axis, Line, folded, plot, plots, section, written
from train.ranks import end_with

MASKINGS = {"random": "masked", "whole word": "masked-whole-word", "knowledge": "knowledge"}
TASK = "knowledge-entities"


def study(directory: Path, seeds: int, overrides: list[str], console: Console) -> dict[str, Any]:
    """Train and evaluate every run: per masking and seed the loss in nats per token of a held-out entity.

    Raises ValueError where horizon.steps is not set, a run fails or diverges.
    """
    planned = {
        masking: [_planned(objective, seed, overrides) for seed in range(seeds)]
        for masking, objective in MASKINGS.items()
    }
    every = [one for runs in planned.values() for one in runs]
    trained = dict(zip(every, run_all(every, directory / "trials", console), strict=True))
    results: dict[str, Any] = {"overrides": overrides, "losses": {}, "labels": {}}
    for masking, runs in planned.items():
        for one in runs:
            if diverged := trained[one].diverged:
                raise ValueError(f"{one.name}: diverged, {diverged}; lower optim.learning_rate")
            with console.status(f"{one.name}: held-out entities"):
                result = evaluate_run(trained[one].directory, _task())
            results["losses"].setdefault(masking, []).append(result.loss)
            results["labels"].setdefault(masking, []).append(result.tokens_evaluated)
    return results


def _planned(objective: str, seed: int, overrides: list[str]) -> Planned:
    """In knowledge masking phrases take part after a third of the steps, and entities after two."""
    own = [*overrides, f"objective={objective}", f"seed={seed}"]
    if objective == "knowledge":
        steps = Planned(objective, tuple(own)).config().horizon.steps
        if not steps:
            raise ValueError("horizon.steps: must be set, for stages are counted in steps")
        own += [f"objective.stages.phrase={steps // 3}", f"objective.stages.entity={2 * steps // 3}"]
    return Planned(f"{objective}-{seed}", tuple(own))


def _task() -> Any:
    """The entities to guess: the same ones for every run."""
    with composing():
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


def page(results: dict[str, Any]) -> str:
    """The whole page."""
    losses = results["losses"]
    names = [name for name, values in losses.items() for _ in values]
    seeds = Line("seeds", style(4)["color"], [names], sum(losses.values(), []), mode="markers")
    centres = [interval(values) for values in losses.values()]
    middle = Line(
        "means, with 95 % intervals", style(0)["color"], [list(losses)], [middle for middle, _ in centres],
        mode="markers", symbol="diamond", low=[middle - half for middle, half in centres],
        high=[middle + half for middle, half in centres],
    )  # fmt: skip
    note = "Held-out entities, masked whole, by what training masked; lower is better."
    axes = [Axis("masking")], Axis("nats per token of an entity")
    head, rows = ["", "loss on held-out entities", "less random, by seed"], _rows(losses)
    overrides = "\n".join(results["overrides"])
    body = [
        plots([plot("What to mask", note, *axes, [seeds, middle])]),
        section("Means with 95 % intervals", study_page.table(head, rows)),
        section("Settings", folded("of the runs", overrides)),
    ]
    return study_page.page("What to mask", "masking study", "".join(body))


def _rows(losses: dict[str, list[float]]) -> list[tuple[str, str, str]]:
    """Means, and differences paired by seed, with their intervals."""
    less, rows = differences(losses), []
    for name, values in losses.items():
        paired = "" if name not in less else "{:+.4f} ± {:.4f}".format(*interval(less[name]))
        rows.append((name, "{:.4f} ± {:.4f}".format(*interval(values)), paired))
    return rows


def table(losses: dict[str, list[float]]) -> Table:
    """For the terminal."""
    shown = Table("masking", "loss on held-out entities", "less random, by seed", title="Masking study")
    for row in _rows(losses):
        shown.add_row(*row)
    return shown


@one_line_errors
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
    console.print(table(results["losses"]))
    console.print(str(written(arguments.directory, results, page(results))))


if __name__ == "__main__":
    end_with(main)
