"""Checkpoints: whole under their name or not there at all, on disk before anything points to them.

checkpoints/step-00000100/ holds DeepSpeed's sharded state, model.safetensors (the whole weights, which need
neither DeepSpeed nor the same number of ranks to be read), state.json (what the loop goes on from) and
manifest.json (size and SHA-256 of every other file). It is written as .step-00000100, flushed to disk, then
renamed; `latest` names the newest, and moves last.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn

from data.files import sync_folder, write
from train.config import CheckpointConfig
from train.files import Entry, entry_of, write_hashed

if TYPE_CHECKING:  # what only reads checkpoints need not wait for DeepSpeed
    from train.engine import Engine

PREFIX = "step-"
WEIGHTS = "model.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"
LATEST = "latest"
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # as safetensors names them

Say = Callable[[str], None]


def steps(directory: Path) -> list[int]:
    """Steps of the checkpoints that have their name, oldest first."""
    numbers = (path.name.removeprefix(PREFIX) for path in directory.glob(f"{PREFIX}*") if path.is_dir())
    return sorted(int(number) for number in numbers if number.isdecimal())


def path_of(directory: Path, step: int) -> Path:
    return directory / f"{PREFIX}{step:08d}"


def read_state(path: Path) -> dict[str, Any]:
    """What the loop goes on from: step, layout, and more of its own."""
    return json.loads((path / STATE).read_text())


def damage(
    path: Path, passed: Callable[[int], None] = lambda count: None, only: str | None = None
) -> str | None:
    """What is wrong with a checkpoint, in one line; None where every file is as its manifest says.

    passed: is told, in several threads, how many bytes have been read since the time before. only: the one
    file whose content matters.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        entries = {name: Entry(**entry) for name, entry in manifest["files"].items()}
        written_as = path_of(path.parent, manifest["step"]).name
        there = {file.name for file in path.iterdir()} - {MANIFEST}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({_reason(error)})"
    for name in sorted(entries.keys() - there):
        return f"{name} is missing"
    for name in sorted(there - entries.keys()):
        return f"{name} is not in the manifest"
    if path.name != written_as:
        return f"{MANIFEST} is that of {written_as}"
    with ThreadPoolExecutor() as pool:
        names = entries.keys() if only is None else entries.keys() & {only}
        found = pool.map(lambda name: _difference(path / name, entries[name], passed), names)
        return next((problem for problem in found if problem), None)


def _difference(file: Path, entry: Entry, passed: Callable[[int], None]) -> str | None:
    try:
        size = file.stat().st_size
        if size != entry.bytes:
            return f"{file.name} has {size} bytes instead of {entry.bytes}"
        unlike = entry_of(file, passed) != entry
    except OSError as error:
        return f"{file.name} cannot be read ({_reason(error)})"
    return f"{file.name} is not what was written (its checksum)" if unlike else None


def pointed_to(directory: Path) -> int | str | None:
    """The step that the pointer names; None without a pointer; where it names none of them, one line."""
    pointer = directory / LATEST
    try:
        name = pointer.read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{pointer}: cannot be read ({_reason(error)})"
    named = [step for step in steps(directory) if path_of(directory, step).name == name]
    shown = ascii(name[:40]) if name else "nothing"
    return named[0] if named else f"{pointer}: points to {shown}, which is not there"


def newest_good(directory: Path, say: Say, check: Callable[[Path], str | None] = damage) -> int | None:
    """The step of the newest checkpoint that is whole; None where there is none.

    say: is told in one line of each that is passed over, and of a pointer to nothing.

    Raises:
        ValueError: there are checkpoints, and none of them is whole.
    """
    pointed = pointed_to(directory)
    if isinstance(pointed, str):
        say(f"{pointed}; looking for the newest")
    problems = []
    for step in reversed(steps(directory)):
        problem = check(path_of(directory, step))
        if problem is None:
            return step
        problems.append(f"{path_of(directory, step)}: {problem}")
        say(f"{problems[-1]}; passed over")
    if problems:
        raise ValueError(
            f"{directory}: none of its {len(problems)} checkpoint(s) is whole ({problems[0]}); restore one,"
            " or remove them all to start over"
        )
    return None


