"""A study of scaling: its plan, and its runs, killed, failing and on Slurm."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from data.cli import one_line
from data.shards import read_manifest
from launch.launchers import JOB, Slurm, queued
from launch.memory import Planned
from launch.overrides import composing, refuse
from launch.scaling import study
from launch.scaling.plan import repeated, show
from launch.scaling.shapes import scientific, short
from launch.scaling.study import OWN, Plan, plan_of
from launch.scaling.table import read
from launch.scaling.training import CURVES, POINTS, train
from launch.study import jobs_of
from tests.tiny import ROOT, corpus
from train.config import load
from train.lock import Lock
from train.records import read_metrics

SMALL, LARGE = {"width": 16, "heads": 1}, {"width": 32, "heads": 2}
BUDGETS = [1.2e9, 2.4e9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scaling")
    corpus(path / "text", documents=12)
    return path


def arguments(folder: Path, *more: str, trials: str = "trials") -> list[str]:
    """Of a study of four runs of 20 to 120 steps."""
    return [
        *("data=text", f"data.source.paths={folder}/text/*.txt", f"data.directory={folder}/prepared"),
        *("data.validation.share=0.2", "tokenizer=bytes", "~tokenizer.vocabulary_size", "probe=false"),
        *("nearest=null", "nearest_at_largest=null", "shapes=[{width:16,heads:1},{width:32,heads:2}]"),
        *(f"budgets={BUDGETS}", "model.layers=1", "parametrization.base={width:32,heads:2}"),
        *("sequence_length=32", "global_batch=4", "checkpoint.every=5", "log.every=4", "peak=1e9"),
        *(f"trials={folder}/{trials}", *more),
    ]


def plan(folder: Path, *more: str, trials: str = "trials") -> Plan:
    with composing():
        node = compose("scaling", overrides=arguments(folder, *more, trials=trials))
    return plan_of(node)


def listening() -> Console:
    return Console(file=io.StringIO(), highlight=False, width=200)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def counted(vocabulary: int, width: int) -> tuple[int, int]:
    """Parameters, and training FLOP of a token, of the tests' GPT of one layer, from its products."""
    inside = 4 * width * width + 2 * 4 * width * width  # attention, feed-forward
    parameters = inside + vocabulary * width + 3 * width  # token table, which is the head, and three norms
    return parameters, 6 * (inside + vocabulary * width) + 12 * 32 * width


def test_the_plan_is_exact(folder: Path) -> None:
    planned = plan(folder)
    vocabulary = read_manifest(planned.prepared)["vocabulary_size"]
    assert [run.budget for run in planned.runs] == [BUDGETS[0]] * 2 + [BUDGETS[1]] * 2
    assert [run.shape.settings for run in planned.runs] == [SMALL, LARGE] * 2
    for run in planned.runs:
        width = run.shape.settings["width"]
        parameters, flops = counted(vocabulary, width)
        assert run.parameters == run.shape.columns["all_parameters"] == parameters
        assert run.flops == run.tokens * flops and run.tokens == run.steps * 4 * 32
        assert abs(run.flops - run.budget) <= flops * 4 * 32 / 2  # no other number of steps comes nearer
        assert run.config.horizon.steps == run.planned.config().horizon.steps == run.steps
        assert run.shape.columns["attention_flops_per_token"] == 12 * 32 * width
        assert run.shape.columns["head_parameters"] == vocabulary * width
        assert run.shape.columns["body_parameters"] == parameters - vocabulary * width
        assert run.shape.columns["parameters_without_embeddings"] == parameters - vocabulary * width
    assert len({run.name for run in planned.runs}) == 4


def test_an_untied_head_is_no_part_of_the_body(folder: Path) -> None:
    columns = plan(folder, "model.tied=false").runs[0].shape.columns
    assert columns["all_parameters"] == columns["body_parameters"] + 2 * columns["head_parameters"]
    assert columns["parameters_without_embeddings"] == columns["body_parameters"] + columns["head_parameters"]
    assert columns["attention_flops_per_token"] == 12 * 32 * 16


