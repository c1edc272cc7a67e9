"""Runs that are broken off at random moments, held against the run that nobody broke.

`python -m tests.chaos [--kills 100] [--terms 20] [--seed 0]`: two-rank runs of the real command are killed
with SIGKILL (one rank, the launcher, or all at once), others told to stop by a signal. After each the same
command goes on; a finished run's checkpoint and metrics must be bit for bit those of the unbroken run.
Ends only what it started: the processes that carry the mark of one of its starts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file

from tests.tiny import ROOT, corpus, overrides
from train.records import read_metrics

STEPS, SAVE_EVERY, EVALUATE_EVERY = 100, 5, 20
ZERO_STAGES = (2, 1, 3, 0)  # in turns
PHASES = ("start-up", "training", "saving", "evaluation")
GRACE, MARGIN = 10.0, 5.0  # seconds: stop.grace, and what the command may take beyond it
STALL = 120.0  # seconds without an end after which a start counts as hanging
POLL = 0.001  # seconds between two looks at a run
REQUEUE, BROKEN_OFF = 75, 130  # exit codes: saved, go on with the same command; SIGINT before training
USUAL = ("start", "resume", "interrupt", "finish")  # events that a run is spared or told only by its breaks
MARK = "ISOFLOP_CHAOS"  # environment variable that every process of a start inherits

# Of the blows, the share aimed at each phase, and the least that must fall there.
SHARES = {
    "kill": {"start-up": 0.15, "training": 0.25, "saving": 0.4, "evaluation": 0.2},
    "stop": dict.fromkeys(PHASES, 0.25),
}
LEAST = {"kill": {"saving": 0.3}, "stop": dict.fromkeys(PHASES, 0.15)}


class Run:
    """A run of STEPS steps in folder/name, on the corpus in folder/text."""

    def __init__(self, folder: Path, name: str, zero_stage: int) -> None:
        self.folder, self.name, self.zero_stage, self.starts = folder, name, zero_stage, 0
        self.directory = folder / name
        self.checkpoints = self.directory / "checkpoints"
        self.command = [
            *(sys.executable, "-m", "train", *overrides(folder)),
            *(f"name={name}", f"directory={self.directory}", f"data.directory={self.directory}-prepared"),
            *("data.validation.share=0.4", "model.dropout=0.1", "engine.ranks=2"),
            *(f"engine.zero_stage={zero_stage}", f"stop.grace={GRACE}", f"horizon.steps={STEPS}"),
            *(f"checkpoint.every={SAVE_EVERY}", f"evaluation.every={EVALUATE_EVERY}"),
        ]

    def start(self) -> Start:
        self.starts += 1
        return Start(self, self.folder / f"{self.name}-{self.starts}.txt")

    def records(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in read_metrics(self.directory / "metrics.jsonl") if record["kind"] == kind]

    def newest(self) -> int:
        """Step of the newest checkpoint, 0 where there is none."""
        return max((int(path.name[5:]) for path in self.checkpoints.glob("step-*")), default=0)

    def damaged(self) -> list[str]:
        """Files that are not as their checkpoint's manifest says, in any that has its name."""
        paths = sorted(self.checkpoints.glob("step-*"))
        return [f"{path.name}/{name} is damaged" for path in paths for name in _damaged(path)]

    def remove(self) -> None:
        shutil.rmtree(self.directory)
        shutil.rmtree(f"{self.directory}-prepared")
        for number in range(self.starts):
            (self.folder / f"{self.name}-{number + 1}.txt").unlink()


