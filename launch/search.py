"""The trials of a sweep: what optuna knows of them, and the run of each.

Killed at any moment, a search goes on by the same command: trials that had begun go on, under their numbers
and from their runs' checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from data.cli import one_line
from data.prepare import prepare
from launch.launchers import Process
from launch.search_space import Parameter, Setting, overrides, settings
from launch.study import Job, Planned, jobs_of
from launch.sweep_page import OVER, evaluations, told
from train.config import RunConfig
from train.rundir import RunDir

SAMPLERS, EXPORTS = ("tpe", "grid"), ("wandb", "multirun")
FILE = "trials.log"  # in the directory: what optuna knows
POLL = 0.5  # seconds between two looks at a run's metrics.jsonl
ENOUGH = 10  # finished trials to tell what the loss depends on


@dataclass(frozen=True)
class Pruning:
    finished: int | None
    steps: int

    def __post_init__(self) -> None:
        if self.finished is not None and self.finished < 1:
            raise ValueError(f"pruning.finished: {self.finished} is not positive; give 1 or more, or null")
        if self.steps < 0:
            raise ValueError(f"pruning.steps: {self.steps} is below 0; give 0 or more")


@dataclass(frozen=True)
class Plan:
    """The keys of conf/sweep.yaml that are not a run's."""

    search: dict[str, Any]
    sampler: str
    trials: int
    startup: int
    pruning: Pruning
    workers: int | None
    runs: str
    export: str | None

    def __post_init__(self) -> None:
        for key in ("trials", "startup", "workers"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}: {value} is not positive; give a larger number")
        for key, known in (("sampler", SAMPLERS), ("export", EXPORTS)):
            value = getattr(self, key)
            if value not in known and (value, key) != (None, "export"):
                raise ValueError(f"{key}: {value} is none of {', '.join(known)}")


@dataclass(frozen=True)
class Sweep:
    """What a command asks for. typed: the overrides of all runs, without those of the space; config: what a
    run is at the first point of the grid."""

    plan: Plan
    parameters: list[Parameter]
    name: str
    directory: str
    typed: tuple[str, ...]
    config: RunConfig