def test_the_plan_is_shown_before_anything_is_trained(folder: Path) -> None:
    planned, console = plan(folder, "utilization=0.5", trials="none"), listening()
    show(planned, console)
    out = said(console)
    for run in planned.runs:
        (line,) = [line for line in out.splitlines() if line.startswith(run.name)]
        assert f" {run.steps} " in line and f" {short(run.tokens)} " in line and f" {run.flops:.4g} " in line
    # A start of 8 s, and the budget at half of the peak of 1e9 FLOP/s.
    assert line.rstrip().endswith(f"{8 + planned.runs[-1].flops / 5e8:.3g} s")
    assert not (folder / "none").exists()


def test_memory_is_that_of_the_planner_and_bounds_how_many_run_beside_each_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, console = plan(folder), listening()
    vocabulary = read_manifest(planned.prepared)["vocabulary_size"]
    wanted = [
        Planned(run.config, 1, vocabulary, torch.cuda.is_available()).at(4).peak for run in planned.runs
    ]
    assert planned.memory == wanted and min(wanted) < max(wanted)
    monkeypatch.setattr(study, "at_a_time", lambda config: 8)
    monkeypatch.setattr(study, "total_memory", lambda: 3 * (study.PROCESS + max(wanted)))
    if not torch.cuda.is_available():  # of which each run has its own
        assert planned.at_once == 3
    monkeypatch.setattr(study, "total_memory", lambda: min(wanted) - 1)
    assert planned.at_once == 1
    show(planned, console)
    assert "warning: a rank takes up to" in said(console)


def test_a_batch_that_ranks_cannot_share_is_one_line(folder: Path) -> None:
    with pytest.raises(ValueError, match="^global_batch: 3 cannot be shared by 2 ranks"):
        plan(folder, "engine.ranks=2", "global_batch=3")
    with pytest.raises(ValueError, match="^global_batch: 1 cannot be shared by 2 ranks"):
        plan(folder, "engine.ranks=2", "global_batch=1")


def test_data_that_is_repeated_is_told(folder: Path) -> None:
    planned = plan(folder)
    assert planned.unique is not None
    manifest = read_manifest(planned.prepared)["splits"]["train"]
    assert manifest["tokens"] - 32 <= planned.unique <= manifest["tokens"]
    seen = [run.tokens / planned.unique for run in planned.runs]
    assert max(seen) > 1
    more = sum(epochs > 1 for epochs in seen)
    assert repeated(planned).startswith(f"{more} runs see data more than once, up to {max(seen):.3g} times")
    assert repeated(plan(folder, "budgets=[1e8]", "global_batch=1")) == ""


def test_sizes_around_the_expected_optimum(folder: Path) -> None:
    shapes = ",".join(f"{{width:{width},heads:1}}" for width in (64, 8, 16, 32))
    own = f"shapes=[{shapes}]", "nearest=3", "nearest_at_largest=1", "parametrization=standard"
    more = "~parametrization.base", "rule=constant", "budgets=[4e9,16e9,64e9]"
    found = plan(folder, *own, *more, "expected.coefficient=0.1", "expected.exponent=0.5")
    widths = [
        [run.shape.settings["width"] for run in found.runs if run.budget == budget]
        for budget in (4e9, 16e9, 64e9)
    ]
    sizes = {run.shape.settings["width"]: run.parameters for run in found.runs}
    assert [len(few) for few in widths] == [3, 3, 1]
    for few, budget in zip(widths, (4e9, 16e9, 64e9), strict=True):
        assert few == sorted(few)
        far = [abs(np.log(sizes[width] / (0.1 * budget**0.5))) for width in sizes]
        near = [abs(np.log(sizes[width] / (0.1 * budget**0.5))) for width in few]
        assert sorted(far)[: len(few)] == sorted(near)


