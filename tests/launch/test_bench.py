"""launch.bench: figures follow from timings, and every moment of a step has the category it belongs to."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from data.order import Order
from data.prepare import prepare
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
from launch.bench_data import (
    JUMP,
    JUMP_BATCH,
    JUMP_SAMPLES,
    _prepare_seconds,
    choice,
    jump_seconds,
    preparation,
)
from launch.bench_packing import MEANS, document_ids, packing
from launch.bench_packing import PRECISIONS as PACKING_PRECISIONS
from launch.bench_profile import BACKWARD, CATEGORIES, PREFIX, STEP, shares
from launch.bench_training import ENGINE, LARGE, PLAIN, SMALL, Shape, Timings, build
from model.flops import count
from tests.tiny import corpus
from train.engine import World, start_world, stop_world
from train.files import write_hashed

STEPS = 40
TINY = Shape("tiny", layers=2, width=32, heads=2, sequence_length=32, batch=4, vocabulary_size=300)


@pytest.fixture(autouse=True, scope="module")
def small_peaks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.bench_training.PEAK_SIZES", (64,))
        yield


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """The only one of this process: DeepSpeed cannot leave it for another."""
    world, threads = start_world(), torch.get_num_threads()
    torch.set_num_threads(1)  # a model this small only loses time on more
    yield world
    torch.set_num_threads(threads)
    stop_world()


@pytest.fixture(scope="module")
def result(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All that is measured of a tiny shape."""
    folder = tmp_path_factory.mktemp("bench")
    source = {"source": {"paths": f"{corpus(folder / 'text')}/*.txt"}, "directory": str(folder)}
    prepared = prepare(choice("data/text", source), choice("tokenizer/bytes"), progress=False)
    with Progress(console=Console(file=io.StringIO())) as progress:
        return bench.measure_shape(TINY, prepared, world, STEPS, progress)


def test_the_shapes_are_those_that_figures_are_given_for() -> None:
    assert (SMALL.tokens, LARGE.tokens) == (4096, 4096)
    with torch.device("meta"):
        per_token = [count(build(s), s.sequence_length).training_flops_per_token for s in (SMALL, LARGE)]
    # 3 passes x (2 x (12 layers width^2 + vocabulary width) + 4 layers sequence width)
    assert per_token[0] == 3 * (2 * (12 * 6 * 384**2 + 4096 * 384) + 4 * 6 * 256 * 384)
    assert per_token[1] == 3 * (2 * (12 * 6 * 768**2 + 8192 * 768) + 4 * 6 * 512 * 768)


def test_figures_follow_from_timings() -> None:
    timings = Timings(tokens=100, flops_per_token=6)
    timings.seconds = {PLAIN: [50.0, 4.0, 6.0, 9.0], ENGINE: [0.1, 2.0, 2.0, 4.5]}  # the first do not count
    timings.losses = {PLAIN: [9.0] + [2.0] * 9 + [4.0], ENGINE: [5.0] + [2.5] * 10}
    timings.peaks = {PLAIN: [100.0, 200.0, 150.0], ENGINE: [600.0, 400.0, 300.0]}
    plain, engine = timings.figures(PLAIN), timings.figures(ENGINE)
    assert (plain["step_s_median"], plain["step_s_best"]) == (6.0, 4.0)
    assert plain["tokens_per_s"] == pytest.approx(100 / 6)
    assert plain["flops_per_s"] == pytest.approx(100)
    assert plain["peak_share_median"] == pytest.approx(100 / 150)
    assert plain["peak_share_best"] == pytest.approx(150 / 200)
    assert engine["peak_share_median"] == pytest.approx(300 / 400)
    comparison = timings.comparison()
    assert comparison["speedup_median"] == 2.0  # of 2, 3, 2
    assert comparison["speedup_best"] == 2.0
    assert comparison["loss_plain"] == pytest.approx(2.2)
    assert comparison["loss_difference"] == pytest.approx(0.3)


def test_both_loops_learn_the_same(result: dict[str, Any]) -> None:
    assert result["loss_engine"] == pytest.approx(result["loss_plain"], abs=0.02)
    assert result["loss_plain"] < 5  # ln 300 = 5.704 of an untrained model
    assert result["steps"] == STEPS
    for loop in (PLAIN, ENGINE):
        assert result[loop]["tokens_per_s"] == pytest.approx(TINY.tokens / result[loop]["step_s_median"])


def test_every_part_of_a_real_step_shows(result: dict[str, Any]) -> None:
    spent = result["time_shares"]
    assert tuple(spent) == CATEGORIES
    assert sum(spent.values()) == pytest.approx(1)
    assert all(spent[part] > 0 for part in CATEGORIES)
    assert 0 <= result["data_wait_share"] < 1


def test_what_is_measured_is_shown(result: dict[str, Any]) -> None:
    console = Console(file=io.StringIO(), width=140)
    for part in bench.shape_tables(TINY, result):
        console.print(part)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for category in CATEGORIES:
        assert category in shown
    assert f"{result['speedup_median']:.2f} times as fast" in shown
    assert f"{result[ENGINE]['peak_share_median']:.1%}" in shown
    assert f"difference {result['loss_difference']:.4f}" in shown
    assert json.loads(json.dumps(result)) == result


def event(name: str, parent: Any, microseconds: float, start: int, sequence: int = -1) -> Any:
    """What a profile says of one operation."""
    return SimpleNamespace(
        name=name,
        cpu_parent=parent,
        self_cpu_time_total=microseconds,
        time_range=SimpleNamespace(start=start),
        sequence_nr=sequence,
    )


