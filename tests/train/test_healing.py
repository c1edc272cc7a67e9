"""Runs that heal: batches that spoil the training, ranks that are killed or hang, a wall-clock limit."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from data.collate.causal import Causal as CausalCollate
from data.packing import Sample
from tests.distributed import run_ranks
from tests.tiny import ROOT, begun, overrides, write_checkpoint
from tests.train.test_run import hurry, tensors
from train.checkpoint import WEIGHTS, path_of, read_state, remove_after, steps
from train.objective.causal import Causal
from train.records import read_metrics
from train.rollback import way_back
from train.rundir import RunDir

# What is wrong with the data: the loss of the last rank's part of some batches is multiplied.


class Poisoned(Causal):
    """Next-token prediction in which some batches are bad.

    factors: what the loss is multiplied by, by the batch's position in the order of the data.
    """

    def __init__(self, factors: dict[int, str]) -> None:
        self.factors = {int(position): float(factor) for position, factor in factors.items()}

    def collator(self, prepared: Path, sequence_length: int, isolate: bool) -> Any:
        return PoisonedCollate(super().collator(prepared, sequence_length, isolate), self.factors)

    def loss(self, model: Callable[..., Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return super().loss(model, batch) * batch["factor"][0]


class PoisonedCollate:
    """Batches of the last rank, with the factor of their position."""

    def __init__(self, collate: CausalCollate, factors: dict[int, float]) -> None:
        self.collate, self.factors = collate, factors
        self.window, self.overhead = collate.window, collate.overhead

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        batch = self.collate(samples)
        last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
        position = samples[0].step if last else None
        factor = 1.0 if position is None else self.factors.get(position, 1.0)
        return batch | {"factor": torch.full((len(samples),), factor)}


def poisoned(**factors: str) -> list[str]:
    """The overrides of a run with such batches: p5="nan" is position 5."""
    inner = ",".join(f"{position[1:]}:'{factor}'" for position, factor in factors.items())
    return ["objective._target_=tests.train.test_healing.Poisoned", f"+objective.factors={{{inner}}}"]


SMALL = [
    *("model.layers=1", "model.width=32", "model.heads=2", "evaluation.every=null", "engine.threads=1"),
    *("horizon.steps=18", "checkpoint.every=4", "checkpoint.keep=9"),
    *("divergence.window=8", "divergence.pass_over=2"),
]
SKIP_THEN_ROLLBACK = ["divergence.nonfinite=skip", "divergence.spike=rollback"]
STAGES = range(4)


@dataclass(frozen=True)
class Case:
    """A run. leave_out: a step whose update is not made, whatever its loss is. passed_over: batches that it
    is to know as bad before it starts."""

    more: list[str]
    leave_out: int | None = None
    passed_over: list[int] = field(default_factory=list)


BAD = poisoned(p5="nan", p14="1000")
LIMITED = [*poisoned(**{f"p{p}": "nan" for p in range(6, 18)}), "divergence.pass_over=1"]
CASES = {
    # The batch at 5 is skipped; from the one at 14 the run goes back to step 12, and passes over 13 and 14.
    **{
        name: case
        for stage in STAGES
        for name, case in (
            (f"healed-{stage}", Case([f"engine=zero{stage}", *BAD, *SKIP_THEN_ROLLBACK])),
            (f"clean-{stage}", Case([f"engine=zero{stage}"], 5, [13, 14])),
        )
    },
    # From the batch at 6 the run goes back to step 4, and passes over 5 and 6; the one at 16 is skipped.
    "other": Case(
        [*poisoned(p6="inf", p16="1000"), "divergence.nonfinite=rollback", "divergence.spike=skip"]
    ),
    "other-clean": Case([], 14, [5, 6]),
    "reported": Case([*poisoned(p14="1000"), "divergence.spike=report"]),
    "stopped": Case([*BAD, "divergence.nonfinite=stop"]),
    "stopped-by-spike": Case([*poisoned(p14="1000"), "divergence.spike=stop"]),
    "no-checkpoint": Case([*poisoned(p3="nan"), "divergence.nonfinite=rollback", "checkpoint.every=null"]),
    "skips": Case([*LIMITED, "divergence.nonfinite=skip", "divergence.limit=2"]),
    "rollbacks": Case([*LIMITED, "divergence.nonfinite=rollback", "divergence.limit=2"]),
}
STEPS = 60  # of the run that is to survive


def lasting(folder: Path, name: str, *more: str) -> list[str]:
    """Arguments of a two-rank run of real processes."""
    own = [f"name={name}", f"directory={folder}/runs/{name}", "engine.ranks=2", f"horizon.steps={STEPS}"]
    return [*overrides(folder), *SMALL, *own, *more]


def all_but(left_out: int, step: int, loss: float, gradient_norm: float) -> bool:
    return step != left_out


def outcomes(directories: dict[Path, int | None]) -> dict[Path, str]:
    """One rank of several runs: how each ended. Of each, the step whose update is left out.

    Those of ZeRO-3 come last: in its process DeepSpeed computes products in another way from then on.
    """
    from train.config import load
    from train.engine import start_world
    from train.run import Halted, Run
    from train.rundir import RunDir
    from train.stop import current

    hurry()
    ends, world = {}, start_world()
    for directory in sorted(directories, key=lambda directory: directory.name.endswith("-3")):
        rundir, leave_out = RunDir(directory), directories[directory]
        run = Run(rundir, load(rundir.config), world)
        if leave_out is not None:
            run._accepts = partial(all_but, leave_out)  # type: ignore[method-assign]
        with current() as stop:
            try:
                assert run.train(stop) is None
                ends[directory] = "finished"
            except Halted as error:
                ends[directory] = str(error)
        run.close(failed=False)
    return ends


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("healing")


@pytest.fixture(scope="module")
def ends(folder: Path) -> dict[str, str]:
    """How the runs ended, by their names; among them those that were then broken off and begun again."""
    given = {begun(folder, name, 2, *SMALL, *case.more): case for name, case in CASES.items()}
    for directory, case in given.items():
        if case.passed_over:
            content = {"positions": case.passed_over, "rollbacks": []}
            (directory / "passed_over.json").write_text(json.dumps(content))
    lasts = begun(folder, "lasts", 2, *SMALL, f"horizon.steps={STEPS}")
    first = {directory: case.leave_out for directory, case in given.items()} | {lasts: None}
    told = run_ranks(outcomes, 2, first)
    assert told[0] == told[1]

    healed = folder / "runs" / "healed-2"
    killed_later, killed_within = (healed.with_name(name) for name in ("killed-later", "killed-within"))
    for copy, step in ((killed_later, 8), (killed_within, 12)):
        shutil.copytree(healed, copy)
        remove_after(copy / "checkpoints", step)
    (killed_within / "passed_over.json").unlink()
    lines = (killed_within / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed_within / "metrics.jsonl").write_text("".join(line for line in lines if "spike" not in line))
    persuaded = begun(folder, "stopped", 2, *SMALL, *CASES["stopped"].more, *SKIP_THEN_ROLLBACK)
    resumed = run_ranks(outcomes, 2, dict.fromkeys((killed_later, killed_within, persuaded)))[0]
    ends = {directory.name: end for directory, end in told[0].items()}
    return ends | {f"{directory.name}, resumed": end for directory, end in resumed.items()}


def last_of(folder: Path, name: str) -> Path:
    directory = folder / "runs" / name / "checkpoints"
    return path_of(directory, steps(directory)[-1])


def same(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same parameters and optimizer states."""
    first, second = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert first.keys() == second.keys()
    if any(not torch.equal(first[name], second[name]) for name in first):
        return False
    files = sorted(path.name for path in one.glob("*.pt"))
    assert files == sorted(path.name for path in other.glob("*.pt"))
    for file in files:
        expected, got = tensors(one / file), tensors(other / file)
        assert expected.keys() == got.keys()
        if any(not torch.equal(expected[place], got[place]) for place in expected):
            return False
    return True


