"""`python -m train [group=choice] [key=value] …`: compose the config and start the run's ranks.

By itself it starts engine.ranks processes on this machine (by default one per GPU); under torchrun or
deepspeed, which have started them already, it is one of them. With --multirun every job of a sweep is such a
run, one after the other, in a directory of its own below the sweep's.
"""

from __future__ import annotations

from train.stop import INTERRUPTED, REQUEUE, STARTED, install

if __name__ == "__main__":
    install()  # before what takes seconds to import

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

from data.cli import main_guard, one_line_errors
from train.config import RunConfig, from_hydra
from train.ranks import end_with, say, start
from train.rundir import COMMAND, RunDir, command
from train.start import begin

ROOT = Path(__file__).resolve().parent.parent
_failed: list[str] = []  # jobs of a sweep


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
@one_line_errors
def main(node: DictConfig) -> None:
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        _job(node, _job_name())
    elif "RANK" in os.environ:
        _join(from_hydra(node))
    else:
        _launch(from_hydra(node))


def _job(node: DictConfig, name: str) -> None:
    """One run of a sweep. Where it fails, that is kept for the end, and the next one is trained all the same.

    Raises:
        ValueError: this process is a rank itself.
        SystemExit: the run was stopped, and so is the sweep.
    """
    if "RANK" in os.environ:
        raise ValueError("--multirun: starts the ranks of each run (engine.ranks); leave the launcher out")
    try:
        config = one_line_errors(from_hydra)(node)
        job = replace(config, directory=f"{config.directory}/{name}")
        one_line_errors(_launch)(job, own_process=True)
    except SystemExit as ended:
        if ended.code in (REQUEUE, INTERRUPTED):
            say(f"{name}: stopped, and the sweep with it; the same command goes on from here")
            raise
        say(f"{name}: failed")
        _failed.append(name)


def _job_name() -> str:
    """What tells this job of a sweep from the others: its values of what is swept."""
    parser, given = OverridesParser.create(), [a for a in sys.argv[1:] if "=" in a and not a.startswith("-")]
    swept = {o.key_or_group for o in parser.parse_overrides(given) if o.is_sweep_override()}
    own = parser.parse_overrides(list(HydraConfig.get().overrides.task))
    name = ",".join(str(o.input_line) for o in own if o.key_or_group in swept)
    return name.replace(os.sep, "_") or str(HydraConfig.get().job.num)


def _join(config: RunConfig) -> None:
    """Be one of the ranks that a launcher started. Rank 0 prepares; the others wait for it to join them."""
    from train.run import run

    if os.environ["RANK"] == "0":
        with install().unwinding():
            rundir = begin(config, int(os.environ["WORLD_SIZE"]))
    else:
        rundir = RunDir(config.directory)
    run(rundir)


def _launch(config: RunConfig, own_process: bool = False) -> None:
    """Start the ranks: one in this process, several (or, of a sweep, any number) in their own."""
    started = time.monotonic()
    gpus = torch.cuda.device_count()
    ranks = min(config.engine.ranks or gpus, gpus) if gpus else config.engine.ranks or 1
    with install().unwinding():
        rundir = begin(config, ranks)
    if ranks == 1 and not own_process:
        from train.run import run

        return run(rundir)
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, STARTED: str(started), COMMAND: command()}
    rank = [sys.executable, "-m", "train.run", str(rundir.path.resolve())]
    try:
        code = start(rank, ranks, environment, [rundir.lock_descriptor()], config.stop.grace)
    finally:
        rundir.unlock()
    if code:
        sys.exit(code)


def _whole() -> None:
    """The command: a run, or a sweep of them. Raises SystemExit where a job of a sweep failed."""
    main()
    if _failed:
        told = f"{len(_failed)} of the sweep's runs failed: {'; '.join(_failed)}"
        sys.exit(f"error: {told}; see above; the same command tries them again")


if __name__ == "__main__":
    # The deepspeed launcher adds an argument that Hydra does not know; the environment says the same.
    sys.argv[1:] = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    end_with(lambda: main_guard(_whole))
