"""launch.bench --only checkpoint: what a save costs follows from its seconds, on the real engine too."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from launch import bench
from launch.bench_checkpoint import (
    ASYNCHRONOUS,
    MODES,
    SYNCHRONOUS,
    Save,
    _write,
    checkpoints,
    figures,
)
from launch.bench_training import Shape
from train.engine import World, start_world, stop_world
from train.files import write_hashed

TINY = Shape("tiny", layers=2, width=32, heads=2, sequence_length=32, batch=4, vocabulary_size=300)


@pytest.fixture
def world() -> Iterator[World]:
    """A world of one, with one thread: a model this small only loses time on more."""
    world, threads = start_world(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield world
    torch.set_num_threads(threads)
    stop_world()


def test_what_a_save_cost_follows_from_its_seconds() -> None:
    sync = Save(plain=[1.0, 2.0, 9.0], beside=[], begin=5.0, settle=1.0, write=4.0, elapsed=6.0, bytes=8)
    assert (sync.stall, sync.cost, sync.slowdown) == (6.0, 6.0, None)
    quick = Save(plain=[2.0], beside=[3.0, 5.0, 2.5], begin=0.5, settle=0.5, write=9.0, elapsed=11.5, bytes=8)
    assert (quick.stall, quick.cost, quick.slowdown) == (1.0, 5.5, 2.0)
    saves = {SYNCHRONOUS: [quick, sync, sync], ASYNCHRONOUS: [sync, quick, quick]}  # the first do not count
    parts = {name: [99.0, 2.0, 4.0] for name in ("collect", "snapshot", "disk", "memory", "raw")}
    found = figures(saves, {**parts, "plain": [1.0, 2.0, 3.0], "hashed": [1.0, 4.0, 3.0]})
    assert found["saves"] == 2 and found["bytes"] == 8
    assert found["stall_relative"] == 1 / 6 and found["cost_relative"] == 5.5 / 6
    assert found[ASYNCHRONOUS]["cost_share"] == 5.5 / 60
    assert found["hashing_relative"] == 1.5  # of 2, 1
    assert found["write_bytes_per_s"]["raw"] == 8 / 3
    assert found["read_s_per_byte"]["disk"] == 3 / 8


def test_saves_are_measured_on_the_real_engine(world: World, tmp_path: Path) -> None:
    rounds: list[int] = []
    found = checkpoints(tmp_path, world, 3, lambda: rounds.append(1), TINY)
    assert len(rounds) == 3 and found["saves"] == 2
    assert found["bytes"] > 16 * found["parameters"]  # bf16 twice, fp32 weights and two moments
    assert found[SYNCHRONOUS]["steps_beside"] == 0 and found[SYNCHRONOUS]["slowdown"] is None
    for mode in MODES:
        assert found[mode]["stall_s"] == pytest.approx(
            found[mode]["begin_s"] + found[mode]["settle_s"], rel=0.5
        )
        assert found[mode]["write_s"] > 0
    assert all(rate > 0 for rate in found["write_bytes_per_s"].values())
    assert not list(tmp_path.iterdir())
    assert json.loads(json.dumps(found)) == found
    console = Console(file=io.StringIO(), width=140)
    for part in bench.checkpoint_parts({**found, "hashing_relative": 1.234}):
        console.print(part)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1.23" in shown and all(mode in shown for mode in MODES)
    assert f"stall {found['stall_relative']:.2f}" in shown


def test_a_save_that_fails_is_told(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(path: Path, fill: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("train.checkpoint.write_hashed", no_space)
    with pytest.raises(ValueError, match="no checkpoint could be written: No space left on device"):
        checkpoints(tmp_path, world, 2, lambda: None, TINY)


def test_a_write_without_checksums_makes_the_same_file(tmp_path: Path) -> None:
    _write(tmp_path / "plain", lambda file: file.write(b"content"))
    write_hashed(tmp_path / "hashed", lambda file: file.write(b"content"))
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "hashed").read_bytes() == b"content"