def test_hyperparameters_follow_the_rule(folder: Path) -> None:
    assert {run.config.optim["learning_rate"] for run in plan(folder).runs} == {0.02}
    powers = (
        "optim.learning_rate:{of:parameters,coefficient:2,exponent:-0.5},"
        "global_batch:{of:flops,coefficient:4e-9,exponent:1,multiple:2}"
    )
    standard = "parametrization=standard", "~parametrization.base", "rule=power"
    for run in plan(folder, *standard, f"powers={{{powers}}}").runs:
        assert run.config.optim["learning_rate"] == pytest.approx(2 * run.parameters**-0.5, rel=1e-3)
        assert run.config.global_batch == {BUDGETS[0]: 4, BUDGETS[1]: 10}[run.budget]
        assert run.tokens == run.steps * run.config.global_batch * 32
        assert run.given.keys() == {"optim.learning_rate", "global_batch"}


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ("budgets=[1e9,0]", "budgets: [1000000000.0, 0.0] are not positive numbers of FLOP"),
        ("budgets=[2e9,1e9]", "budgets: [2000000000.0, 1000000000.0] do not increase"),
        ("budgets=[1e9,1e9]", "budgets: [1000000000.0, 1000000000.0] do not increase"),
        ("budgets=[]", "budgets: [] are not positive"),
        ("budgets=much", "budgets"),
        ("shapes=[{width:16}]", "shapes: [{'width': 16}] are not two or more"),
        ("shapes=[{width:16},{width:16}]", "shapes: {width:16} and {width:16} are both of "),
        ("shapes=[{width:16},{wide:32}]", "model.wide: no such key"),
        ("shapes=[{width:16},{width:33,heads:2}]", "shapes: {width:33,heads:2}: model.width: "),
        ("budgets=[1e8,1e9]", "shapes: 1e8-20.6k: {width:32,heads:2} makes 5.8 steps of "),
        ("seeds=[1,1]", "seeds: [1, 1] are not one or more different ones"),
        ("nearest=2 expected.coefficient=null", "expected.coefficient: must be set"),
        ("parallel=0", "parallel: 0 is not positive"),
        ("rule=best", "rule: best is none of constant, power, mup"),
        ("rule=constant", "rule: constant, but parametrization has a base"),
        (
            "rule=power parametrization=standard ~parametrization.base",
            "rule: power, but powers are not given",
        ),
        ("powers={optim.learning_rate:3}", "powers.optim.learning_rate: is not {of: "),
        ("powers={name:{of:flops,coefficient:1,exponent:1}}", "powers.name: is no number of a run"),
        ("powers={seed:{of:age,coefficient:1,exponent:1}}", "powers.seed.of: age is none of parameters"),
        ("powers={seed:{of:flops,coefficient:-1,exponent:1}}", "powers.seed.coefficient: -1 is not a pos"),
        ("launcher=carrier", "launcher: carrier is none of python, torchrun, slurm"),
        ("launcher=slurm probe=true", "probe: measures on this machine"),
        ("utilization=1.5", "utilization: 1.5 is no share"),
        ("peak=-1", "peak: -1.0 is not a positive"),
        ("schedule.warmup=100", "budgets: 1.2e9-20.6k: schedule.warmup: 100 steps, and the horizon is "),
        ("curriculum={5:{sequence_length:16}}", "curriculum: the steps of a study's runs are alike"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder: Path, more: str, line: str) -> None:
    with pytest.raises((ValueError, HydraException, OmegaConfBaseException)) as caught:
        plan(folder, *more.split())
    assert one_line(caught.value).startswith(line), one_line(caught.value)


def test_keys_of_the_study_are_refused() -> None:
    for key in ("seed=3", "horizon.steps=3"):
        with pytest.raises(ValueError, match="is set by the study"):
            refuse([key], OWN)


def command(*given: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.scaling", *given],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ((), "nothing: is no command; give one of plan, run"),
        (("guess",), "guess: is no command; give one of plan, run"),
        (("plan", "study=huge"), "study=huge: no such choice; there are fineweb, tiny"),
        (("run", "seed=1"), "seed: is set by the study for each of its runs; set seeds instead"),
    ],
)
def test_the_command_says_what_it_is_not(given: tuple[str, ...], line: str) -> None:
    process = command(*given)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and out == ""
    assert err.startswith(f"error: {line}") and err.count("\n") == 1


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[str, Path]:
    """What was said of a study one of whose runs could not be trained; and the directory of the whole study,
    after the same command."""
    planned, console, directory = plan(folder), listening(), folder / "whole"
    held = next(
        job
        for job in jobs_of([run.planned for run in planned.runs], folder / "trials")
        if "2.4e9" in job.name
    )
    held.directory.mkdir(parents=True)
    lock = Lock(held.directory)
    with pytest.raises(
        ValueError, match=rf"^1 of 4 runs failed, see above, .*points.csv: {held.name}; the same"
    ):
        train(planned, console, directory)
    lock.release()
    points = read(directory / POINTS)
    assert points.names == [run.name for run in planned.runs if run.name != held.name]
    train(planned, console, directory)
    return said(console), directory


