"""launch.verify: what is whole and what is not, and the exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from launch.verify import Finding, left_over, pointer, show, verify
from tests.tiny import ROOT
from train.checkpoint import LATEST, MANIFEST, WEIGHTS, Saver, path_of
from train.config import CheckpointConfig
from train.rundir import RunDir


class Weights:
    """Stands for an engine that has one tensor to save."""

    world = SimpleNamespace(rank=0, gather=lambda value: [value], broadcast=lambda value: value)

    def snapshot(self, aside: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        return {"state.pt": torch.ones(500)}, {"weight": torch.ones(2500)}


def make_run(path: Path, *steps: int) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("name: run\n")
    saver = Saver(Weights(), RunDir(path).checkpoints, CheckpointConfig(keep=9))  # type: ignore[arg-type]
    for step in steps:
        saver.save(step, {"step": step})
        saver.wait()
        assert saver.settle().error is None
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "[b]", 3, 6)


def output(*runs: Path) -> tuple[bool, list[str]]:
    console = Console(record=True, width=120)
    well = show(list(runs), console)
    return well, console.export_text().splitlines()


def harm(run: Path, step: int) -> None:
    path = path_of(RunDir(run).checkpoints, step) / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def test_every_checkpoint_is_told_of(run: Path) -> None:
    read: list[int] = []
    found = verify(run, read.append)
    assert [(f.step, f.files, f.problem) for f in found] == [(3, 4, None), (6, 4, None)]
    folder = path_of(RunDir(run).checkpoints, 6)
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert found[1].bytes == sum(sizes.values()) > 12000
    assert sum(read) == 2 * (sum(sizes.values()) - sizes[MANIFEST])
    newest = max(file.stat().st_mtime for file in folder.iterdir())
    assert found[1].written.timestamp() == pytest.approx(newest)
    assert pointer(run) == ("the pointer is to step 6, the newest", True)
    assert left_over(run) == []


def test_damage_is_shown_and_fails(run: Path) -> None:
    well, lines = output(run)
    assert well and sum("whole" in line for line in lines) == 2
    assert lines[0] == str(run)  # brackets and all
    harm(run, 3)
    well, lines = output(run)
    assert not well and sum("whole" in line for line in lines) == 1
    assert any("model.safetensors is not what was written" in line for line in lines)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("step-00000003\n", "the pointer is to step 3, and the newest is 6; the next save moves it"),
        ("step-00000009\n", "points to 'step-00000009', which is not there"),
        ("", "points to nothing, which is not there"),
        (None, "no pointer to step 6, the newest; the next save makes one"),
    ],
)
def test_a_wrong_pointer_fails(run: Path, content: str | None, told: str) -> None:
    latest = RunDir(run).checkpoints / LATEST
    latest.unlink() if content is None else latest.write_text(content)
    well, lines = output(run)
    assert not well and any(told in line for line in lines)


def test_what_a_killed_save_left_is_shown_and_is_no_failure(run: Path) -> None:
    (RunDir(run).checkpoints / ".step-00000009").mkdir()
    well, lines = output(run)
    assert well and any(".step-00000009" in line for line in lines)


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    well, lines = output(make_run(tmp_path / "new"))
    assert well and lines == [str(tmp_path / "new"), "there is no checkpoint"]


def test_a_checkpoint_that_goes_meanwhile_is_left_out(run: Path) -> None:
    folder, gone = path_of(RunDir(run).checkpoints, 3), RunDir(run).checkpoints / "gone"
    found = verify(run, lambda count: folder.rename(gone) if folder.exists() else None)
    assert [finding.step for finding in found] == [6]
    assert all(isinstance(finding, Finding) for finding in found)


def command(*arguments: Path) -> subprocess.CompletedProcess[str]:
    own = [sys.executable, "-m", "launch.verify", *map(str, arguments)]
    return subprocess.run(own, cwd=ROOT, capture_output=True, text=True)


def test_the_command(run: Path) -> None:
    other = make_run(run.parent / "other", 2)
    harm(other, 2)
    done = command(run, other)
    assert done.returncode == 1 and not done.stderr
    assert done.stdout.count("whole") == 2
    done = command(run, run.parent)
    assert done.returncode == 1 and not done.stdout
    assert (
        done.stderr.startswith(f"error: {run.parent}: not a run's directory") and done.stderr.count("\n") == 1
    )
