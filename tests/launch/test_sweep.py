"""A search: its space for optuna, a grid and W&B; trials that are pruned, diverge, are killed and go on."""

from __future__ import annotations

import io
import json
import math
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from hydra import compose
from omegaconf import OmegaConf
from rich.console import Console
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from data.cli import one_line
from launch.overrides import composing
from launch.search import FILE, Search, Sweep
from launch.search_space import METRIC, overrides, settings, space
from launch.study import Job
from launch.sweep import exported, search, sweep_of
from launch.sweep_page import finding, page, ranked, table
from tests.tiny import ROOT, corpus
from tests.tiny import overrides as tiny
from train.checkpoint import steps
from train.config import from_hydra
from train.records import read_metrics
from train.rundir import RunDir
from train.track import Track

RATE = "optim.learning_rate:{low:1e-4,high:1e-1,log:true}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep")
    corpus(path / "text", documents=12)
    return path


def arguments(folder: Path, name: str, found: str, *more: str) -> list[str]:
    """Of a search over a space, in Hydra's grammar, with runs of 6 steps."""
    own = f"+search={found}", f"directory={folder}/{name}", f"runs={folder}/{name}/runs"
    free = [one for one in tiny(folder) if one.split("=")[0] not in found]
    return [*free, *own, *more]


def asked(folder: Path, name: str, found: str, *more: str) -> Sweep:
    given = arguments(folder, name, found, *more)
    with composing():
        return sweep_of(compose("sweep", overrides=given), [])


def begun(*given: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *given]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# The space

SPACE = {
    "optim.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "optim.weight_decay": {"low": 0.0, "high": 0.3, "step": 0.1},
    "model.layers": {"low": 1, "high": 9, "points": 5},
    "global_batch": {"low": 1, "high": 100, "log": True},
    "optim.betas": {"values": [[0.9, 0.95], [0.9, 0.99]]},
    "model.position": {"values": ["learned", "rotary"]},
    "evaluation.prompt": {"values": [None, "a, b"]},
    "model.tied": {"values": [True, False]},
}


def test_the_grid_has_the_ends_and_the_points_between() -> None:
    assert {one.key: one.grid() for one in space(SPACE)} == {
        "optim.learning_rate": [1e-4, 1e-3, 1e-2],
        "optim.weight_decay": [0.0, 0.1, 0.2, 0.3],
        "model.layers": [1, 3, 5, 7, 9],
        "global_batch": [1, 10, 100],
        **{key: given["values"] for key, given in SPACE.items() if "values" in given},
    }
    points = settings(space({key: SPACE[key] for key in ("model.position", "model.layers")}))
    assert len(points) == 10 and points[1] == {"model.position": "learned", "model.layers": 3}


def test_optuna_has_the_same_space() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen: dict[str, list[Any]] = {key: [] for key in SPACE}
    for _ in range(60):
        trial = study.ask()
        for one in space(SPACE):
            value = one.suggest(trial)
            assert value == one.suggest(trial)  # as a search that goes on asks again
            seen[one.key].append(value)
    assert min(seen["optim.learning_rate"]) < 3e-4 and max(seen["optim.learning_rate"]) > 3e-3
    assert set(seen["optim.weight_decay"]) == {0.0, 0.1, 0.2, 0.3}
    assert set(seen["model.layers"]) == set(range(1, 10))
    assert {type(value) for value in seen["global_batch"]} == {int}
    assert sorted(seen["global_batch"])[30] < 25  # on a linear scale, half of them are above 50
    for key, given in SPACE.items():
        assert all(value in seen[key] for value in given.get("values", []))
    for one in space(SPACE):
        for value in one.grid():
            study.enqueue_trial({one.key: one.kept(value)})
            assert one.suggest(study.ask()) == value


