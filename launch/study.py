"""Many runs: each is `python -m train` in a process of its own, as many at a time as there are cores for.

Where a run lies follows from its config and its data. So one that has finished is found by its records and
not trained again, in another study too; one that was broken off is gone on with; and so is a study that was
killed, by its command.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from hydra import compose
from omegaconf import OmegaConf
from rich.console import Console

from data.cli import instantiate
from data.prepare import prepare
from launch.launchers import OUTPUT, Here, Launcher, Process
from launch.overrides import composing, spelled
from launch.pool import Pool
from train.config import RunConfig, check_device, check_world, from_hydra, to_container
from train.records import Record, read_metrics
from train.rundir import RunDir
from train.start import build_model

ALONE = ("engine.ranks=1", "engine.threads=1")  # for a run that does not say otherwise


@dataclass(frozen=True)
class Planned:
    """A run to be made. overrides: what is typed after `python -m train`, without name and directory."""

    name: str
    overrides: tuple[str, ...]

    def config(self) -> RunConfig:
        """Raises ValueError on what is wrong with it."""
        with composing():
            return from_hydra(compose("config", overrides=[*ALONE, *self.overrides]))


@dataclass(frozen=True)
class Trained:
    """A planned run that has ended. diverged: what its policy stopped it for; None where it has finished."""

    planned: Planned
    directory: Path
    diverged: str | None

    def records(self, kind: str) -> list[Record]:
        """Those of a kind, in their order."""
        return [record for record in read_metrics(RunDir(self.directory).metrics) if record["kind"] == kind]

    @property
    def loss(self) -> float:
        """The last validation loss in nats per token; infinite where the run has diverged."""
        return math.inf if self.diverged else self.records("eval")[-1]["loss"]


def run_all(
    planned: Sequence[Planned], folder: Path, console: Console, parallel: int | None = None
) -> list[Trained]:
    """Every planned run, in their order, from directories below `folder`; what is not there is trained.

    parallel: runs at a time; None: as many as the machine trains beside each other.

    Raises:
        ValueError: what is wrong with a config or its data, before anything is trained; or, when all others
            have ended, that runs have failed.
        SystemExit: with REQUEUE or INTERRUPTED, after a signal that was passed on to the runs.
    """
    found = attempt(planned, folder, console, parallel)
    ended = [trained for trained in found if trained]
    if failed := len(found) - len(ended):
        raise ValueError(
            f"{failed} of {len(found)} runs failed, see above; the same command tries them again"
        )
    return ended


def attempt(
    planned: Sequence[Planned],
    folder: Path,
    console: Console,
    parallel: int | None = None,
    launcher: Launcher | None = None,
) -> list[Trained | None]:
    """As `run_all`, for who goes on without those that failed: each of them is None, and was told.

    launcher: how the runs' processes are started; None: on this machine.
    """
    jobs = jobs_of(planned, folder, launcher)
    missing = [job for job in jobs if not job.trained()]
    if len(missing) < len(jobs):
        console.print(f"{len(jobs) - len(missing)} of {len(jobs)} runs: trained before")
    once: dict[Path, Job] = {}
    for job in missing:
        once.setdefault(job.directory, job)
    if once:
        parallel = parallel or min(at_a_time(job.config) for job in missing)
        Pool(list(once.values()), console, parallel).work()
    return [job.trained() for job in jobs]


@dataclass(frozen=True)
class Job:
    """A planned run and where it lies; a task of the pool."""

    planned: Planned
    config: RunConfig
    directory: Path
    launcher: Launcher = field(default_factory=Here)

    @property
    def name(self) -> str:
        return self.planned.name

    def trained(self) -> Trained | None:
        """What has become of the run, where it has ended."""
        records = read_metrics(RunDir(self.directory).metrics)
        events = [record for record in records if record["kind"] == "event"]
        if events and events[-1].get("action") == "stop":
            return Trained(self.planned, self.directory, events[-1]["message"])
        if not any(event["event"] == "finish" for event in events):
            return None
        last = [record for record in records if record["kind"] == "eval"][-1]
        wrong = "the validation loss is not finite" if last["loss"] is None else None
        return Trained(self.planned, self.directory, wrong)

    def environment(self, slot: int) -> dict[str, str]:
        """Of the run's process: on GPUs of its own, as far as there are as many."""
        ranks, gpus = self.config.engine.ranks or 1, torch.cuda.device_count()
        own = {"OMP_NUM_THREADS": str(self.config.engine.threads or 1)}
        if gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
            mine = [visible.split(",")[(slot * ranks + rank) % gpus] for rank in range(min(ranks, gpus))]
            own["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        return {**os.environ, **own}

    def start(self, slot: int) -> Process:
        """Its command, in a process of the launcher's kind."""
        own = f"name={spelled(self.directory.name)}", f"directory={spelled(str(self.directory))}"
        self.directory.mkdir(parents=True, exist_ok=True)
        arguments, ranks = (*ALONE, *self.planned.overrides, *own), self.config.engine.ranks or 1
        return self.launcher.start(arguments, ranks, self.environment(slot), self.directory)

    def told(self, code: int) -> str:
        """How the run ended, in a line. code: its process's."""
        if trained := self.trained():
            diverged = trained.diverged
            return f"diverged: {diverged}" if diverged else f"validation loss {trained.loss:.4f}"
        output = self.directory / OUTPUT
        lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line for line in reversed(lines) if line.strip()), "nothing was said")
        return f"failed with exit code {code}: {last.strip()} (see {output})"


def jobs_of(planned: Sequence[Planned], folder: Path, launcher: Launcher | None = None) -> list[Job]:
    """The runs with their configs and directories; their data is prepared."""
    configs = [one.config() for one in planned]
    for config in configs:
        _check(config, here=launcher is None or isinstance(launcher, Here))
    prepared: dict[str, str] = {}
    directories: dict[str, Path] = {}
    jobs = []
    for one, config in zip(planned, configs, strict=True):
        recipe = json.dumps([config.data, config.tokenizer])
        if recipe not in prepared:
            data, tokenizer = OmegaConf.create(config.data), OmegaConf.create(config.tokenizer)
            prepared[recipe] = prepare(data, tokenizer).name  # which tells its content
        settings = to_container(replace(config, name="", directory=""))
        content = json.dumps([settings, prepared[recipe]], sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()[:12]
        if key not in directories:
            directories[key] = next(folder.glob(f"*-{key}"), folder / f"{one.name}-{key}")
        jobs.append(Job(one, config, directories[key], launcher or Here()))
    return jobs


def _check(config: RunConfig, here: bool) -> None:
    """Raises ValueError for what the run's process would refuse: it is said once, before any is started.

    here: whether it runs on this machine.
    """
    check_world(config, config.engine.ranks or 1)
    if here:
        check_device(config)
    for key in ("objective", "optim", "schedule"):
        instantiate(getattr(config, key), key)
    with torch.device("meta"):
        build_model(config, vocabulary_size=1)


def at_a_time(config: RunConfig) -> int:
    """How many such runs this machine trains beside each other, on GPUs or else cores of their own."""
    ranks, gpus = config.engine.ranks or 1, torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0)) // (config.engine.threads or 1)
    return max(1, (gpus or cores) // ranks)
