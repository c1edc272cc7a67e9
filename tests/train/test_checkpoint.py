"""Checkpoints are whole or not there: damage is found, a full disk and a kill cost nothing that was saved.

They are real ones, of two ranks. Where a test saves by itself, it writes what those engines gave as
snapshots. That a run goes on from them bit for bit is tested with whole runs.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.gpt import GPT
from tests.distributed import run_ranks
from tests.killing import killed_at
from tests.train.test_run import tensors
from train import checkpoint
from train.checkpoint import (
    LATEST,
    MANIFEST,
    STATE,
    WEIGHTS,
    Saved,
    Saver,
    damage,
    load_weights,
    newest_good,
    path_of,
    read_state,
    remove_after,
    steps,
    write_weights,
)
from train.config import CheckpointConfig
from train.files import entry_of

STAGES = (2, 3)
SYNCHRONOUS = CheckpointConfig(keep=9, asynchronous=False)
Content = tuple[dict[str, Any], dict[str, torch.Tensor] | None]


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def on_two_ranks(folder: Path) -> list[dict[str, Any]]:
    """One rank's part in folder/zero2 and folder/zero3, each with two checkpoints; what it found besides."""
    from tests.train.test_engine import make_batches, make_config, make_engine
    from train.engine import start_world

    world, found = start_world(), []
    for stage in STAGES:
        engine, directory = make_engine(make_config(zero_stage=stage)), folder / f"zero{stage}"

        def step(number: int, engine: Any = engine) -> None:
            engine.train_step(number, make_batches(make_config(), number, world.rank, world.size))

        saver, contents = Saver(engine, directory, SYNCHRONOUS), []
        for number in (3, 6):
            step(number)
            saver.save(number, {"step": number})
            saver.settle()
            contents.append(engine.snapshot(True))
        found.append(
            {
                "contents": contents,
                "meanwhile": save_meanwhile(engine, folder / f"meanwhile{stage}", lambda: step(7)),
                "full": save_where_one_rank_has_no_space(engine, folder / f"full{stage}", saver),
                "refused": load_malicious(engine, path_of(directory, 6), folder / f"evil{stage}", stage),
            }
        )
    return found


def save_meanwhile(engine: Any, directory: Path, work: Callable[[], None]) -> tuple[bool, bool]:
    """Save while `work` is done; whether the save had ended before, and after."""
    may_write, write = threading.Event(), checkpoint._write_files
    checkpoint._write_files = lambda *arguments: may_write.wait() and write(*arguments)
    saver = Saver(engine, directory, CheckpointConfig())
    saver.save(6, {"step": 6})
    checkpoint._write_files = write
    before = saver.finished
    work()
    may_write.set()
    saver.wait()
    after = saver.finished
    saver.settle()
    return before, after


def save_where_one_rank_has_no_space(engine: Any, directory: Path, other: Saver) -> list[Saved]:
    """Three saves; of the second, rank 1 cannot write its files."""
    saver, found = Saver(engine, directory, SYNCHRONOUS), []
    write = checkpoint.write_hashed
    for number in (3, 6, 9):
        if number == 6 and engine.world.rank == 1:
            checkpoint.write_hashed = no_space
        saver.save(number, {"step": number})
        checkpoint.write_hashed = write
        found.append(saver.settle())
    return found