def records(folder: Path, name: str, kind: str) -> list[dict[str, Any]]:
    return [r for r in read_metrics(folder / "runs" / name / "metrics.jsonl") if r["kind"] == kind]


def events(folder: Path, name: str) -> list[tuple[int, str, str | None]]:
    return [(r["step"], r["event"], r.get("action")) for r in records(folder, name, "event")]


PAIRS = [*((f"healed-{stage}", f"clean-{stage}") for stage in STAGES), ("other", "other-clean")]


@pytest.mark.parametrize(("name", "clean"), PAIRS)
def test_a_healed_run_is_bit_for_bit_one_that_never_saw_the_bad_batches(
    folder: Path, ends: dict[str, str], name: str, clean: str
) -> None:
    """One whose update at the skipped step is left out, and whose order passes over the others."""
    assert ends[name] == ends[clean] == "finished"
    healed = last_of(folder, name)
    assert healed.name == "step-00000018"
    assert same(healed, last_of(folder, clean))
    assert not same(healed, path_of(healed.parent, 16))
    left_out = CASES[clean].passed_over
    assert read_state(healed)["passed_over"] == left_out
    assert json.loads((folder / "runs" / name / "passed_over.json").read_text())["positions"] == left_out


@pytest.mark.parametrize(("name", "clean"), PAIRS)
@pytest.mark.usefixtures("ends")
def test_the_metrics_of_a_healed_run_have_each_step_once(folder: Path, name: str, clean: str) -> None:
    healed, untroubled = (records(folder, which, "train") for which in (name, clean))
    assert [r["step"] for r in healed] == list(range(1, 19))
    skipped = CASES[clean].leave_out
    for one, other in zip(healed, untroubled, strict=True):
        if one["step"] - 1 == skipped:
            assert one["loss"] is None and one["skipped_steps"] == 1
        else:
            assert (one["loss"], one["gradient_norm"]) == (other["loss"], other["gradient_norm"])
            assert one["skipped_steps"] == 0
    losses = [r["loss"] for r in healed if r["loss"] is not None]
    assert max(losses[-2:]) < median(losses)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.usefixtures("ends")
