"""Which hyperparameters? A search over a space that one YAML names, many runs beside each other.

    python -m launch.sweep search=learning-rate [trials=20] [workers=2] [sampler=grid] [key=value …]
    python -m launch.sweep search=learning-rate export=wandb > sweep.yaml   # then: wandb sweep sweep.yaml
    python -m launch.sweep search=learning-rate export=multirun | sh        # Hydra's own sweep, over the grid

optuna's tree-structured Parzen estimator (Bergstra et al. 2011, NeurIPS) chooses by the losses so far. A run
whose lowest validation loss is above the median of the finished ones at that step is stopped by a signal: it
has saved, and can be gone on with by hand. One that diverged is pruned for optuna, too, which ranks it below
all that finished: a failed trial would be forgotten, and the sampler come back to where runs diverge.

What is chosen follows from the seed, the number of the trial and the losses until then. Killed at any moment,
the search goes on by the same command: trials that had begun go on, under their numbers and from their runs'
checkpoints. With one worker it then finds what it would have found. A run that is there is not trained again.
Writes results.json and report.html into the directory, beside optuna's own trials.log.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from data.cli import main_guard, one_line_errors
from launch.overrides import as_typed, spelled, split, top
from launch.pool import Pool
from launch.request import CONF
from launch.search import Plan, Search, Sweep, Task
from launch.search_space import multirun, overrides, settings, space, wandb
from launch.study import Planned, at_a_time
from launch.study_page import written
from launch.sweep_page import finding, page, ranked, table
from train.lock import Lock
from train.ranks import end_with


def sweep_of(node: DictConfig, given: Sequence[str]) -> Sweep:
    """What a composed conf/sweep.yaml asks for. given: the overrides that were typed.

    Raises:
        ValueError: one line on what is wrong with a key, of the search, its space or its runs.
    """
    if "search" not in node:
        known = ", ".join(sorted(path.stem for path in (CONF / "search").glob("*.yaml")))
        raise ValueError(f"search: must be set to a space of conf/search, for example one of {known}")
    plan, run_node = split(node, Plan)
    parameters = space(plan.search)
    for override in given:
        if (key := override.split("=")[0].lstrip("+~")) in plan.search:
            raise ValueError(f"{key}: is searched for; leave it out here, or in the space")
    typed = tuple(one for one in as_typed(run_node, ("name", "directory")) if top(one) != "search")
    first = overrides(parameters, settings(parameters)[0])
    config = Planned(node.name, (*typed, *first)).config()
    return Sweep(plan, parameters, node.name, node.directory, typed, config)


def exported(sweep: Sweep) -> str:
    """The same space for W&B or for Hydra, each of whose runs lies in a directory of its own below ours."""
    plan, config, name = sweep.plan, sweep.config, f"name={spelled(sweep.name)}"
    if plan.export == "multirun":
        return multirun(sweep.parameters, [*sweep.typed, name, f"directory={spelled(sweep.directory)}"])
    place = spelled(f"{sweep.directory}/${{oc.env:WANDB_RUN_ID}}")  # the agent sets it for each run
    own = [*(one for one in sweep.typed if top(one) != "track"), "track=online"]
    own += [f"track.project={spelled(config.track.project)}", name, f"directory={place}"]
    every = config.evaluation.every
    least = max(1, plan.pruning.steps // every) if every and plan.pruning.finished else None
    return wandb(sweep.parameters, own, sweep.name, config.track.project, plan.trials, least)


def search(sweep: Sweep, console: Console) -> dict[str, Any]:
    """Make the trials that are missing, and write what came out; what results.json holds.

    Raises:
        ValueError: what is wrong with the data, or with the directory.
        SystemExit: after a signal that was passed on to the runs.
    """
    directory, every = Path(sweep.directory), sweep.config.evaluation.every
    lock = Lock(directory)
    try:
        found = Search(sweep)
        workers = sweep.plan.workers or at_a_time(sweep.config)
        known = f", {found.over} of them over" if found.over else ""
        console.print(f"{found.total} trials{known}, {workers} at a time: {', '.join(sweep.plan.search)}")
        if sweep.plan.sampler == "tpe" and sweep.plan.pruning.finished and not every:
            console.print("evaluation.every: is null, so nothing can be pruned")
        try:
            Pool([Task(found) for _ in range(found.total - found.over)], console, workers).work()
        finally:
            results = found.results()
            written(directory, results, page(results))
        return results
    finally:
        lock.release()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="sweep")
@one_line_errors
def main(node: DictConfig) -> None:
    sweep = sweep_of(node, HydraConfig.get().overrides.task)
    if sweep.plan.export:
        print(exported(sweep), end="")
        return
    console = Console(highlight=False)
    results = search(sweep, console)
    console.print(table(results))
    console.print(finding(results), markup=False, soft_wrap=True)
    console.print(str(Path(sweep.directory) / "report.html"), soft_wrap=True)
    if unfinished := sum(one["state"] == "unfinished" for one in results["trials"]):
        raise ValueError(f"{unfinished} trials failed, see above; the same command tries them again")
    if not ranked(results):
        raise ValueError("search: no trial has finished; choose another space")


if __name__ == "__main__":
    end_with(lambda: main_guard(main))