def no_space(path: Path, fill: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def load_malicious(engine: Any, path: Path, folder: Path, stage: int) -> list[tuple[str, bool]]:
    """What loading says of a checkpoint with a planted payload, with the manifest to it; and if that ran."""
    from train.elastic import redistribute

    found = []
    for kind in ("optim", "model"):
        evil, traces = path_of(folder / kind, 6), folder / f"{kind}-ran"
        if engine.world.rank == 0:
            shutil.copytree(path, evil)
            for file in evil.glob(f"*_{kind}_states.pt"):
                content = torch.load(file, weights_only=False)
                torch.save({**content, "payload": Payload(traces)}, file)
            forge_manifest(evil)
        engine.world.barrier()
        assert damage(evil) is None
        ways = [lambda: engine.load(evil), lambda: redistribute(engine, evil, stage)]  # noqa: B023
        if stage == 2 and kind == "model":
            ways.pop()  # which does not read that file
        for load in ways:
            try:
                load()
                told = "loaded"
            except ValueError as error:
                told = str(error)
            engine.world.barrier()
            found.append((told, traces.exists()))
    return found


def forge_manifest(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"] = {name: vars(entry_of(path / name)) for name in manifest["files"]}
    (path / MANIFEST).write_text(json.dumps(manifest))


@dataclass
class Ranks:
    """What two ranks left in `folder`, and found; by stage, what each gave as snapshots of two steps."""

    folder: Path
    found: list[list[dict[str, Any]]]

    def contents(self, stage: int, index: int) -> Content:
        """The snapshots of all ranks of a stage in one."""
        own = [rank[STAGES.index(stage)]["contents"][index] for rank in self.found]
        return {name: state for states, _ in own for name, state in states.items()}, own[0][1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    folder = tmp_path_factory.mktemp("checkpoints")
    return Ranks(folder, run_ranks(on_two_ranks, 2, folder))


class Snapshots:
    """In the place of two ranks' engines: gives their snapshots in turn."""

    def __init__(self, *contents: Content) -> None:
        self.contents, self.turn = contents, 0
        self.world = SimpleNamespace(rank=0, gather=lambda value: [value], broadcast=lambda value: value)

    def snapshot(self, aside: bool) -> Content:
        self.turn += 1
        return self.contents[(self.turn - 1) % len(self.contents)]


def saver(ranks: Ranks, directory: Path, config: CheckpointConfig = SYNCHRONOUS) -> Saver:
    return Saver(Snapshots(ranks.contents(2, 0), ranks.contents(2, 1)), directory, config)  # type: ignore[arg-type]


def save(own: Saver, *numbers: int) -> Saved:
    for number in numbers:
        own.save(number, {"step": number})
        own.wait()
        saved = own.settle()
    return saved


def good(directory: Path) -> tuple[int | None, list[str]]:
    lines: list[str] = []
    found = newest_good(directory, lines.append)
    assert all("\n" not in line for line in lines)
    return found, lines


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(params=STAGES)
def two(request: pytest.FixtureRequest, ranks: Ranks, tmp_path: Path) -> Path:
    """A directory with two checkpoints, of steps 3 and 6."""
    return Path(shutil.copytree(ranks.folder / f"zero{request.param}", tmp_path / "checkpoints"))


# What may happen to a file, given the one of the older checkpoint.
HARM: dict[str, Callable[[Path, Path], Any]] = {
    "emptied": lambda file, older: os.truncate(file, 0),
    "cut in half": lambda file, older: os.truncate(file, file.stat().st_size // 2),
    "cut by a byte": lambda file, older: os.truncate(file, file.stat().st_size - 1),
    "longer by a byte": lambda file, older: os.truncate(file, file.stat().st_size + 1),
    "first byte": lambda file, older: flip(file, 0),
    "middle byte": lambda file, older: flip(file, file.stat().st_size // 2),
    "last byte": lambda file, older: flip(file, file.stat().st_size - 1),
    "removed": lambda file, older: file.unlink(),
    "of the older": lambda file, older: shutil.copyfile(older, file),
    "a folder": lambda file, older: (file.unlink(), file.mkdir()),
    "a link to nothing": lambda file, older: (file.unlink(), file.symlink_to("nothing")),
}


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("harm", HARM)
def test_whatever_happens_to_a_file_the_older_checkpoint_is_taken(two: Path, harm: str) -> None:
    assert good(two) == (6, [])
    newest, older = path_of(two, 6), path_of(two, 3)
    files = names(newest)
    assert {MANIFEST, STATE, WEIGHTS} < set(files) and len(files) >= 6
    for name in files:
        file = newest / name
        kept = file.read_bytes()
        HARM[harm](file, older / name)
        found, lines = good(two)
        if name != MANIFEST:
            assert found == 3 and name in lines[0], name
        elif not same_json(file, kept):  # else it lacks the end of its last line, which means nothing
            assert found == 3
        assert len(lines) == (found == 3) and all(line.startswith(f"{newest}: ") for line in lines)
        assert found is not None and read_state(path_of(two, found))["step"] == found
        if file.is_dir():
            file.rmdir()
        file.unlink(missing_ok=True)
        file.write_bytes(kept)
    assert good(two) == (6, [])


def same_json(file: Path, content: bytes) -> bool:
    try:
        return json.loads(file.read_text()) == json.loads(content)
    except (OSError, ValueError):
        return False


def test_a_file_more_is_damage_too(two: Path) -> None:
    (path_of(two, 6) / "zero_pp_rank_2_mp_rank_00_optim_states.pt").touch()
    found, lines = good(two)
    assert found == 3 and "zero_pp_rank_2_mp_rank_00_optim_states.pt is not in the manifest" in lines[0]


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", "null", '"files"', "[" * 100000),
        *('{"step": 6}', '{"step": 6, "files": []}', '{"step": 6, "files": {"model.safetensors": 1}}'),
        *('{"files": {}}', '{"step": "six", "files": {}}', '{"step": null, "files": {}}'),
        '{"step": 6, "files": {"model.safetensors": {"bytes": "x"}}}',
    ],
)
def test_any_manifest_is_read_without_harm(two: Path, content: str) -> None:
    (path_of(two, 6) / MANIFEST).write_text(content)
    found, (line,) = good(two)
    assert found == 3 and str(path_of(two, 6)) in line and len(line) < 400


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"step-00000009\n", "'step-00000009', which is not there"),
        (b"", "nothing, which is not there"),
        (b"\n\n", "nothing, which is not there"),
        (b"\x00\xff" * 5000, "which is not there"),
        (b"../zero2", "which is not there"),
        (b".", "which is not there"),
        (b"a\nb", r"'a\\nb', which is not there"),
    ],
)
def test_a_pointer_to_nothing_is_told_and_not_followed(two: Path, content: bytes, told: str) -> None:
    (two / LATEST).write_bytes(content)
    found, (line,) = good(two)
    assert found == 6
    assert line.startswith(f"{two / LATEST}: points to ") and len(line) < 600
    assert told.replace(r"\\", "\\") in line


def test_a_kill_before_the_pointer_has_moved_is_nothing_to_tell(two: Path) -> None:
    (two / LATEST).write_text("step-00000003\n")
    assert good(two) == (6, [])
    (two / LATEST).unlink()
    assert good(two) == (6, [])
    (two / LATEST).mkdir()
    found, (line,) = good(two)
    assert found == 6 and line.startswith(f"{two / LATEST}: cannot be read")


def test_a_folder_replaced_by_a_file(two: Path) -> None:
    shutil.rmtree(path_of(two, 6))
    path_of(two, 6).write_text("?")
    found, (line,) = good(two)
    assert found == 3 and "'step-00000006', which is not there" in line
    assert damage(path_of(two, 6)) is not None


def test_a_checkpoint_under_another_name_is_damaged(two: Path) -> None:
    path_of(two, 6).rename(path_of(two, 12))
    (two / LATEST).unlink()
    found, (line,) = good(two)
    assert found == 3 and "manifest.json is that of step-00000006" in line


def test_with_all_damaged_there_is_one_line(two: Path) -> None:
    flip(path_of(two, 6) / WEIGHTS, 100)
    (path_of(two, 3) / STATE).unlink()
    with pytest.raises(ValueError, match=r"none of its 2 checkpoint\(s\) is whole \(.*model.safe") as caught:
        good(two)
    assert "\n" not in str(caught.value)
    remove_after(two, 3)
    with pytest.raises(ValueError, match=r"none of its 1 checkpoint\(s\) is whole \(.*state.json is missing"):
        good(two)


def test_with_none_or_the_newest_removed(two: Path) -> None:
    assert good(two / "absent") == (None, [])
    remove_after(two, 3)
    assert names(two) == [LATEST, "step-00000003"] and good(two) == (3, [])


def test_a_snapshot_is_of_the_moment_of_the_save(ranks: Ranks) -> None:
    for index, stage in enumerate(STAGES):
        assert [rank[index]["meanwhile"] for rank in ranks.found] == [(False, True)] * 2
        at_once, meanwhile = (
            path_of(ranks.folder / name, 6) for name in (f"zero{stage}", f"meanwhile{stage}")
        )
        assert (at_once / WEIGHTS).read_bytes() == (meanwhile / WEIGHTS).read_bytes()
        files = sorted(at_once.glob("*.pt"))
        assert len(files) >= 3
        for file in files:
            expected, found = tensors(file), tensors(meanwhile / file.name)
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[place], found[place]) for place in expected), file