def test_operations_get_the_category_of_where_they_run() -> None:
    step = event(STEP, None, 3, 0)
    attention = event(PREFIX + "attention", step, 5, 1)
    linear = event("aten::linear", attention, 0, 2)
    node = event(BACKWARD + "BmmBackward0", step, 0, 20, sequence=8)
    weights = event(BACKWARD + "MmBackward0", step, 0, 22, sequence=7)
    optimizer = event(PREFIX + "optimizer", step, 0, 30)
    events = [
        *(step, attention, linear, node, weights, optimizer),
        event("aten::mm", linear, 20, 3, sequence=7),
        event("aten::expand", attention, 1, 4, sequence=8),
        event("aten::bmm", attention, 10, 5, sequence=8),
        event("aten::gelu", step, 7, 6, sequence=9),
        event("aten::bmm", node, 4, 21),
        event("aten::mm", weights, 40, 23),
        event(BACKWARD + "torch::autograd::AccumulateGrad", step, 2, 24),
        event("aten::mul_", optimizer, 6, 31),
        event("c10d::allreduce_", optimizer, 2, 32),
        event("aten::copy_", None, 1000, 5),  # another thread
    ]
    assert shares(events) == {
        "attention": 0.20,
        "matrices": 0.60,
        "loss": 0.0,
        "optimizer": 0.06,
        "communication": 0.02,
        "data": 0.0,
        "other": 0.12,
    }


def test_the_jump_is_one_that_an_order_can_make() -> None:
    assert 0 < jump_seconds(repeats=1) < 1
    samples = Order(JUMP_SAMPLES, JUMP_BATCH, 0).step(JUMP)
    assert len(set(samples.tolist())) == JUMP_BATCH


def test_preparation_is_measured_beside_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = iter([2.0, 3.0, 4.0])
    monkeypatch.setattr(
        "launch.bench_data._alone", lambda what, _: 4.0 if what is _prepare_seconds else next(bare)
    )
    rounds: list[int] = []
    figures = preparation(Path("unused"), 3, lambda: rounds.append(1))
    assert len(rounds) == 3
    assert figures["relative_median"] == 0.75 and figures["relative_best"] == 0.5
    assert figures["bare_bytes_per_s"] == pytest.approx(figures["bytes"] / 3)
    assert figures["bytes"] > 10**6


def test_packing_is_measured_beside_plain_steps() -> None:
    rounds: list[int] = []
    results = packing(3, lambda: rounds.append(1), (TINY,))
    assert len(rounds) == 3 * len(PACKING_PRECISIONS)
    assert [result["precision"] for result in results] == list(PACKING_PRECISIONS)
    for result in results:
        assert (result["sequence_length"], result["batch"]) == (32, 4)
        assert result["plain_s"] > 0 and list(result["ratios"]) == list(MEANS)
    assert json.loads(json.dumps(results)) == results
    console = Console(file=io.StringIO(), width=140)
    same = dict.fromkeys(MEANS, 0.876)
    console.print(
        bench.packing_table([{**results[0], "plain_s": 0.1234, "ratios": same, "ratios_best": same}])
    )
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "123" in shown and shown.count("0.88 (0.88)") == len(MEANS)


def test_packing_ratios_are_those_of_neighbouring_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"plain": [9.0, 2.0, 1.0, 4.0], **{name: [1.0, 3.0, 1.0, 4.8] for name in MEANS}}
    monkeypatch.setattr("launch.bench_packing._seconds", lambda *_: seconds)
    result = packing(4, lambda: None, (TINY,))[0]
    assert result["plain_s"] == 2.0
    assert result["ratios"] == pytest.approx(dict.fromkeys(MEANS, 1.2))  # of 1.5, 1, 1.2
    assert result["ratios_best"] == pytest.approx(dict.fromkeys(MEANS, 1.0))


@pytest.mark.parametrize("mean", [500, 25])
def test_measured_documents_have_the_length_they_are_said_to_have(mean: int) -> None:
    shape = Shape("wide", layers=1, width=32, heads=2, sequence_length=1000, batch=1000, vocabulary_size=300)
    ids = document_ids(shape, mean, np.random.default_rng(0))
    assert ids.shape == (1000, 1000) and ids.dtype == torch.int32
    assert shape.tokens / int(ids.max()) == pytest.approx(mean, rel=0.1)
    assert set(ids.flatten().diff().tolist()) == {0, 1}
    assert not document_ids(shape, None, np.random.default_rng(0)).any()


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
    found = checkpoints(tmp_path, world, 2, lambda: rounds.append(1), TINY)
    assert len(rounds) == 2 and found["saves"] == 1
    assert found["bytes"] > 16 * found["parameters"]  # bf16 twice, fp32 weights and two moments
    assert found[SYNCHRONOUS]["steps_beside"] == 0 and found[SYNCHRONOUS]["slowdown"] is None
    for mode in MODES:
        parts = found[mode]["begin_s"] + found[mode]["settle_s"]
        assert found[mode]["stall_s"] == pytest.approx(parts)
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


@pytest.mark.parametrize(
    "arguments", [["--only", "none"], ["--steps", "1"], ["--rounds", "x"], ["--unknown"]]
)
def test_a_wrong_argument_is_refused(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as exit:
        bench.main()
    assert exit.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--json", str(tmp_path / "missing" / "x.json")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--json: .*missing is not a folder"):
        bench.main()
