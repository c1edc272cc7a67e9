"""`python -m train [group=choice] [key=value] …`: compose the config and start the run's ranks.

By itself it starts engine.ranks processes on this machine (by default one per GPU); under torchrun or
deepspeed, which have started them already, it is one of them.
"""

from __future__ import annotations

from train.stop import STARTED, install

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
from train.ranks import end_with, start
from train.rundir import COMMAND, RunDir, command
from train.start import begin

ROOT = Path(__file__).resolve().parent.parent


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
@one_line_errors
def main(node: DictConfig) -> None:
    config = from_hydra(node)
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if sweep:
        config = replace(config, directory=f"{config.directory}/{_job_name()}")
    if "RANK" in os.environ:
        _join(config)
    else:
        _launch(config, own_process=sweep)


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


def _launch(config: RunConfig, own_process: bool) -> None:
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


if __name__ == "__main__":
    # The deepspeed launcher adds an argument that Hydra does not know; the environment says the same.
    sys.argv[1:] = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    end_with(lambda: main_guard(main))