class Search:
    """The trials of a sweep, which optuna keeps in a file of the directory, and what is to be tried next.

    Only the process that holds the directory's lock may make one: what it finds begun, a dead one began.

    Raises:
        ValueError: the directory is that of another search.
    """

    def __init__(self, sweep: Sweep) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        plan, pruning = sweep.plan, sweep.plan.pruning
        self.sweep, self.parameters = sweep, sweep.parameters
        self.guard = threading.RLock()  # runs are watched, and optuna asked about them, from threads
        self.running: dict[Path, Task] = {}
        pruner: BasePruner = NopPruner()
        if pruning.finished and plan.sampler == "tpe":
            pruner = MedianPruner(pruning.finished, pruning.steps)
        kept = storage(Path(sweep.directory) / FILE)
        self.study = optuna.create_study(storage=kept, study_name="sweep", pruner=pruner, load_if_exists=True)
        self._check()
        points = settings(self.parameters) if plan.sampler == "grid" else []
        for point in points:
            fixed = {one.key: one.kept(point[one.key]) for one in self.parameters}
            self.study.enqueue_trial(fixed, skip_if_exists=True)
        self.total = len(points) or plan.trials
        self.over = len(self.trials(*OVER))
        self.begun = self.trials(TrialState.RUNNING)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Those in these states, by number."""
        return self.study.get_trials(deepcopy=False, states=states)

    def following(self) -> tuple[Trial, set[int], Setting]:
        """The next trial, the steps at which its loss is known, and its point: first those that had begun."""
        frozen = self.begun.pop(0) if self.begun else None
        number = frozen.number if frozen else len(self.study.get_trials(deepcopy=False))
        # A sampler that was seeded once would begin again with the same points when the search goes on.
        seed, startup = self.sweep.config.seed + number, self.sweep.plan.startup
        self.study.sampler = TPESampler(seed=seed, n_startup_trials=startup)
        trial = Trial(self.study, frozen._trial_id) if frozen else self.study.ask()
        known = set(frozen.intermediate_values) if frozen else set()
        return trial, known, {one.key: one.suggest(trial) for one in self.parameters}

    def results(self) -> dict[str, Any]:
        """What results.json holds."""
        plan = dataclasses.asdict(self.sweep.plan)
        enough = len(self.trials(TrialState.COMPLETE)) >= ENOUGH and len(self.parameters) > 1
        return {
            "search": plan.pop("search"),
            "settings": {key: value for key, value in plan.items() if key != "export"},
            "run": list(self.sweep.typed),
            "trials": [told(one) for one in self.trials(*OVER, TrialState.RUNNING)],
            "importances": optuna.importance.get_param_importances(self.study) if enough else None,
        }

    def _check(self) -> None:
        """Refuse to go on with the trials of another search."""
        sweep, config = self.sweep, self.sweep.config
        data, tokenizer = OmegaConf.create(config.data), OmegaConf.create(config.tokenizer)
        own = {
            "search": sweep.plan.search,
            "sampler": sweep.plan.sampler,
            "the runs' overrides": list(sweep.typed),
            "data": prepare(data, tokenizer).name,  # which tells its content
        }
        known = self.study.user_attrs.get("made of", own)
        for key, now in json.loads(json.dumps(own)).items():
            was = known[key]
            if now != was:
                if isinstance(now, list):  # what both have says nothing
                    now, was = [one for one in now if one not in was], [one for one in was if one not in now]
                raise ValueError(
                    f"{key}: {now} is not what {sweep.directory} was started with, {was}; undo the change, or"
                    " choose another name=…"
                )
        self.study.set_user_attr("made of", own)


class Task:
    """A trial, which is chosen when the pool has room for its run."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.job: Job | None = None
        self.refused: str | None = None  # why there can be no run
        self.twin: Task | None = None  # under way, at the same point
        self.trials: list[Trial] = []  # this one, and its twins
        self.pruned: int | None = None  # the step at which it was
        self.over = False

    @property
    def name(self) -> str:
        point = ", ".join(overrides(self.search.parameters, self.setting))
        return f"trial {self.trials[0].number} ({point})"

    def start(self, slot: int) -> Process:
        """Its run's process; where no run is to be made, one that does nothing."""
        sweep, nothing = self.search.sweep, [sys.executable, "-c", ""]
        with self.search.guard:
            trial, self.known, self.setting = self.search.following()
            self.trials.append(trial)
            trial.set_user_attr("setting", self.setting)
            own = overrides(self.search.parameters, self.setting)
            planned = Planned(f"{sweep.name}-{trial.number}", (*sweep.typed, *own))
            try:
                (self.job,) = jobs_of([planned], Path(sweep.plan.runs))
            except (ValueError, HydraException, OmegaConfBaseException) as error:
                self.refused = one_line(error)
                return subprocess.Popen(nothing)
            trial.set_user_attr("directory", str(self.job.directory))
            if self.job.directory in self.search.running:
                self.twin = self.search.running[self.job.directory]
                self.twin.trials.append(trial)
                return subprocess.Popen(nothing)
            self.search.running[self.job.directory] = self
            if self.known and evaluations(self.job.directory):  # the one before may have ended before this
                self._judge(max(self.known))
            if self.job.trained() or self._is_worse():
                return subprocess.Popen(nothing)
        process = self.job.start(slot)
        threading.Thread(target=self._watch, args=(process,), daemon=True).start()
        return process

    def _watch(self, process: Process) -> None:
        while process.poll() is None:
            if self._is_worse():
                process.send_signal(signal.SIGTERM)
                return
            time.sleep(POLL)

    def _is_worse(self) -> bool:
        """Whether the run is to be pruned. Tells optuna of its evaluations, up to one after which it is."""
        with self.search.guard:
            for step in self._news() if self.pruned is None else ():
                self._judge(step)
                if self.pruned is not None:
                    break
            return self.pruned is not None

    def _judge(self, step: int) -> None:
        """Ask optuna about an evaluation that it knows; the last one of a run comes too late."""
        assert self.job
        if step < _steps(self.job.directory) and self.trials[0].should_prune():
            self.pruned = step

    def _news(self) -> Iterator[int]:
        """The steps of evaluations that optuna has not known, each when it has been told."""
        assert self.job
        for record in [] if self.over else evaluations(self.job.directory):
            step, loss = record["step"], record["loss"]
            if step not in self.known:
                self.known.add(step)
                self.trials[0].report(math.inf if loss is None else loss, step)
                yield step

    def told(self, code: int) -> str:
        """How the trial ended, in a line, which optuna is told, too. code: the process's."""
        with self.search.guard:
            if self.twin:
                return f"the same as trial {self.twin.trials[0].number}, which is under way"
            if self.refused is not None:
                return self._end("refused", self.refused)
            assert self.job
            del self.search.running[self.job.directory]
            for _ in self._news():  # which count for the others' median
                pass
            self.over = True
            trained = self.job.trained()
            if trained and trained.diverged:
                return self._end("diverged", trained.diverged)
            if trained:
                return self._end("finished", f"validation loss {trained.loss:.4f}", trained.loss)
            if self.pruned is not None:
                return self._end("pruned", f"above the median at step {self.pruned}")
            return self.job.told(code)

    def _end(self, state: str, said: str, loss: float | None = None) -> str:
        """What has not finished is pruned for optuna, whose sampler passes over what has failed."""
        became = TrialState.PRUNED if loss is None else TrialState.COMPLETE
        for trial in self.trials:
            trial.set_user_attr("state", state)
            trial.set_user_attr("said", said)
            self.search.study.tell(trial, loss, became)
        return said if loss is not None else f"{state}: {said}"


def _steps(directory: Path) -> int:
    """Of a run that has begun, in all."""
    return json.loads(RunDir(directory).environment.read_text())["total_steps"]


def storage(path: Path) -> JournalStorage:
    """optuna's, in a file, to which a process that was killed may have left half a line, and its lock."""
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))