class Start:
    """One start of a run's command, followed through metrics.jsonl and the checkpoint being written.

    saved: the step of the newest checkpoint that it found. first: the step that it went on from, None as long
    as it has not begun to train. events: those that it wrote.
    """

    def __init__(self, run: Run, output: Path) -> None:
        self.run, self.output, self.saved = run, output, run.newest()
        self.mark, self.ports, self.family = uuid.uuid4().hex, set[str](), list[psutil.Process]()
        self.first: int | None = None
        self.events: set[str] = set()
        self._step = self._evaluated = 0
        self._metrics = run.directory / "metrics.jsonl"
        self._before = set(self._metrics.read_bytes().splitlines()) if self._metrics.exists() else set()
        self.launched = time.time()
        environment = {**os.environ, MARK: self.mark, "OMP_NUM_THREADS": "1"}
        with open(output, "w") as file:
            streams: dict[str, Any] = {"stdout": file, "stderr": file}
            self.launcher = subprocess.Popen(run.command, cwd=ROOT, env=environment, **streams)

    @property
    def over(self) -> bool:
        """Whether there is nothing left to break."""
        return self.launcher.poll() is not None or "finish" in self.events

    def look(self) -> dict[str, Any]:
        """The phases that the run is in now, each with what tells this occurrence from the next."""
        self._follow()
        if self.first is None:
            return {"start-up": 0}
        now: dict[str, Any] = {}
        if saving := self._being_written():
            now["saving"] = saving
        if self._step != self._evaluated and self._step % EVALUATE_EVERY == 0:
            now["evaluation"] = self._step
        return now or {"training": 0}

    def find(self) -> list[psutil.Process]:
        """Note in `family` all that live of this start, of whatever session and parent."""
        self.family = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                if environment.get(MARK) == self.mark:
                    self.family.append(process)
                    self.ports |= {environment["MASTER_PORT"]} if "RANK" in environment else set()
        return self.family

    def ranks(self) -> list[psutil.Process]:
        """The ranks of `family`, without processes of their own."""
        found = []
        for process in self.family:
            with suppress(psutil.Error):
                if "RANK" in process.environ():
                    found.append(process)
        return [process for process in found if process.ppid() not in {other.pid for other in found}]

    def end(self, seconds: float) -> list[str]:
        """Wait for the end of the launcher and of all that it started; what went wrong with that.

        What does not end by itself is killed, and what lies about is removed.
        """
        wrong, deadline = [], time.time() + seconds
        try:
            self.launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            wrong.append(f"did not end within {seconds:.0f} s")
        while self.find() and time.time() < deadline:
            time.sleep(0.02)
        for process in self.find():
            with suppress(psutil.Error):
                wrong.append(f"left a process: {' '.join(process.cmdline())}")
                process.kill()
        self.launcher.wait()
        for path in [path for port in self.ports for path in Path("/dev/shm").glob(f"*_{port}_*")]:
            wrong.append(f"left {path.stat().st_size:,} bytes of memory: {path}")
            path.unlink()
        self._follow()
        if self.first not in (None, self.saved):
            wrong.append(f"went on from step {self.first}, saved was {self.saved}")
        return wrong

    def _follow(self) -> None:
        """Take in the whole lines that this start added to metrics.jsonl, whose end it may first cut off."""
        with suppress(FileNotFoundError):
            *lines, _ = self._metrics.read_bytes().split(b"\n")
            for line in lines:
                if line not in self._before:
                    self._before.add(line)
                    self._take(json.loads(line))

    def _take(self, record: dict[str, Any]) -> None:
        if record["kind"] == "train":
            self._step = record["step"]
        elif record["kind"] == "eval":
            self._evaluated = record["step"]
        elif record["kind"] == "event":
            self.events.add(record["event"])
            if record["event"] in ("start", "resume"):
                self.first = self._step = self._evaluated = record["step"]

    def _being_written(self) -> str | None:
        """The folder of a checkpoint that is being written, not one that an earlier start left behind."""
        for path in self.run.checkpoints.glob(".step-*"):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime >= self.launched:
                    return path.name
        return None


@dataclass(frozen=True)
class Reference:
    """An unbroken run, and the seconds of its start-up, of all its steps, of one save and one evaluation."""

    run: Run
    seconds: dict[str, float]