@dataclass(frozen=True)
class Saved:
    """How the save of a step ended. error: why there is no such checkpoint; the one before stands.

    stall_s: seconds the loop waited on this rank. write_s: seconds the files took, the slowest rank's.
    """

    step: int
    error: str | None
    bytes: int
    stall_s: float
    write_s: float


@dataclass
class _Pending:
    step: int
    files: Future[tuple[dict[str, Entry], float]]
    state: dict[str, Any]
    stall_s: float


class Saver:
    """Saves an engine's checkpoints. All ranks call each method, at the same step.

    In the background, where it is asynchronous: `save` takes a snapshot and returns, `finished` says when
    this rank's files are on disk, and `settle`, once they are on all ranks, gives the checkpoint its name.
    A save that fails leaves the checkpoints there are as they were, and is told, not raised.
    """

    def __init__(self, engine: Engine, directory: Path, config: CheckpointConfig) -> None:
        self.engine, self.directory, self.config = engine, directory, config
        self.begun: int | None = None  # the step that the run went on from; those after it were damaged
        self._written: set[int] = set()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None

    @property
    def pending(self) -> bool:
        """Whether a save is under way; the same on all ranks."""
        return self._pending is not None

    @property
    def finished(self) -> bool:
        """Whether this rank has written its files of the save under way."""
        return self._pending is not None and self._pending.files.done()

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begin to save; state: what `read_state` will give. None may be under way."""
        assert self._pending is None
        start = time.perf_counter()
        aside = _aside(self.directory, step)
        problem = None
        if self.engine.world.rank == 0:
            try:
                discard(self.directory)
                aside.mkdir(parents=True)
            except OSError as error:
                problem = _reason(error)
        problem = self.engine.world.broadcast(problem)
        contents, weights = self.engine.snapshot(self.config.asynchronous)
        if problem is None:
            job = self._writer.submit(_write_files, aside, contents, weights)
        else:
            job = Future()
            job.set_exception(OSError(problem))
        self._pending = _Pending(step, job, state, 0.0)
        if not self.config.asynchronous:
            self.wait()
        self._pending.stall_s = time.perf_counter() - start

    def wait(self) -> None:
        """Until this rank has written its files of the save under way."""
        if self._pending:
            self._pending.files.exception()

    def settle(self) -> Saved:
        """Make a checkpoint of what the ranks have written, or nothing of it where one of them could not."""
        assert self._pending is not None
        start = time.perf_counter()
        step, state = self._pending.step, self._pending.state
        mine: tuple[dict[str, Entry], float, str | None]
        try:
            entries, seconds = self._pending.files.result()
            mine = entries, seconds, None
        except Exception as failure:  # no memory, too: training can go on
            mine = {}, 0.0, _reason(failure)
        gathered = self.engine.world.gather(mine)
        files = {name: entry for entries, _, _ in gathered for name, entry in entries.items()}
        error = next((problem for _, _, problem in gathered if problem), None)
        if self.engine.world.rank == 0:
            error = self._name(step, state, files, error)
        error = self.engine.world.broadcast(error)
        stall = self._pending.stall_s + time.perf_counter() - start
        self._pending = None
        size = sum(entry.bytes for entry in files.values())
        return Saved(step, error, size, stall, max(seconds for _, seconds, _ in gathered))

    def _name(
        self, step: int, state: dict[str, Any], files: dict[str, Entry], error: str | None
    ) -> str | None:
        """On rank 0: complete the checkpoint and give it its name; returns what went wrong."""
        aside, target = _aside(self.directory, step), path_of(self.directory, step)
        try:
            if error is None:
                content = json.dumps(state, indent=1) + "\n"
                files[STATE] = write_hashed(aside / STATE, lambda file: file.write(content.encode()))
                seal(aside, step, files)
                if target.exists():
                    remove(target)
                os.rename(aside, target)
                sync_folder(self.directory)
                self._written.add(step)
        except OSError as caught:
            error = _reason(caught)
        if error is not None:
            _clear(aside)
            return error
        # It is there and will be found. On a full disk the pointer waits for the room that old ones leave.
        moved = self._point_to(target.name)
        with suppress(OSError):
            self._drop_old(step)
        if not moved:
            self._writer.submit(self._point_to, target.name)
        return None

    def _point_to(self, name: str) -> bool:
        try:
            write(self.directory / LATEST, name + "\n")
        except OSError:
            return False
        return True

    def _drop_old(self, newest: int) -> None:
        """Unname what is not kept, and remove it in the writer, before what that writes next.

        Damaged ones between the step that the run went on from and the newest go; later ones are left.
        """
        there = [step for step in steps(self.directory) if step <= newest]
        whole = [step for step in there if self.begun is None or step <= self.begun or step in self._written]
        every = self.config.keep_every
        kept = {*whole[-self.config.keep :], *(step for step in whole if every and step % every == 0)}
        for step in there:
            if step not in kept:
                self._writer.submit(_clear, _unname(path_of(self.directory, step)))

    def close(self) -> None:
        self._writer.shutdown()


def seal(folder: Path, step: int, files: dict[str, Entry]) -> None:
    """Write the manifest of a checkpoint's files. Raises OSError."""
    listed = {name: dataclasses.asdict(entry) for name, entry in sorted(files.items())}
    write(folder / MANIFEST, json.dumps({"version": 1, "step": step, "files": listed}, indent=1) + "\n")