def test_what_a_run_is_given_says_the_value() -> None:
    parameters = space({key: SPACE[key] for key in ("optim.betas", "evaluation.prompt")})
    for point in settings(parameters):
        with composing():
            node = compose("config", overrides=overrides(parameters, point))
        assert node.optim.betas == point["optim.betas"]
        assert node.evaluation.prompt == point["evaluation.prompt"]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, "search: names no key; give for example"),
        ({"name": {"values": ["a", "b"]}}, "search.name: is no key of a run that can be searched for"),
        ({"+a.b": {"values": [1, 2]}}, "search.+a.b: is no key of a run that can be searched for"),
        ({"seed": 3}, "search.seed: 3 is neither {low: …, high: …} nor {values: […]}; give one"),
        ({"seed": {"low": 3}}, "search.seed: {'low': 3} is neither"),
        ({"seed": {"low": 3, "hihg": 4, "high": 5}}, "search.seed.hihg: no such field; there are low, high"),
        ({"seed": {"values": [1, 2], "log": True}}, "search.seed: has values, and log of a range; give one"),
        ({"seed": {"values": [1, 1]}}, "search.seed.values: [1, 1] is no list of two or more different ones"),
        ({"seed": {"values": "ab"}}, "search.seed.values: ab is no list of two or more different ones"),
        ({"seed": {"low": "1e-3x", "high": 2}}, "search.seed.low: 1e-3x is not a number; give one"),
        ({"seed": {"low": 1, "high": math.inf}}, "search.seed.high: inf is not a number; give one"),
        ({"seed": {"low": 2, "high": 1}}, "search.seed.high: 1 is not above low, 2; give a larger number"),
        ({"seed": {"low": 0, "high": 1, "log": True}}, "search.seed.low: 0 is not positive, as log asks for"),
        ({"seed": {"low": 1, "high": 2, "log": "yes"}}, "search.seed.log: yes is neither true nor false"),
        ({"seed": {"low": 1, "high": 9, "log": True, "step": 2}}, "search.seed.step: does not go with log"),
        (
            {"seed": {"low": 1, "high": 9, "step": 0.5}},
            "search.seed.step: 0.5 is not a positive number, whole",
        ),
        ({"seed": {"low": 0.0, "high": 1, "step": -1}}, "search.seed.step: -1 is not a positive number"),
        (
            {"seed": {"low": 0.0, "high": 1, "step": 0.3}},
            "search.seed.step: high, 1, is no whole number of 0.3",
        ),
        ({"seed": {"low": 1, "high": 9, "points": 1}}, "search.seed.points: 1 is not 2 or more"),
    ],
)
def test_a_wrong_space_is_one_line(given: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError) as caught:
        space(given)
    assert one_line(caught.value).startswith(line)


@pytest.mark.parametrize("path", sorted((ROOT / "conf/search").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_space_is_one_of_runs(path: Path) -> None:
    with composing():
        sweep = sweep_of(compose("sweep", overrides=[f"search={path.stem}"]), [])
    assert [one.key for one in sweep.parameters] == list(OmegaConf.load(path))
    for point in settings(sweep.parameters):
        with composing():
            from_hydra(compose("config", overrides=[*sweep.typed, *overrides(sweep.parameters, point)]))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["search={optim.learning_rat:{values:[1,2]}}"], "optim.learning_rat: no such key; did you mean"),
        (
            ["search={seed:{values:[1,2]}}", "seed=3"],
            "seed: is searched for; leave it out here, or in the space",
        ),
        (["search={seed:{values:[1,2]}}", "trials=0"], "trials: 0 is not positive; give a larger number"),
        (["search={seed:{values:[1,2]}}", "sampler=random"], "sampler: random is none of tpe, grid"),
        (["search={seed:{values:[1,2]}}", "export=yaml"], "export: yaml is none of wandb, multirun"),
        (["search={seed:{values:[1,2]}}", "pruning.finished=0"], "pruning.finished: 0 is not positive"),
        (["search={seed:{values:[1,2]}}", "pruning.steps=-1"], "pruning.steps: -1 is below 0"),
        (["trials=3"], "search: must be set to a space of conf/search, for example one of learning-rate"),
    ],
)
def test_a_wrong_key_is_one_line(given: list[str], line: str) -> None:
    written = [f"+{one}" if one.startswith("search=") else one for one in given]
    with pytest.raises(Exception) as caught, composing():
        sweep_of(compose("sweep", overrides=written), given)
    assert one_line(caught.value).startswith(line)