def test_the_events_of_a_healed_run(folder: Path, stage: int) -> None:
    name = f"healed-{stage}"
    assert events(folder, name) == [
        (0, "start", None),
        (6, "nonfinite", "skip"),
        (12, "spike", "rollback"),
        (18, "finish", None),
    ]
    _, nonfinite, spike, _ = records(folder, name, "event")
    assert nonfinite["loss"] is None and nonfinite["score"] is None
    assert nonfinite["message"].startswith("the loss at step 5 is nan") and "skipped" in nonfinite["message"]
    assert spike["to_step"] == 12 and spike["positions"] == [13, 14] and spike["score"] > 10
    assert spike["loss"] > 100 and math.isfinite(spike["gradient_norm"])
    assert spike["message"].endswith("rolled back to step 12, 2 batches passed over")


@pytest.mark.usefixtures("ends")
def test_the_other_way_round(folder: Path) -> None:
    assert events(folder, "other") == [
        (0, "start", None),
        (4, "nonfinite", "rollback"),
        (15, "spike", "skip"),
        (18, "finish", None),
    ]


def test_a_spike_is_reported_and_its_update_made(folder: Path, ends: dict[str, str]) -> None:
    assert ends["reported"] == "finished"
    assert events(folder, "reported")[1:-1] == [(15, "spike", "report")]
    losses = [r["loss"] for r in records(folder, "reported", "train")]
    assert losses[14] > 100 and max(losses[15:]) < median(losses)
    assert records(folder, "reported", "train")[14]["skipped_steps"] == 0
    assert not (folder / "runs" / "reported" / "passed_over.json").exists()


def test_a_run_stops_before_the_update(folder: Path, ends: dict[str, str]) -> None:
    line = "the loss at step 5 is nan, the gradient norm inf; stopped before its update, saved at step 5"
    assert ends["stopped"] == line
    checkpoints = folder / "runs" / "stopped" / "checkpoints"
    assert (5, "nonfinite", "stop") in events(folder, "stopped")
    assert read_state(path_of(checkpoints, 5))["step"] == 5
    spiked = ends["stopped-by-spike"]
    assert "at step 14 is" in spiked and spiked.endswith("; stopped before its update, saved at step 14")
    assert steps(folder / "runs" / "stopped-by-spike" / "checkpoints") == [4, 8, 12, 14]


def test_a_stopped_run_goes_on_under_another_policy(folder: Path, ends: dict[str, str]) -> None:
    assert ends["stopped, resumed"] == "finished"
    assert same(last_of(folder, "stopped"), last_of(folder, "healed-2"))
    assert [event for _, event, _ in events(folder, "stopped")] == [
        *("start", "nonfinite", "resume", "nonfinite", "spike", "finish")
    ]


