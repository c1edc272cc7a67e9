"""launch.schedules: the curves are those of the schedules and of the runs, on a page that loads nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data.cli import main_guard
from launch.schedules import curve, figure, global_batch, learning_rate, main, multipliers
from tests.launch.test_report import Page
from tests.tiny import ROOT, begun
from train.config import load
from train.optim.schedules import Linear, WarmupStableDecay
from train.rundir import RunDir

GROWING = [
    *("schedule=wsd", "schedule.warmup=2", "schedule.decay=4", "horizon.steps=10"),
    "curriculum={0:{sequence_length:16,global_batch:8},3:{sequence_length:32},7:{global_batch:16}}",
]


def test_a_schedule_and_its_settings_are_read_as_a_run_reads_them() -> None:
    drawn = multipliers("wsd,decay=30,shape=linear", 100)
    schedule = WarmupStableDecay(0.02, 30, 0.0, "linear")
    assert drawn["x"] == list(range(100))
    assert drawn["y"] == [schedule(step, 100) for step in range(100)]


def test_of_many_steps_some_are_drawn_with_the_first_and_the_last() -> None:
    drawn = curve(lambda step: step / 2, 10**6 + 1)
    assert drawn["x"][0] == 0 and drawn["x"][-1] == 10**6 and 2000 <= len(drawn["x"]) <= 2002
    assert drawn["y"] == [step / 2 for step in drawn["x"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("schedules")
    begun(path, "growing", 1, *GROWING)
    begun(path, "epochs", 1, "schedule=linear", "horizon.steps=null", "horizon.epochs=0.5")
    return path / "runs"


def test_a_runs_learning_rate_and_batch(folder: Path) -> None:
    run = RunDir(folder / "growing"), load(folder / "growing" / "config.yaml")
    rate, batch = learning_rate(*run), global_batch(*run)
    schedule = WarmupStableDecay(2, 4)
    assert rate["x"] == list(range(10))
    assert rate["y"] == [3e-3 * schedule(step, 10) for step in range(10)]
    assert (batch["x"], batch["y"]) == ([0, 3, 7, 9], [8, 8, 16, 16])
    assert batch["text"] == [
        *("of 16 tokens: 128", "of 32 tokens: 256", "of 32 tokens: 512", "of 32 tokens: 512")
    ]
    plots = figure({"one": [rate], "two": [batch]}).data
    assert [plot.line.color for plot in plots] == [plots[0].line.color] * 2
    assert [plot.showlegend for plot in plots] == [True, False]
    assert plots[1].line.shape == "hv"


def test_epochs_are_as_many_steps_as_the_run_found(folder: Path) -> None:
    rundir, config = RunDir(folder / "epochs"), load(folder / "epochs" / "config.yaml")
    with pytest.raises(ValueError, match="^.*/epochs: has not begun to train, and how many steps"):
        learning_rate(rundir, config)
    rundir.environment.write_text(json.dumps({"total_steps": 12}))
    try:
        assert learning_rate(rundir, config)["y"] == [3e-3 * Linear(1, 0.0)(step, 12) for step in range(12)]
        assert global_batch(rundir, config)["x"] == [0, 11]
    finally:
        rundir.environment.unlink()


def test_the_command_draws_all_of_conf(tmp_path: Path) -> None:
    output = tmp_path / "new" / "all.html"
    command = [sys.executable, "-m", "launch.schedules", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"schedules: {output}\n"), done.stderr
    page = output.read_text()
    assert Page(output).loads == []
    assert all(f'"name":"{path.stem}"' in page for path in (ROOT / "conf" / "schedule").glob("*.yaml"))


def ran(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["schedules", *arguments])
    main_guard(main)


def test_schedules_and_runs_stand_below_one_another(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "both.html"
    ran(monkeypatch, "wsd", "--run", str(folder / "growing"), "--steps", "50", "--output", str(output))
    titles = 'multiplier of[^"]*|learning rate|global batch[^"]*'
    assert len(re.findall(f'"text":"({titles})"', output.read_text())) == 3


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nonesuch"], "error: schedule=nonesuch: no such choice; there are constant, cosine, "),
        (["wsd,decy=3"], "error: schedule.decy: no such key; did you mean schedule.decay?"),
        (["wsd,decay=-3"], "error: schedule.decay: -3 is no number of steps"),
        (
            ["wsd,decay=2000"],
            "error: schedule.decay: 2,000 steps after 20 of warm-up, and the horizon is 1,000",
        ),
        (["--run", "absent"], "error: absent/config.yaml: no such file; is absent the directory of a run?"),
        (["cosine", "--output", "{0}"], "error: --output: {0} cannot be written (Is a directory); name"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    line: str,
) -> None:
    output = tmp_path / "page.html"
    own = [one.replace("{0}", str(tmp_path)) for one in arguments]
    with pytest.raises(SystemExit, match="1"):
        ran(monkeypatch, "--output", str(output), *own)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line.replace("{0}", str(tmp_path)))
    assert not list(tmp_path.iterdir())