def test_a_study_goes_on_past_a_run_that_fails_and_says_so(whole: tuple[str, Path]) -> None:
    out = whole[0].splitlines()
    (line,) = [line for line in out if "failed" in line]
    assert "2.4e9-" in line and "another process trains in" in line
    assert sum("validation loss" in line for line in out) == 4
    assert "3 of 4 runs: trained before" in out


def test_points_are_what_was_trained(folder: Path, whole: tuple[str, Path]) -> None:
    planned, points = plan(folder), read(whole[1] / POINTS)
    assert points.names == [run.name for run in planned.runs]
    for index, (run, job) in enumerate(
        zip(planned.runs, jobs_of([run.planned for run in planned.runs], folder / "trials"), strict=True)
    ):
        last = [
            record for record in read_metrics(job.directory / "metrics.jsonl") if record["kind"] == "eval"
        ][-1]
        assert points.loss[index] == last["loss"]
        assert points.tokens[index] == last["tokens"] == run.tokens
        assert points.flops[index] == last["flops"] == run.flops
        assert points.budget[index] == run.budget and points.parameters[index] == run.parameters
        assert load(job.directory / "config.yaml").model["width"] == run.shape.settings["width"]
    assert points.unique_tokens is not None and planned.unique is not None
    assert (points.unique_tokens == np.minimum(points.tokens, planned.unique)).all()
    assert points.shared["data"] == planned.prepared.name and set(points.shared) == {"data", "tokenizer"}
    with open(whole[1] / CURVES, newline="") as file:
        curves = list(csv.DictReader(file))
    ends = {row["name"]: row for row in curves if row["kind"] == "eval"}
    assert [float(ends[name]["loss"]) for name in points.names] == points.loss.tolist()
    assert sum(row["kind"] == "train" for row in curves) == sum(-(-run.steps // 4) for run in planned.runs)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_study_killed_three_times_ends_with_the_same_table(folder: Path, whole: tuple[str, Path]) -> None:
    directory, trials = folder / "killed", folder / "killed-trials"
    given = [*arguments(folder, trials="killed-trials"), f"directory={directory}", "parallel=2"]

    def steps() -> int:
        """Of all runs together, as far as they are logged."""
        last = [read_metrics(path)[-1:] for path in trials.glob("*/metrics.jsonl")]
        return sum(record["step"] for records in last for record in records)

    total = sum(run.steps for run in plan(folder).runs)
    for share in (0.15, 0.4, 0.7):
        process = command("run", *given)
        try:
            wait_for(lambda least=share * total: steps() >= least)  # type: ignore[misc]
        finally:
            process.kill()
            process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL and not (directory / POINTS).exists()
    process = command("run", *given)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    for name in (POINTS, CURVES):
        assert (directory / name).read_bytes() == (whole[1] / name).read_bytes()
    records = [record for path in trials.glob("*/metrics.jsonl") for record in read_metrics(path)]
    assert any(record["kind"] == "event" and record["event"] == "resume" for record in records)


# Runs a job beside what follows, as Slurm does on another machine.
SBATCH = """#!/bin/bash
number=$(( $(cat {folder}/count 2> /dev/null || echo 0) + 1 ))
echo $number > {folder}/count
cp "$1" {folder}/script-$number
export SLURM_JOB_ID=$number SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
setsid bash "$1" > {folder}/output-$number 2>&1 < /dev/null &
echo $! > {folder}/job-$number
echo "Submitted batch job $number"
"""
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do
    case "$1" in --output|--error) shift 2 ;; *) shift ;; esac