def test_a_run_stops_where_there_is_nothing_to_go_back_to(folder: Path, ends: dict[str, str]) -> None:
    assert "; there is no checkpoint before it to roll back to; stopped" in ends["no-checkpoint"]
    assert events(folder, "no-checkpoint") == [(0, "start", None), (3, "nonfinite", "stop")]
    assert last_of(folder, "no-checkpoint").name == "step-00000003"


def test_a_run_stops_at_the_limit(folder: Path, ends: dict[str, str]) -> None:
    for name, action in (("skips", "skip"), ("rollbacks", "rollback")):
        assert "number 3 within 8 steps, and divergence.limit is 2; stopped" in ends[name]
        assert [acted for _, event, acted in events(folder, name) if event == "nonfinite"] == [
            *(action, action, "stop")
        ]
    assert events(folder, "skips")[-1][0] == 8
    assert read_state(last_of(folder, "rollbacks"))["passed_over"] == [6, 7]
    assert last_of(folder, "rollbacks").name == "step-00000006"


@pytest.mark.parametrize("name", ["killed-later", "killed-within"])
def test_a_run_that_is_killed_in_or_after_a_rollback(folder: Path, ends: dict[str, str], name: str) -> None:
    """Later, it goes on from an older checkpoint and passes over at once; within the rollback, the newer
    checkpoints are gone, but what to pass over is not written down: it comes there again."""
    assert ends[f"{name}, resumed"] == "finished"
    assert same(last_of(folder, name), last_of(folder, "healed-2"))
    assert read_state(last_of(folder, name))["passed_over"] == [13, 14]
    assert [r["step"] for r in records(folder, name, "train")] == list(range(1, 19))
    rolled_back = [event for event in events(folder, name) if event[1] == "spike"]
    assert rolled_back == ([(12, "spike", "rollback")] if name == "killed-within" else [])


@pytest.mark.parametrize(
    ("damaged", "target", "left_out"),
    [((), 8, [9, 10]), ((8,), 4, [9, 10]), ((8, 4), 10, [10]), ((8, 4, 10), 10, [])],
)
def test_the_way_back_goes_around_damage(
    tmp_path: Path, damaged: tuple[int, ...], target: int, left_out: list[int]
) -> None:
    said: list[str] = []
    rundir = RunDir(tmp_path)
    for step in (4, 8, 10):
        write_checkpoint(rundir.checkpoints, step, {"a": torch.zeros(1)})
    for step in damaged:
        (path_of(rundir.checkpoints, step) / WEIGHTS).unlink()
    found, positions, problem = way_back(rundir, 10, 2, [], [10], said.append)
    assert (found, positions) == (target, left_out) and len(said) == len(damaged)
    if len(damaged) == 3:
        assert problem == "there is no checkpoint before it to roll back to"
        assert steps(rundir.checkpoints) == [4, 8, 10] and rundir.passed_over() == ([], [])
    else:
        assert problem is None and steps(rundir.checkpoints)[-1] == target
        assert rundir.passed_over() == (left_out, [10])


# Processes: the command as a person types it.


