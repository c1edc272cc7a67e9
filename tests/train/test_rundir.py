"""The run directory: who may write to it, and which run may go on in it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.shards import MANIFEST
from tests.tiny import ROOT, config
from train.config import load
from train.rundir import RunDir, environment

HOLD = """
import sys
from train.rundir import RunDir
rundir = RunDir(sys.argv[1])
rundir.lock()
print("held", flush=True)
sys.stdin.read()
"""


def prepared_as(folder: Path, tokens: str = "abc") -> Path:
    """A prepared folder, as far as a run directory looks at it."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"splits": {"train": {"shards": [{"sha256": tokens}]}}, "inputs": {}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def frozen(
    folder: Path, *overrides: str, prepared: str = "prepared/text-0123", world_size: int = 2
) -> RunDir:
    """A run directory as it stands once training has begun."""
    rundir = RunDir(folder / "run")
    rundir.path.mkdir(exist_ok=True)
    rundir.freeze(config(folder, *overrides), prepared_as(folder / prepared), {})
    rundir.record({}, {}, {"world_size": world_size})
    return rundir


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, directory],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdin and first.stdout
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(
            ValueError, match="^directory: another process trains in .*; wait for it"
        ) as caught:
            RunDir(directory).lock()
        assert "\n" not in str(caught.value)
    finally:
        first.kill()
        first.wait()
    rundir = RunDir(directory)
    rundir.lock()
    with pytest.raises(ValueError, match="another process"):
        RunDir(directory).lock()
    del rundir  # the lock goes with the last that holds it
    RunDir(directory).lock()


def test_a_directory_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="^directory: cannot write to .*file/run .*; choose another$"):
        RunDir(tmp_path / "file" / "run").lock()


def test_a_read_only_directory_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user writes to read-only directories")
        with pytest.raises(ValueError, match="^directory: cannot write to "):
            RunDir(tmp_path / "run").lock()
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.width=32"], "model.width: differs from what"),
        (["data.validation.share=0.1"], "data.validation.share: differs"),
        (["tokenizer=characters"], "tokenizer._target_: differs"),
        (["optim.learning_rate=1"], "optim.learning_rate: differs"),
        (
            ["seed=1", "model.width=32"],
            r"seed: differs from \S+ \S+ was started with, 0 and now 1 \(so does model.width\)",
        ),
        (["engine.precision=fp32"], "engine.precision: differs"),
        (["mixture.stages={4:{a:1}}"], r"mixture.stages: differs from .* started with, None and now \{4"),
    ],
)
def test_a_changed_run_is_refused_by_name(tmp_path: Path, overrides: list[str], message: str) -> None:
    rundir = frozen(tmp_path)
    with pytest.raises(
        ValueError, match=f"^({message}).*; undo the change, or choose another name="
    ) as caught:
        rundir.check_resume(config(tmp_path, *overrides))
    assert "\n" not in str(caught.value)


def test_all_changed_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        frozen(tmp_path).check_resume(config(tmp_path, "seed=1", "model.width=32", "model.heads=2"))
    assert all(key in str(caught.value) for key in ("seed", "model.width", "model.heads"))


def test_what_may_change_and_a_new_directory_are_accepted(tmp_path: Path) -> None:
    frozen(tmp_path).check_resume(
        config(tmp_path, "horizon.steps=9", "name=other", "engine=zero3", "micro_batch=1")
    )
    RunDir(tmp_path / "new").check_resume(config(tmp_path))


def test_another_corpus_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    rundir = frozen(tmp_path)
    before = {path.name: path.read_bytes() for path in rundir.path.iterdir()}
    with pytest.raises(ValueError, match="^data: the corpus has changed .*text-0123, now text-4567"):
        other = prepared_as(tmp_path / "prepared" / "text-4567", "other tokens")
        rundir.freeze(config(tmp_path, "log.every=7"), other, {})
    assert {path.name: path.read_bytes() for path in rundir.path.iterdir()} == before
    with pytest.raises(ValueError, match="^data: the corpus has changed"):  # in the place of the other
        rundir.freeze(config(tmp_path), prepared_as(rundir.prepared(), "other tokens"), {})
    rundir.freeze(config(tmp_path), prepared_as(tmp_path / "elsewhere"), {})
    assert rundir.prepared() == (tmp_path / "elsewhere").resolve()


def test_units_that_find_something_else_are_refused(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    own = config(tmp_path), prepared_as(tmp_path / "prepared" / "text-0123")
    rundir.freeze(*own, {"objective.entities": "a1", "objective.phrases": "b2"})
    rundir.freeze(*own, {"objective.entities": "a1", "objective.phrases": "b2"})
    with pytest.raises(ValueError, match="^objective.phrases: finds something else than when .* was started"):
        rundir.freeze(*own, {"objective.entities": "a1", "objective.phrases": "b3"})


def test_what_was_frozen_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rundir = frozen(tmp_path, "horizon.steps=9")
    rundir.freeze(config(tmp_path, "horizon.steps=11"), Path("prepared/text-0123"), {})
    assert load(rundir.config) == config(tmp_path, "horizon.steps=11")
    monkeypatch.chdir("/")
    assert rundir.prepared() == tmp_path / "prepared" / "text-0123"
    assert json.loads(rundir.environment.read_text()) == {"world_size": 2}


def test_nothing_stays_of_a_beginning_that_fails(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path / "runs" / "deep" / "run")
    with pytest.raises(RuntimeError), rundir.beginning():
        assert (rundir.path / "lock").exists()
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_nothing_stays_where_files_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ValueError, match="cannot lock files"), RunDir(tmp_path / "runs" / "run").beginning():
        raise AssertionError
    assert not list(tmp_path.iterdir())


def test_a_beginning_that_is_refused_leaves_the_other_its_lock(tmp_path: Path) -> None:
    first = RunDir(tmp_path / "run")
    first.lock()
    with pytest.raises(ValueError, match="another process"), RunDir(first.path).beginning():
        raise AssertionError
    assert json.loads((first.path / "lock").read_text())["pid"] == os.getpid()
    first.unlock()
    with RunDir(first.path).beginning():
        pass


def test_a_failed_resume_takes_nothing_away(tmp_path: Path) -> None:
    rundir = frozen(tmp_path)
    before = sorted(rundir.path.iterdir())
    with pytest.raises(RuntimeError), rundir.beginning():
        raise RuntimeError
    assert sorted(set(rundir.path.iterdir()) - {rundir.path / "lock"}) == before
    own = tmp_path / "own"  # what someone made before is kept
    own.mkdir()
    with pytest.raises(RuntimeError), RunDir(own).beginning():
        raise RuntimeError
    assert own.exists() and not list(own.iterdir())


def test_the_environment_is_that_of_this_process() -> None:
    found = environment(3)
    assert found["world_size"] == 3
    assert found["python"].split(".")[:2] == [str(part) for part in sys.version_info[:2]]
    assert {"torch", "deepspeed", "hydra-core"} <= found["packages"].keys()