done
exec "$@"
"""
SQUEUE = """#!/bin/bash
number=${{@: -1}}
if [[ -e {folder}/silent ]]; then echo "slurm_load_jobs error: Socket timed out" >&2; exit 1; fi
kill -0 $(cat {folder}/job-$number) 2> /dev/null && echo "$number cpu R" && exit
echo "slurm_load_jobs error: Invalid job id specified" >&2
exit 1
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands, for this machine alone; what they are given is in files beside them."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    for name, script in {"sbatch": SBATCH, "srun": SRUN, "squeue": SQUEUE}.items():
        (folder / name).write_text(script.format(folder=folder) if name != "srun" else script)
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_slurm_gives_the_same_table(folder: Path, whole: tuple[str, Path], cluster: Path) -> None:
    own = "launcher=slurm", "slurm={slurm_partition:cpu,timeout_min:30,nodes:1}", "budgets=[1.2e9]"
    planned, console = plan(folder, *own, trials="slurm-trials"), listening()
    assert planned.at_once == 2
    train(planned, console, folder / "slurm")
    expected, found = read(whole[1] / POINTS), read(folder / "slurm" / POINTS)
    assert found.names == expected.names[:2] and found.loss.tolist() == expected.loss[:2].tolist()
    scripts = [path.read_text() for path in cluster.glob("script-*")]
    assert len(scripts) == 2
    for script in scripts:
        assert "#SBATCH --partition=cpu\n" in script and "#SBATCH --time=30\n" in script
        assert f"cd {ROOT}\n" in script
    assert sorted(path.read_text() for path in (folder / "slurm-trials").glob(f"*/{JOB}")) == ["1\n", "2\n"]


def test_a_job_that_is_still_in_the_queue_is_waited_for(tmp_path: Path, cluster: Path) -> None:
    """And one that left it without a result has failed; a signal ends the waiting, not the job."""
    run = tmp_path / "run"
    run.mkdir()
    sleeping = subprocess.Popen(["sleep", "60"])
    (cluster / "job-7").write_text(str(sleeping.pid))
    (run / JOB).write_text("7\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.launchers.LOOK", 0.01)
        patch.setattr("launch.launchers.ASK", 0.05)
        patch.setattr("launch.launchers.LATE", 0.05)
        slurm = Slurm(tmp_path / "jobs", {})
        job = slurm.start([], 1, {"OMP_NUM_THREADS": "1"}, run)
        assert not (cluster / "count").exists() and job.poll() is None
        job.send_signal(signal.SIGTERM)
        assert job.wait() == 75 and sleeping.poll() is None
        again = slurm.start([], 1, {"OMP_NUM_THREADS": "1"}, run)
        (cluster / "silent").touch()  # Slurm does not answer, and the job may still be there
        assert queued("7") and queued("8")
        (cluster / "silent").unlink()
        assert queued("7")
        sleeping.kill()
        sleeping.wait()
        assert not queued("7")
        assert again.wait() == 1
    assert "job 7 of Slurm ended without the run" in (run / "output.txt").read_text()


def test_slurm_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"^launcher: slurm: .*srun.*; start on a login node$"):
        Slurm(tmp_path, {})


def test_a_parameter_that_submitit_does_not_know_is_one_line(tmp_path: Path, cluster: Path) -> None:
    with pytest.raises(ValueError, match=r"^slurm: .*partion") as caught:
        Slurm(tmp_path, {"slurm_partion": "cpu"})
    assert "\n" not in str(caught.value)


def test_torchrun_starts_the_ranks(tmp_path: Path, folder: Path) -> None:
    one = plan(folder, "launcher=torchrun", "engine.ranks=2", "budgets=[1.2e9]", trials="ranks")
    points = train(one, listening(), tmp_path)
    assert np.isfinite(points.loss).all()
    for path in (folder / "ranks").glob("*/environment.json"):
        assert json.loads(path.read_text())["world_size"] == 2


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf" / "study").glob("*.yaml")))
def test_every_study_is_one(name: str, folder: Path) -> None:
    """On the tests' text, for that of some has to be fetched; with a vocabulary as large as theirs."""
    with composing():
        node = compose("scaling", overrides=[f"study={name}"])
        text = compose(
            "config", overrides=["data=text", f"data.source.paths={folder}/text/*.txt", "tokenizer=bytes"]
        )
    node.model.vocabulary_size = node.tokenizer.vocabulary_size
    node.data, node.tokenizer = text.data, text.tokenizer
    node.data.directory = f"{folder}/prepared"
    planned = plan_of(node)
    study = planned.study
    assert len(study.budgets) >= 4 and study.budgets[-1] == 4 * study.budgets[-2]  # held out
    for budget in study.budgets[:-1]:
        assert sum(run.budget == budget for run in planned.runs) >= 5


def test_numbers_are_spelled_short() -> None:
    assert [scientific(number) for number in (1e9, 2.5e12, 1.234e21)] == ["1e9", "2.5e12", "1.23e21"]
    assert [short(number) for number in (999, 17520, 1.5e6, 2e9)] == ["999", "17.5k", "1.5M", "2B"]