def test_a_save_that_one_rank_cannot_write_is_none_on_all(ranks: Ranks) -> None:
    for index, stage in enumerate(STAGES):
        directory = ranks.folder / f"full{stage}"
        for rank in ranks.found:
            assert [saved.error for saved in rank[index]["full"]] == [None, "No space left on device", None]
        assert names(directory) == [LATEST, "step-00000003", "step-00000009"]
        assert good(directory) == (9, [])


def test_what_is_planted_in_a_checkpoint_is_not_run(ranks: Ranks) -> None:
    for rank in ranks.found:
        told = [one for found in rank for one in found["refused"]]
        assert len(told) == 7
        for message, ran in told:
            assert "refused" in message and "\n" not in message and not ran


def test_the_newest_are_kept_and_those_at_multiples(ranks: Ranks, tmp_path: Path) -> None:
    for every, kept in ((None, [9, 12]), (6, [6, 9, 12]), (3, [3, 6, 9, 12])):
        directory = tmp_path / str(every)
        config = CheckpointConfig(keep=2, keep_every=every, asynchronous=False)
        own = saver(ranks, directory, config)
        save(own, 3, 6, 9, 12)
        own.close()
        assert steps(directory) == kept
        assert names(directory) == [LATEST, *(path_of(directory, step).name for step in kept)]
        assert (directory / LATEST).read_text() == "step-00000012\n"
        assert all(damage(path_of(directory, step)) is None for step in kept)