def launch(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Python with these arguments, and nothing of ours in its environment; its standard error in a file."""
    launcher = re.compile("RANK|LOCAL_|WORLD_SIZE|MASTER_|HYDRA_|OMP_|TORCHELASTIC")
    environment = {key: value for key, value in os.environ.items() if not launcher.match(key)}
    environment["OMP_NUM_THREADS"] = "1"
    with open(log, "wb") as file:
        streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": file}
        return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, **streams)


def ended(launcher: subprocess.Popen[bytes], log: Path) -> tuple[int, str]:
    """The exit code and standard error of a launcher, once it has ended."""
    return launcher.wait(120), log.read_text()


def wait_for(condition: Callable[[], bool], launcher: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert launcher.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def rank_of(launcher: subprocess.Popen[bytes], rank: int) -> psutil.Process:
    for process in psutil.Process(launcher.pid).children(recursive=True):
        with suppress(psutil.Error):
            if process.environ().get("RANK") == str(rank):
                return process
    raise AssertionError(f"no rank {rank}")


def end_all(launcher: subprocess.Popen[bytes]) -> None:
    """Leave nothing behind of what a test launched."""
    if launcher.poll() is None:
        family = psutil.Process(launcher.pid).children(recursive=True)
        launcher.kill()
        for process in family:
            with suppress(psutil.Error):
                process.kill()
    launcher.wait()


@dataclass
class Hung:
    """A run that would go on for ever, but for its rank 1, which stands still. second: how another start
    of it ended before that."""

    launcher: subprocess.Popen[bytes]
    log: Path
    directory: Path
    second: tuple[int, str]
    rank: psutil.Process
    since: float


@pytest.fixture(scope="module")
def hung(folder: Path, ends: dict[str, str]) -> Iterator[Hung]:
    """Begun before other tests and looked at after them: a while goes by until it surely hangs."""
    log, other = folder / "hung.txt", folder / "second.txt"
    endless = ["horizon.steps=1000000", "engine.hang_timeout=3", "checkpoint.every=null"]
    command = ["-m", "train", *lasting(folder, "hung", *endless)]
    launcher, directory = launch(command, log), folder / "runs" / "hung"
    try:
        metrics = directory / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and '"kind": "train"' in metrics.read_text(), launcher, log)
        second = ended(launch(command, other), other)
        rank = rank_of(launcher, 1)
        rank.send_signal(signal.SIGSTOP)
        yield Hung(launcher, log, directory, second, rank, time.time())
    finally:
        end_all(launcher)


@pytest.mark.usefixtures("hung")
def test_under_torchrun_a_killed_rank_comes_back(folder: Path) -> None:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    log, directory = folder / "killed.txt", folder / "runs" / "killed"
    launcher = launch(["-m", *torchrun, "-m", "train", *lasting(folder, "killed")], log)
    try:
        wait_for(lambda: 12 in steps(directory / "checkpoints"), launcher, log)
        rank_of(launcher, 1).kill()
        code, told = ended(launcher, log)
    finally:
        end_all(launcher)
    assert code == 0, told
    assert same(last_of(folder, "killed"), last_of(folder, "lasts"))
    found = events(folder, "killed")
    assert [event for _, event, _ in found] == ["start", "resume", "finish"]
    assert 12 <= found[1][0] < STEPS
    assert [r["step"] for r in records(folder, "killed", "train")] == list(range(1, STEPS + 1))


@pytest.mark.usefixtures("hung")
def test_a_time_limit_ends_torchrun_too(folder: Path) -> None:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    log, endless = folder / "torchrun-limited.txt", ["horizon.steps=1000000", "stop.time_limit=0.001"]
    launcher = launch(["-m", *torchrun, "-m", "train", *lasting(folder, "torchrun-limited", *endless)], log)
    try:
        code, told = ended(launcher, log)
    finally:
        end_all(launcher)
    assert code == 1, told
    found = [event for _, event, _ in events(folder, "torchrun-limited")]
    assert found == ["start", "interrupt"]


@pytest.mark.usefixtures("hung")
def test_a_time_limit_then_a_stop_by_policy(folder: Path) -> None:
    """On one rank: the same command goes on after the first, and not after the second."""
    own = [f"directory={folder}/runs/limited", *poisoned(p3="nan"), "divergence.nonfinite=stop"]
    log = folder / "limited.txt"
    command = ["-m", "train", *overrides(folder), *SMALL, *own]
    assert ended(launch([*command, "stop.time_limit=0.001"], log), log) == (75, "")
    assert last_of(folder, "limited").name == "step-00000001"
    (interrupt,) = [r for r in records(folder, "limited", "event") if r["event"] == "interrupt"]
    assert interrupt["reason"] == "time limit"
    line = (
        "error: the loss at step 3 is nan, the gradient norm inf; stopped before its update, saved at step 3"
    )
    assert ended(launch(command, log), log) == (1, f"{line}\n")
    assert [step for step, event, _ in events(folder, "limited") if event == "resume"] == [1]
    assert last_of(folder, "limited").name == "step-00000003"


def test_a_second_run_in_the_same_directory_is_refused(hung: Hung) -> None:
    code, told = hung.second
    assert code == 1 and told.count("\n") == 1
    assert told.startswith(f"error: directory: another process trains in {hung.directory}; wait for it (pid ")


def test_a_rank_that_hangs_is_named(hung: Hung) -> None:
    code, told = ended(hung.launcher, hung.log)
    assert code == 1, told
    assert (hung.directory / "hang.txt").stat().st_mtime - hung.since < 60
    assert "no progress for 3 s: rank 1 hangs" in told
    assert "rank 1 hangs" in (hung.directory / "hang.txt").read_text()
    assert not hung.rank.is_running()