def reference(folder: Path, zero_stage: int) -> Reference:
    """Train without a break. Raises RuntimeError where that fails."""
    if not (folder / "text").exists():
        corpus(folder / "text", documents=250)
    run = Run(folder, f"reference{zero_stage}", zero_stage)
    start, seconds, last = run.start(), dict.fromkeys(PHASES, 0.0), time.time()
    while not start.over:
        time.sleep(POLL)
        now = time.time()
        for phase in start.look():
            seconds[phase] += now - last
        last = now
    wrong = start.end(STALL)
    if wrong or start.launcher.returncode or "finish" not in start.events:
        raise RuntimeError(f"the unbroken run failed: {wrong}\n{start.output.read_text()}")
    times = {"saving": STEPS // SAVE_EVERY, "evaluation": STEPS // EVALUATE_EVERY}
    return Reference(run, {phase: seconds[phase] / times.get(phase, 1) for phase in PHASES})


def moment(start: Start, phase: str, seconds: dict[str, float], dice: random.Random) -> str | None:
    """Wait for a random moment of a phase; the phase that the run is in then, None if it is over or hangs."""
    deadline = time.time() + STALL
    seen: dict[str, Any] = {}

    def until(come: Callable[[], bool]) -> None:
        nonlocal seen
        seen = start.look()
        while not come() and not start.over and time.time() < deadline:
            time.sleep(POLL)
            seen = start.look()

    def pause(longest: float) -> None:
        over = time.time() + dice.uniform(0, longest)
        until(lambda: time.time() > over)

    if phase == "start-up":
        pause(seconds[phase])
        start.find()
    else:
        until(lambda: "start-up" not in seen)
        start.find()  # takes longer than a save may
        pause(seconds["training"] / 4)
        if phase != "training":
            last = seen.get(phase)
            until(lambda: seen.get(phase, last) != last)
            pause(1.1 * seconds[phase])
    if start.over or time.time() > deadline:
        return None
    return phase if phase in seen else next(iter(seen))


def kill(start: Start, phase: str, dice: random.Random) -> tuple[str, list[str]]:
    """SIGKILL to one rank, the launcher, or all at once; to whom, and what was wrong with the end."""
    launcher, ranks = psutil.Process(start.launcher.pid), start.ranks()
    victims = {"launcher": [launcher], "all": [*start.family, launcher]}
    if ranks:
        victims["one rank"] = [dice.choice(ranks)]
    whom = dice.choice(list(victims))
    for process in victims[whom]:
        with suppress(psutil.Error):
            process.kill()
    wrong = start.end(GRACE + MARGIN)
    if start.launcher.returncode in (0, REQUEUE) and "finish" not in start.events:
        wrong.append(f"exit code {start.launcher.returncode}")
    return whom, wrong


def stop(start: Start, phase: str, dice: random.Random) -> tuple[str, list[str]]:
    """A signal that asks the launcher to stop; which, and what was wrong with the end."""
    which = dice.choice((signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
    while _deaf(start.launcher.pid) and start.launcher.poll() is None and time.time() < start.launched + 1:
        time.sleep(POLL)  # Python itself is starting, and cannot answer yet
    start.launcher.send_signal(which)
    wrong = start.end(GRACE + MARGIN)
    trained = max((record["step"] for record in start.run.records("train")), default=0)
    if start.run.newest() != trained:
        wrong.append(f"trained to step {trained}, saved step {start.run.newest()}")
    if "Traceback" in start.output.read_text():
        wrong.append("a traceback")
    right = {REQUEUE}
    if "finish" in start.events:
        right = {0, REQUEUE}
    elif which == signal.SIGINT and phase == "start-up":  # it may have begun to train in between
        right = {BROKEN_OFF} if start.first is None else {BROKEN_OFF, REQUEUE}
    if start.launcher.returncode not in right:
        wrong.append(f"exit code {start.launcher.returncode}")
    if start.launcher.returncode == REQUEUE and start.first is not None and "interrupt" not in start.events:
        wrong.append("no interrupt in metrics.jsonl")
    return which.name, wrong


def _deaf(pid: int) -> bool:
    """Whether a process still dies of SIGTERM without a word."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return not int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1


def differences(run: Run, unbroken: Run) -> list[str]:
    """What a finished run has other than the unbroken one: steps, losses, weights, optimizer states."""
    if run.newest() != STEPS:
        return [f"the last checkpoint is that of step {run.newest()}"]
    wrong = run.damaged()
    for kind, every in (("train", 1), ("eval", EVALUATE_EVERY)):
        told, right = run.records(kind), unbroken.records(kind)
        if [record["step"] for record in told] != list(range(every, STEPS + 1, every)):
            wrong.append(f"{kind} records of steps {[record['step'] for record in told]}")
        for key in {"loss", "gradient_norm", "learning_rate"} & right[0].keys():
            pairs = zip(told, right, strict=False)
            other = [ours["step"] for ours, theirs in pairs if ours[key] != theirs[key]]
            wrong += [f"another {key} ({kind}) at steps {other}"] if other else []
    events = [(record["event"], record["step"]) for record in run.records("event")]
    if events.count(("finish", STEPS)) != 1:
        wrong.append("not one event finish")
    known = {(record["event"], record["step"]) for record in unbroken.records("event")}
    events = [(name, step) for name, step in events if name not in USUAL]
    wrong += [f"an event {name} at step {step}" for name, step in events if (name, step) not in known]
    ours, theirs = (one.checkpoints / f"step-{STEPS:08d}" for one in (run, unbroken))
    names, known_names = ({path.name for path in folder.iterdir()} for folder in (ours, theirs))
    wrong += [f"{name} in one of the last checkpoints" for name in sorted(names ^ known_names)]
    for name in sorted((names & known_names) - {"manifest.json"}):
        if not _same(_content(ours / name), _content(theirs / name)):
            wrong.append(f"another content of {name}")
    return wrong


def _damaged(checkpoint: Path) -> list[str]:
    """Names of the files of a checkpoint that are not as its manifest says."""
    manifest = checkpoint / "manifest.json"
    if not manifest.exists():
        return [manifest.name]
    files = json.loads(manifest.read_text())["files"]
    there = {path.name for path in checkpoint.iterdir()} - {manifest.name}
    wrong = {name for name in there & files.keys() if _sha256(checkpoint / name) != files[name]["sha256"]}
    return sorted(wrong | (there ^ files.keys()))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".json":
        return json.loads(path.read_text())
    return torch.load(path, weights_only=False)


def _same(one: Any, other: Any) -> bool:
    """Whether what two files hold is equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        bits = [tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
        return alike and torch.equal(*bits)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if hasattr(one, "__dict__") and not isinstance(one, type):
        return type(one) is type(other) and _same(vars(one), vars(other))
    return one == other


@dataclass
class Tally:
    """What was broken off, by phase and by deed.

    slowest: seconds from a blow until no process was left. survived: blows to runs with which nothing was
    wrong. wrong: what was, with the others.
    """

    phases: Counter[str] = field(default_factory=Counter)
    deeds: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    survived: int = 0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        phases, deeds = (", ".join(f"{key} {n}" for key, n in c.items()) for c in (self.phases, self.deeds))
        return f"{self.survived} of {self.phases.total()} ({phases}; {deeds}; slowest {self.slowest:.1f} s)"


def batter(
    folder: Path,
    blow: Callable[[Start, str, random.Random], tuple[str, list[str]]],
    references: list[Reference],
    count: int,
    seed: int,
    say: Callable[[str], None] = print,
) -> Tally:
    """Break off starts of runs in folder, `count` in all, or more until enough fell into every phase.

    blow: `kill` or `stop`. references: what the runs are to equal, in turns.
    """
    tally, dice, shares = Tally(), random.Random(seed), SHARES[blow.__name__]
    least = {phase: math.ceil(share * count) for phase, share in LEAST[blow.__name__].items()}
    for turn in range(count):
        done, whole = tally.phases.total(), references[turn % len(references)]
        if done >= count and all(tally.phases[phase] >= n for phase, n in least.items()):
            break
        run, wrong = Run(folder, f"{blow.__name__}-{turn}", whole.run.zero_stage), []
        for _ in range(min(dice.randint(6, 9), max(1, count - done))):
            aim = min(shares, key=lambda phase: (tally.phases[phase] + dice.random()) / shares[phase])
            start = run.start()
            phase = moment(start, aim, whole.seconds, dice)
            if phase is None:
                break
            struck = time.time()
            deed, found = blow(start, phase, dice)
            seconds = time.time() - struck
            found += run.damaged()
            tally.phases[phase] += 1
            tally.deeds[deed] += 1
            tally.slowest = max(tally.slowest, seconds)
            say(
                f"{tally.phases.total():3}  {run.name:7}  ZeRO-{run.zero_stage}  {phase:10}  {deed:8}"
                f"  over in {seconds:4.1f} s, step {run.newest()} saved  {'; '.join(found)}"
            )
            wrong += [f"{start.output}, {phase}, {deed}: {line}" for line in found]
        else:
            start = run.start()
        found = start.end(STALL)
        if start.launcher.returncode:
            found.append(f"exit code {start.launcher.returncode}")
        found += differences(run, whole.run)
        say(f"     {run.name:7}  {'; '.join(found) or 'equals the unbroken run'}")
        wrong += [f"{start.output}: {line}" for line in found]
        tally.wrong += wrong
        if not wrong:
            tally.survived += tally.phases.total() - done
            run.remove()
    short = [f"{phase} {tally.phases[phase]}" for phase, n in least.items() if tally.phases[phase] < n]
    tally.wrong += [f"too few blows: {line}" for line in short]
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs (default: %(default)s)")
    parser.add_argument("--terms", type=int, default=20, help="requests to stop (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="isoflop-chaos-"))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("unbroken runs", total=given.kills + given.terms)

        def say(line: str) -> None:
            progress.console.print(line, soft_wrap=True, markup=False, highlight=False)
            progress.update(bar, advance=not line.startswith("     "))

        references = [reference(folder, stage) for stage in ZERO_STAGES]
        progress.update(bar, description="kills")
        kills = batter(folder, kill, references, given.kills, given.seed, say)
        progress.update(bar, description="stops")
        stops = batter(folder, stop, references, given.terms, given.seed, say)
    for line in (wrong := kills.wrong + stops.wrong):
        print(f"wrong: {line}")
    print(f"killed, went on, and equal in the end: {kills}")
    print(f"stopped, saved and clean, and equal in the end: {stops}")
    if wrong:
        sys.exit(f"seed {given.seed}; what is left of these runs is in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