def test_a_damaged_one_is_not_kept_in_the_place_of_a_whole_one(ranks: Ranks, tmp_path: Path) -> None:
    own = saver(ranks, tmp_path, CheckpointConfig(keep=1, keep_every=3, asynchronous=False))
    save(own, 3, 9)
    flip(path_of(tmp_path, 9) / WEIGHTS, 100)
    own.config = CheckpointConfig(keep=1, asynchronous=False)
    save(own, 5)
    assert good(tmp_path)[0] == 5
    save(own, 9)
    assert good(tmp_path) == (9, []) and steps(tmp_path) == [9]


def test_what_is_told_of_a_save(ranks: Ranks, tmp_path: Path) -> None:
    saved = save(saver(ranks, tmp_path), 3)
    files = [file for file in path_of(tmp_path, 3).iterdir() if file.name != MANIFEST]
    assert saved.error is None and saved.step == 3
    assert saved.bytes == sum(file.stat().st_size for file in files)
    assert 0 < saved.write_s <= saved.stall_s < 60


def test_a_limit_on_the_size_of_files(ranks: Ranks, tmp_path: Path) -> None:
    """As on a full disk, each file in turn is the first that cannot be written."""
    own = saver(ranks, tmp_path)
    save(own, 3)
    before = names(tmp_path)
    sizes = sorted({file.stat().st_size for file in path_of(tmp_path, 3).iterdir()})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in sizes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
        try:
            saved = save(own, 6)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert saved.error == os.strerror(errno.EFBIG)
        assert names(tmp_path) == before and good(tmp_path) == (3, [])
    assert save(own, 6).error is None and good(tmp_path) == (6, [])


def test_a_full_disk_costs_only_the_save(ranks: Ranks, disk: Path) -> None:
    own, ballast = saver(ranks, disk / "checkpoints"), disk / "ballast"
    size = save(own, 3).bytes
    before = names(own.directory)
    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 0.9):
        with pytest.raises(OSError, match="No space"), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        os.truncate(ballast, max(0, ballast.stat().st_size - int(share * size)))
        saved = save(own, 6)
        assert saved.error == "No space left on device"
        assert names(own.directory) == before and good(own.directory) == (3, [])
    ballast.unlink()
    assert save(own, 6).error is None and good(own.directory) == (6, [])


def test_a_disk_that_turns_read_only(ranks: Ranks, disk: Path) -> None:
    own = saver(ranks, disk / "checkpoints")
    save(own, 3)
    for mode, error, newest in (("ro", "Read-only file system", 3), ("rw", None, 6)):
        subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)
        assert save(own, 6).error == error
        assert good(own.directory) == (newest, [])