def _write_files(
    folder: Path, contents: dict[str, Any], weights: dict[str, torch.Tensor] | None
) -> tuple[dict[str, Entry], float]:
    """Write this rank's files, on disk when this returns: their entries, and the seconds it took."""
    start = time.perf_counter()
    entries = {}
    for name, content in contents.items():
        entries[name] = write_hashed(folder / name, partial(torch.save, content))
    if weights is not None:
        entries[WEIGHTS] = write_hashed(folder / WEIGHTS, partial(write_weights, weights))
    sync_folder(folder)
    return entries, time.perf_counter() - start


def write_weights(weights: dict[str, torch.Tensor], file: Any) -> None:
    """Contiguous tensors as `safetensors` writes them; its `save` copies them all first, and keeps the other
    threads of Python waiting while it does."""
    header, end = {}, 0
    for name, tensor in weights.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in weights.values():
        file.write(tensor.view(-1).view(torch.uint8).numpy())


def remove(path: Path) -> None:
    """Remove a checkpoint, its name first: one half removed is never taken for one. Raises OSError."""
    _clear(_unname(path))


def _unname(path: Path) -> Path:
    aside = path.with_name(f".{path.name}.old")
    _clear(aside)
    os.rename(path, aside)
    return aside


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # over a network, what another process reads cannot go yet


def remove_after(directory: Path, step: int) -> None:
    """Remove the checkpoints after `step`, the newest first. Raises OSError."""
    write(directory / LATEST, path_of(directory, step).name + "\n")
    for later in reversed(steps(directory)):
        if later > step:
            remove(path_of(directory, later))


def discard(directory: Path) -> None:
    """Clear away what killed processes left half written or half removed."""
    for left_over in directory.glob(f".{PREFIX}*"):
        _clear(left_over)
    for left_over in directory.glob(f".{LATEST}.*"):
        left_over.unlink(missing_ok=True)


def _aside(directory: Path, step: int) -> Path:
    return directory / f".{PREFIX}{step:08d}"


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0] if text else type(error).__name__


def load_weights(model: nn.Module, directory: Path, step: int | None = None) -> int:
    """Load the whole weights of a checkpoint (the newest, or that of `step`) into a model on any device.

    Returns the step. Raises ValueError where there is no such checkpoint, or it is damaged, or of another
    model.
    """
    found = steps(directory)
    if not found or (step is not None and step not in found):
        there = f"there are {', '.join(map(str, found))}" if found else "there is none"
        raise ValueError(f"{directory}: no checkpoint{'' if step is None else f' of step {step}'}; {there}")
    whole = partial(damage, only=WEIGHTS)
    if step is None:
        step = newest_good(directory, lambda line: print(line, file=sys.stderr), check=whole)
        assert step is not None
    elif problem := whole(path_of(directory, step)):
        raise ValueError(f"{path_of(directory, step)}: {problem}; choose another step")
    path = path_of(directory, step) / WEIGHTS
    weights = load_file(path)
    own = dict(model.named_parameters())
    if weights.keys() != own.keys() or any(weights[name].shape != own[name].shape for name in own):
        raise ValueError(f"{path}: holds another model than config.yaml says")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    return step
