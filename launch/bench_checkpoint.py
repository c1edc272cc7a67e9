"""What a checkpoint costs: the loop's wait for it, synchronous and asynchronous in turn, and its checksums.

A GPT of 49 million parameters trains on random tokens and is saved as a run saves it. Every save has plain
steps just before it, which the steps beside its write are compared with. Other load falls on neighbours
alike, so that their ratio is what holds.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from launch.bench_training import LARGE, EngineLoop, Shape, build
from model.flops import count
from train.checkpoint import WEIGHTS, Saver, newest_good, write_weights
from train.config import CheckpointConfig
from train.engine import Engine, World
from train.files import BLOCK, write_hashed

SHAPE = dataclasses.replace(LARGE, name="checkpoint", batch=1)
SYNCHRONOUS, ASYNCHRONOUS = "synchronous", "asynchronous"
MODES = (SYNCHRONOUS, ASYNCHRONOUS)
RAW, PLAIN, HASHED = "raw", "plain", "hashed"
PLAIN_STEPS = 4  # before a save
INTERVAL = 60.0  # seconds of a run between two saves

Fill = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Save:
    """One save, in seconds. plain: of each step before it; beside: of each step until it was settled.

    begin, settle: the loop's wait in `Saver.save` and in `Saver.settle`. elapsed: of all, steps included.
    """

    plain: list[float]
    beside: list[float]
    begin: float
    settle: float
    write: float
    elapsed: float
    bytes: int

    @property
    def stall(self) -> float:
        return self.begin + self.settle

    @property
    def cost(self) -> float:
        """What the run took longer: the stall, and what the steps beside the write lost."""
        return self.elapsed - len(self.beside) * median(self.plain)

    @property
    def slowdown(self) -> float | None:
        """A step beside the write / a plain step; None where none was. The write ends within the last one."""
        return median(self.beside[:-1] or self.beside) / median(self.plain) if self.beside else None


class Steps:
    """Training steps on random tokens, the same ones each time."""

    def __init__(self, shape: Shape, world: World) -> None:
        model = build(shape)
        self.parameters = count(model, shape.sequence_length).parameters
        self._loop = EngineLoop(shape, model, world)
        random = np.random.default_rng(world.rank)
        size = (shape.batch // world.size, shape.sequence_length)
        tokens = torch.from_numpy(random.integers(shape.vocabulary_size, size=size))
        self._batches = [{"tokens": tokens, "labels": tokens}]
        self.done = 0

    @property
    def engine(self) -> Engine:
        return self._loop.engine

    def take(self) -> float:
        """The seconds of one step."""
        seconds = _seconds(lambda: self._loop.train_step(self.done, self._batches))
        self.done += 1
        return seconds


def checkpoints(
    folder: Path, world: World, rounds: int, advance: Callable[[], object], shape: Shape = SHAPE
) -> dict[str, Any]:
    """All figures, of files in `folder` for as long as it takes: medians over the rounds but the first.

    Each round saves once in each mode, writes the same content with and without checksums, and reads it back.
    advance: called after each round.

    Raises:
        ValueError: the files cannot be written.
    """
    steps = Steps(shape, world)
    saves: dict[str, list[Save]] = {mode: [] for mode in MODES}
    parts: dict[str, list[float]] = {}
    with TemporaryDirectory(prefix=".bench-", dir=folder) as place:
        savers = {mode: make_saver(steps.engine, Path(place, mode), mode) for mode in MODES}
        for number in range(rounds):
            for mode in MODES if number % 2 else reversed(MODES):
                saves[mode].append(one_save(steps, savers[mode]))
            measured = {
                **snapshots(steps.engine),
                **writes(steps.engine, Path(place, "written"), saves[SYNCHRONOUS][-1].bytes, number),
                **reads(Path(place, SYNCHRONOUS)),
            }
            for name, seconds in measured.items():
                parts.setdefault(name, []).append(seconds)
            advance()
        for saver in savers.values():
            saver.close()
    return {"parameters": steps.parameters, **figures(saves, parts)}


def make_saver(engine: Engine, folder: Path, mode: str) -> Saver:
    """It removes the checkpoint before, as one that keeps several does every time once it has them."""
    return Saver(engine, folder, CheckpointConfig(keep=1, asynchronous=mode == ASYNCHRONOUS))


def one_save(steps: Steps, saver: Saver) -> Save:
    """Plain steps, then a save, beside which the steps go on as the loop of a run does."""
    plain, beside = [steps.take() for _ in range(PLAIN_STEPS)], []
    start = time.perf_counter()
    saver.save(steps.done, {"step": steps.done})
    begin = time.perf_counter() - start
    while steps.engine.world.agree(not saver.finished)[0]:
        beside.append(steps.take())
    saved = saver.settle()
    elapsed = time.perf_counter() - start
    if saved.error:
        raise ValueError(f"{saver.directory}: no checkpoint could be written: {saved.error}")
    return Save(plain, beside, begin, saved.stall_s - begin, saved.write_s, elapsed, saved.bytes)


def snapshots(engine: Engine) -> dict[str, float]:
    """Seconds to collect what is saved, as it stands in memory and as copies that later steps leave alone."""
    return {
        "collect": _seconds(lambda: engine.snapshot(False)),
        "snapshot": _seconds(lambda: engine.snapshot(True)),
    }


def writes(engine: Engine, folder: Path, size: int, first: int) -> dict[str, float]:
    """Seconds to write a checkpoint's files without checksums, with them, and as many raw bytes.

    size: of the files, in bytes. first: which of the three comes first.
    """
    contents, weights = engine.snapshot(True)
    fills: dict[str, Fill] = {name: partial(torch.save, content) for name, content in contents.items()}
    if weights is not None:
        fills[WEIGHTS] = partial(write_weights, weights)
    block = np.random.default_rng(0).bytes(BLOCK)
    blocks = [block] * (size // BLOCK) + [block[: size % BLOCK]]
    ways: list[tuple[str, Callable[[Path, Fill], object], dict[str, Fill]]] = [
        (PLAIN, _write, fills),
        (HASHED, write_hashed, fills),
        (RAW, _write, {"blocks": lambda file: file.writelines(blocks)}),
    ]
    seconds = {}
    for turn in range(len(ways)):
        name, write, files = ways[(first + turn) % len(ways)]
        folder.mkdir()
        start = time.perf_counter()
        for file, fill in files.items():
            write(folder / file, fill)
        seconds[name] = time.perf_counter() - start
        shutil.rmtree(folder)
    return seconds


def reads(directory: Path) -> dict[str, float]:
    """Seconds to find the newest whole checkpoint: from the disk, and where the files are still in memory."""
    for path in directory.glob("*/*"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {
        "disk": _seconds(lambda: newest_good(directory, print)),
        "memory": _seconds(lambda: newest_good(directory, print)),
    }


def figures(saves: dict[str, list[Save]], parts: dict[str, list[float]]) -> dict[str, Any]:
    """What follows from all rounds, of which the first, that allocates, does not count."""
    counted = {mode: saves[mode][1:] for mode in MODES}
    size = counted[SYNCHRONOUS][-1].bytes
    pairs = list(zip(counted[SYNCHRONOUS], counted[ASYNCHRONOUS], strict=True))
    middle = {name: median(seconds[1:]) for name, seconds in parts.items()}
    return {
        "bytes": size,
        "saves": len(pairs),
        "step_s": median(step for mode in MODES for one in counted[mode] for step in one.plain),
        **{mode: _mode(counted[mode]) for mode in MODES},
        "stall_relative": median(other.stall / sync.stall for sync, other in pairs),
        "cost_relative": median(other.cost / sync.cost for sync, other in pairs),
        "collect_s": middle["collect"],
        "snapshot_s": middle["snapshot"],
        "write_bytes_per_s": {name: size / middle[name] for name in (RAW, PLAIN, HASHED)},
        "write_bytes_per_s_best": {name: size / min(parts[name][1:]) for name in (RAW, PLAIN, HASHED)},
        "hashing_relative": _ratio(parts[HASHED], parts[PLAIN]),
        "hashing_relative_best": min(parts[HASHED][1:]) / min(parts[PLAIN][1:]),
        "raw_relative": _ratio(parts[HASHED], parts[RAW]),
        "read_s_per_byte": {name: middle[name] / size for name in ("disk", "memory")},
    }


def _mode(saves: list[Save]) -> dict[str, Any]:
    slowdowns = [one.slowdown for one in saves if one.slowdown is not None]
    cost = median(one.cost for one in saves)
    return {
        "stall_s": median(one.stall for one in saves),
        "stall_s_best": min(one.stall for one in saves),
        "begin_s": median(one.begin for one in saves),
        "settle_s": median(one.settle for one in saves),
        "write_s": median(one.write for one in saves),
        "steps_beside": median(len(one.beside) for one in saves),
        "slowdown": median(slowdowns) if slowdowns else None,
        "cost_s": cost,
        "cost_share": cost / INTERVAL,
    }


def _ratio(ones: list[float], others: list[float]) -> float:
    """The median ratio of neighbours."""
    return median(one / other for one, other in list(zip(ones, others, strict=True))[1:])


def _write(path: Path, fill: Fill) -> None:
    """`train.files.write_hashed` without the checksum."""
    with open(path, "wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())


def _seconds(work: Callable[[], object]) -> float:
    """What `work` takes; to free what it returns does not count."""
    start = time.perf_counter()
    kept = work()
    seconds = time.perf_counter() - start
    del kept
    return seconds