def test_a_file_in_the_place_of_the_directory(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    own = saver(ranks, tmp_path / "checkpoints")
    assert save(own, 3).error == os.strerror(errno.EEXIST) or save(own, 3).error == os.strerror(errno.ENOTDIR)
    (tmp_path / "checkpoints").unlink()
    assert save(own, 3).error is None


@pytest.mark.parametrize("damaged", [False, True])
def test_a_kill_at_any_moment_of_a_save(ranks: Ranks, tmp_path: Path, damaged: bool) -> None:
    """damaged: the save takes the place of a damaged checkpoint of its step."""
    first = tmp_path / "first"
    save(saver(ranks, first), 0, 3, *[6] * damaged)
    if damaged:
        flip(path_of(first, 6) / WEIGHTS, 100)
    deaths, found = 0, set()
    while True:
        deaths += 1
        directory = Path(shutil.copytree(first, tmp_path / str(deaths)))
        own = saver(ranks, directory, CheckpointConfig(keep=1))

        def work(own: Saver = own) -> None:
            save(own, 6)
            own.close()

        survived = not killed_at(deaths, work)
        newest, lines = good(directory)
        assert newest in (3, 6), deaths
        assert len(lines) <= damaged
        found.add(newest)
        assert save(own, 9).error is None
        own.close()
        assert steps(directory) == [9]
        assert names(directory) == [LATEST, "step-00000009"]
        assert good(directory) == (9, [])
        shutil.rmtree(directory)
        if survived:
            break
    assert newest == 6 and found == {3, 6}
    assert deaths > 12


def model(width: int = 8, layers: int = 1) -> GPT:
    return GPT(vocabulary_size=7, sequence_length=4, layers=layers, width=width, heads=2)


def saved_models(directory: Path, *numbers: int) -> list[GPT]:
    """A checkpoint of a model of its own for each of the steps."""
    models = [model() for _ in numbers]
    contents = [({}, {name: p.detach() for name, p in one.named_parameters()}) for one in models]
    save(Saver(Snapshots(*contents), directory, SYNCHRONOUS), *numbers)  # type: ignore[arg-type]
    return models


def test_other_folders_are_passed_over(tmp_path: Path) -> None:
    saved_models(tmp_path, 3)
    (tmp_path / "step-00000009.bak").mkdir()
    (tmp_path / "step-00000012").touch()
    assert steps(tmp_path) == [3]
    assert steps(tmp_path / "absent") == []


def test_weights_are_those_of_the_step_asked_for(tmp_path: Path) -> None:
    first, second = saved_models(tmp_path, 3, 6)
    for step, source in ((3, first), (6, second), (None, second)):
        target = model()
        assert load_weights(target, tmp_path, step) == (step or 6)
        for name, parameter in target.named_parameters():
            assert torch.equal(parameter, source.get_parameter(name))
        assert target.head.weight is target.embedding.weight


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r": no checkpoint; there is none$"):
        load_weights(model(), tmp_path)
    saved_models(tmp_path, 3, 6)
    with pytest.raises(ValueError, match=r": no checkpoint of step 4; there are 3, 6$"):
        load_weights(model(), tmp_path, 4)


def test_weights_of_another_model_are_refused_and_change_nothing(tmp_path: Path) -> None:
    saved_models(tmp_path, 3)
    for other in (model(width=16), model(layers=2)):
        before = other.embedding.weight.clone()
        with pytest.raises(ValueError, match=f"{WEIGHTS}: holds another model than config.yaml says"):
            load_weights(other, tmp_path)
        assert torch.equal(other.embedding.weight, before)


def test_names_sort_as_numbers_do() -> None:
    assert path_of(Path("c"), 7).name < path_of(Path("c"), 10).name < path_of(Path("c"), 2_000_000).name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_written_as_safetensors_has_them(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {"b": torch.randn(3, 5).to(dtype), "a.weight": torch.randn(7).to(dtype), "c": torch.ones(1, 0)}
    with open(tmp_path / WEIGHTS, "wb") as file:
        write_weights(weights, file)
    read = load_file(tmp_path / WEIGHTS)
    assert read.keys() == weights.keys()
    assert all(read[name].dtype == weights[name].dtype for name in weights)
    assert all(torch.equal(read[name], weights[name]) for name in weights)