# Others' sweeps


def test_an_agent_of_wandb_starts_runs_in_the_space(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = (
        "{optim.betas:{values:[[0.9,0.95],[0.9,0.99]]},model.layers:{low:1,high:3},"
        "optim.eps:{low:1e-9,high:1e-7,log:true}}"
    )
    sweep = asked(folder, "agent", found, "export=wandb", "evaluation.every=2", "pruning.steps=5")
    definition = yaml.safe_load(exported(sweep))
    assert definition["method"] == "bayes" and definition["run_cap"] == 20
    assert definition["metric"] == {"name": METRIC, "goal": "minimize"}
    assert definition["early_terminate"] == {"type": "hyperband", "min_iter": 2, "eta": 2}
    assert definition["parameters"] == {
        "optim.betas": {"values": ["[0.9,0.95]", "[0.9,0.99]"]},
        "model.layers": {"distribution": "int_uniform", "min": 1, "max": 3},
        "optim.eps": {"distribution": "log_uniform_values", "min": 1e-9, "max": 1e-7},
    }
    # As its agent puts the command together
    chosen = {"optim.betas": "[0.9,0.99]", "model.layers": 2, "optim.eps": 1.5e-8}
    values = create_sweep_command_args({"args": {key: {"value": one} for key, one in chosen.items()}})
    command = []
    for chunk in create_sweep_command(definition["command"]):
        command += values[chunk[2:-1]] if chunk == "${args_no_hyphens}" else [chunk]
    assert command[:4] == ["${env}", "python", "-m", "train"]
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    with composing():
        config = from_hydra(compose("config", overrides=command[4:]))
    assert (config.optim["betas"], config.model["layers"], config.optim["eps"]) == ([0.9, 0.99], 2, 1.5e-8)
    assert config.directory == f"{folder}/agent/abc123" and config.track.wandb == "online"
    assert config.horizon.steps == 6
    assert "early_terminate" not in exported(
        asked(folder, "a", found, "export=wandb", "evaluation.every=null")
    )


def test_wandb_has_values_for_steps_and_whole_numbers() -> None:
    found = {one.key: one.wandb() for one in space(SPACE)}
    assert found["optim.weight_decay"] == {"values": [0.0, 0.1, 0.2, 0.3]}
    assert found["global_batch"] == {"distribution": "q_log_uniform_values", "q": 1, "min": 1, "max": 100}
    assert found["model.position"] == {"values": ["learned", "rotary"]}
    assert found["evaluation.prompt"] == {"values": ["null", '"a, b"']}
    assert found["model.tied"] == {"values": ["true", "false"]}


def test_the_metric_is_one_that_runs_send() -> None:
    track = object.__new__(Track)
    track._run, track._sent, track._rows = object(), -1, {}
    track.add({"kind": "eval", "step": 4, "loss": 2.5})
    assert track._rows == {4: {METRIC: 2.5}}


def test_hydras_own_sweep_of_runs_with_two_ranks_each(folder: Path) -> None:
    """One of three fails, and the second is stopped: both are said, and the same command goes on."""
    more = "export=multirun", "engine.ranks=2", "horizon.steps=80", "evaluation.every=null"
    sweep = asked(folder, "multirun", "{model.heads:{values:[3,2,1]}}", *more)
    command = shlex.split(exported(sweep))
    assert command[:4] == ["python", "-m", "train", "--multirun"] and command[-1] == "model.heads=3,2,1"
    jobs = [RunDir(folder / "multirun" / f"model.heads={heads}") for heads in (3, 2, 1)]
    process = begun(*command[2:])
    try:
        wait_for(lambda: bool(read_metrics(jobs[1].metrics)))
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 75, err
    assert err.startswith("error: model.width: 64 is not divisible by heads 3;")
    assert "model.heads=3: failed\n" in err
    assert "model.heads=2: stopped, and the sweep with it; the same command goes on from here\n" in err
    stopped = steps(jobs[1].checkpoints)
    assert stopped and stopped[-1] < 80 and not jobs[2].path.exists()
    process = begun(*command[2:])
    out, err = process.communicate(timeout=240)
    told = "1 of the sweep's runs failed: model.heads=3; see above; the same command tries them again"
    assert (process.returncode, err.splitlines()[-1]) == (1, f"error: {told}")
    assert f"going on from step {stopped[-1]}" in out
    assert not jobs[0].config.exists()
    for job in jobs[1:]:
        assert steps(job.checkpoints)[-1] == 80
        assert json.loads(job.environment.read_text())["world_size"] == 2


def test_a_rank_is_no_place_for_hydras_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    process = begun("train", "--multirun", "seed=1,2", f"directory={tmp_path}")
    _, err = process.communicate(timeout=240)
    line = "error: --multirun: starts the ranks of each run (engine.ranks); leave the launcher out\n"
    assert (process.returncode, err) == (1, line)


# Trials that are made up


def loss_of(job: Job) -> float:
    """What a made-up run ends with: lowest at a learning rate of 3e-3."""
    return 3 + math.log10(job.config.optim["learning_rate"] / 3e-3) ** 2


def write_records(job: Job, *evaluations: tuple[int, float | None], end: str | None = "finish") -> None:
    """What a run of 6 steps leaves."""
    job.directory.mkdir(parents=True, exist_ok=True)
    (job.directory / "environment.json").write_text(json.dumps({"total_steps": 6}))
    spent = {"tokens": 1, "flops": 1, "elapsed_s": 1.0}
    records: list[dict[str, Any]] = [
        {"kind": "eval", "step": step, "loss": loss, **spent} for step, loss in evaluations
    ]
    if end is not None:
        event = {"event": end, "action": "stop" if end == "nonfinite" else None, "message": "the loss is nan"}
        records.append({"kind": "event", "step": 6, **event, **spent})
    (job.directory / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that were started. Each ends at once, as a whole run; above a rate of 0.05 it diverges."""
    jobs: list[Job] = []

    def start(job: Job, slot: int) -> subprocess.Popen[bytes]:
        jobs.append(job)
        if job.config.optim["learning_rate"] > 0.05:
            write_records(job, end="nonfinite")
        else:
            write_records(job, (3, loss_of(job) + 1), (6, loss_of(job)))
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr("launch.study.Job.start", start)
    return jobs


def listening() -> Console:
    return Console(file=io.StringIO(), highlight=False, width=300)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_search_finds_the_lowest_loss_and_goes_on_as_if_unbroken(folder: Path, started: list[Job]) -> None:
    found = f"{{{RATE},optim.weight_decay:{{values:[0.0,0.1]}}}}"
    more = "workers=1", "startup=5", "pruning.finished=null"
    console = listening()
    whole = search(asked(folder, "whole", found, *more, "trials=14"), console)
    best = ranked(whole)[0]
    assert abs(math.log10(best["setting"]["optim.learning_rate"] / 3e-3)) < 0.15
    assert best["loss"] == loss_of(next(job for job in started if str(job.directory) == best["directory"]))
    states = [one["state"] for one in whole["trials"]]
    assert len(states) == 14 and set(states) == {"finished", "diverged"}
    assert whole["importances"]["optim.learning_rate"] > whole["importances"]["optim.weight_decay"]
    fell = next(one for one in whole["trials"] if one["state"] == "diverged")
    assert fell["setting"]["optim.learning_rate"] > 0.05 and fell["said"] == "the loss is nan"
    assert "14/14 trial 13 (optim.learning_rate=" in said(console)
    for trials in (1, 14):
        broken = search(asked(folder, "broken", found, *more, f"trials={trials}"), listening())
        assert len(broken["trials"]) == trials
    for one, other in zip(whole["trials"], broken["trials"], strict=True):
        assert {**one, "directory": None} == {**other, "directory": None}
    assert json.loads((folder / "broken" / "results.json").read_text()) == json.loads(json.dumps(broken))
    text = page(whole).split("<script>")[0]
    assert finding(whole) in text and "PED-ANOVA" in text and "the loss is nan" in text
    with console.capture() as shown:
        console.print(table(whole))
    assert f"{best['loss']:.4f}" in shown.get() and len(shown.get().splitlines()) == 6


def test_what_another_process_left_begun_goes_on_under_its_number(folder: Path, started: list[Job]) -> None:
    given = folder, "left", f"{{{RATE}}}", "workers=2", "trials=3"
    (folder / "left").mkdir()
    first = Search(asked(*given))
    with first.guard:
        chosen = [first.following()[2] for _ in range(2)]  # killed before a run of them was started
    path = folder / "left" / FILE
    path.write_bytes(path.read_bytes() + b'{"op_code":')
    (folder / "left" / f"{FILE}.lock").symlink_to(path)
    results = search(asked(*given), listening())
    assert [one["number"] for one in results["trials"]] == [0, 1, 2]
    assert [one["setting"] for one in results["trials"][:2]] == chosen
    assert len(started) == 3 and {one["state"] for one in results["trials"]} <= {"finished", "diverged"}


def test_a_grid_is_all_points_once_and_equal_ones_are_one_run(folder: Path, started: list[Job]) -> None:
    found = "{optim.learning_rate:{values:[1e-3,2e-3]},model.heads:{values:[2,3]}}"
    given = folder, "grid", found, "sampler=grid", "workers=2"
    results = search(asked(*given), listening())
    points = [tuple(one["setting"].values()) for one in results["trials"]]
    assert points == [(1e-3, 2), (1e-3, 3), (2e-3, 2), (2e-3, 3)]
    assert [one["state"] for one in results["trials"]] == ["finished", "refused"] * 2
    assert "heads" in results["trials"][1]["said"] and len(started) == 2
    console = listening()
    assert search(asked(*given), console)["trials"] == results["trials"] and len(started) == 2
    assert said(console).startswith("4 trials, 4 of them over, 2 at a time")
    # Equal settings in other words: beside each other they are one run, and one that is there is found
    words = "{divergence.threshold:{values:[20,20.0,30]}}"
    twins = search(asked(folder, "twins", words, "sampler=grid", "workers=3"), listening())
    assert len(started) == 4 and len({one["directory"] for one in twins["trials"]}) == 2
    assert [one["state"] for one in twins["trials"]] == ["finished"] * 3
    again = asked(folder, "twins-again", words, "sampler=grid", "workers=1", f"runs={folder}/twins/runs")
    assert len(search(again, listening())["trials"]) == 3 and len(started) == 4


@pytest.mark.parametrize(
    ("more", "key"),
    [
        (("sampler=grid",), "sampler: grid is not what"),
        (("model.layers=1",), "the runs' overrides: "),
        (("++search={optim.learning_rate:{low:1e-3}}",), "search: "),
    ],
)
def test_another_search_is_refused_in_its_directory(
    folder: Path, started: list[Job], more: tuple[str, ...], key: str
) -> None:
    search(asked(folder, "taken", f"{{{RATE}}}", "workers=1", "trials=1"), listening())
    with pytest.raises(ValueError, match=r"^.* is not what .*/taken was started with, ") as caught:
        search(asked(folder, "taken", f"{{{RATE}}}", "workers=1", "trials=1", *more), listening())
    assert str(caught.value).startswith(key) and str(caught.value).endswith("choose another name=…")


def test_a_failed_run_is_tried_again_and_one_worse_than_the_median_is_not_started(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: five finish, one fails, one was left worse than the others by another search."""
    values = ",".join(f"{number}e-4" for number in range(1, 8))
    given = folder, "failed", f"{{optim.learning_rate:{{values:[{values}]}}}}", "workers=1", "trials=7"
    count = 0

    def start(job: Job, slot: int) -> subprocess.Popen[bytes]:
        nonlocal count
        count += 1
        job.directory.mkdir(parents=True, exist_ok=True)
        (job.directory / "output.txt").write_text("error: disk: is full\n")
        if count == 6:
            return subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])
        write_records(job, (3, 4.0), (6, 3.0))
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr("launch.study.Job.start", start)
    monkeypatch.setattr("launch.search.TPESampler", lambda seed, n_startup_trials: Each())
    console = listening()
    results = search(asked(*given, "trials=6"), console)
    assert [one["state"] for one in results["trials"]] == ["finished"] * 5 + ["unfinished"]
    assert "failed with exit code 1: error: disk: is full" in said(console)

    def worse(job: Job, slot: int) -> subprocess.Popen[bytes]:
        raise AssertionError("is not to be started")

    left = Path(results["trials"][5]["directory"])
    (left / "environment.json").write_text(json.dumps({"total_steps": 6}))
    record = {"kind": "eval", "step": 3, "loss": 4.5, "elapsed_s": 1.0}
    (left / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    monkeypatch.setattr("launch.study.Job.start", worse)
    results = search(asked(*given, "trials=6"), listening())
    assert [one["state"] for one in results["trials"]] == ["finished"] * 5 + ["pruned"]
    assert results["trials"][5]["said"] == "above the median at step 3"
    assert "5 finished, 1 pruned" in finding(results)


class Each(optuna.samplers.BaseSampler):
    """Takes the choices of a key in their order."""

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: Any, trial: Any, space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
        return distribution.choices[trial.number % len(distribution.choices)]


# Trials that are trained


def test_a_search_that_was_killed_with_two_runs_under_way_loses_none(folder: Path) -> None:
    found = "{optim.learning_rate:{values:[1e-3,2e-3,1e30]}}"
    more = "sampler=grid", "workers=2", "horizon.steps=40", "evaluation.every=20", "checkpoint.every=5"
    given = arguments(folder, "killed", found, *more)
    runs = folder / "killed" / "runs"
    process = begun("launch.sweep", *given)
    try:
        wait_for(lambda: len([path for path in runs.glob("*/metrics.jsonl") if read_metrics(path)]) == 2)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        process.kill()
    assert len(list(runs.iterdir())) == 2
    process = begun("launch.sweep", *given)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "3 trials, 2 at a time: optim.learning_rate\n" in out and len(list(runs.iterdir())) == 3
    results = json.loads((folder / "killed" / "results.json").read_text())
    assert [one["state"] for one in results["trials"]] == ["finished", "finished", "diverged"]
    for one in results["trials"][:2]:
        records = read_metrics(Path(one["directory"]) / "metrics.jsonl")
        evaluations = [record for record in records if record["kind"] == "eval"]
        assert [record["step"] for record in evaluations] == [20, 40] == one["curve"]["step"]
        assert one["loss"] == evaluations[-1]["loss"]
        assert sum(record.get("event") == "finish" for record in records) == 1
    assert " ".join(finding(results).split()) in " ".join(out.split())


def test_a_run_above_the_median_is_stopped_and_can_be_gone_on_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = "workers=1", "horizon.steps=5000", "evaluation.every=5", "checkpoint.every=null"
    given = folder, "pruned", "{optim.learning_rate:{values:[1e-7,1e-8]}}", *more
    sweep = asked(*given, "trials=2", "pruning.finished=1", "pruning.steps=10")
    (folder / "pruned").mkdir()
    before = Search(sweep)
    trial, _, setting = before.following()
    trial.set_user_attr("setting", setting)
    for step in (5, 10, 15):
        trial.report(1.0, step)
    trial.set_user_attr("state", "finished")
    before.study.tell(trial, 1.0)
    console = listening()
    began = time.monotonic()
    results = search(sweep, console)
    assert time.monotonic() - began < 240
    one = results["trials"][1]
    assert one["state"] == "pruned" and one["said"] == "above the median at step 10"
    assert "pruned: above the median at step 10" in said(console)
    rundir = RunDir(one["directory"])
    saved = steps(rundir.checkpoints)
    assert saved and 10 <= saved[-1] < 5000
    assert [r["event"] for r in read_metrics(rundir.metrics) if r["kind"] == "event"][-1] == "interrupt"
    assert one["curve"]["step"][:2] == [5, 10] and one["loss"] is None
    assert before.study.trials[1].state == optuna.trial.TrialState.PRUNED
