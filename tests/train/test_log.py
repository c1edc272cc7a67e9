"""What a run tells, and what it tells after it was broken off."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from tests.tiny import config
from train.engine import Step
from train.log import Log, Meter
from train.records import read_metrics
from train.rundir import RunDir
from train.track import history


def opened(folder: Path, start: int = 0, *overrides: str) -> Log:
    rundir = RunDir(folder / "run")
    rundir.path.mkdir(exist_ok=True)
    return Log(config(folder, *overrides), rundir, start, 10)


def logged(folder: Path, steps: range) -> None:
    """The records of a process that trained these steps, one second each."""
    log = opened(folder, steps.start)
    for done in range(steps.start + 1, steps.stop + 1):
        elapsed = log.elapsed_before + done - steps.start
        log.write("train", done, loss=float(done), elapsed_s=elapsed)
    log.close(failed=False)


def metrics(folder: Path) -> Path:
    return folder / "run" / "metrics.jsonl"


def test_records_come_back(tmp_path: Path) -> None:
    log = opened(tmp_path)
    log.write("sample", 3, prompt="é", text='"quoted"\nlines')
    log.write("train", 3, loss=1.5, memory_bytes=7)
    assert len(read_metrics(metrics(tmp_path))) == 2  # there before the log is closed
    log.close(failed=False)
    assert read_metrics(metrics(tmp_path)) == [
        {"kind": "sample", "step": 3, "prompt": "é", "text": '"quoted"\nlines'},
        {"kind": "train", "step": 3, "loss": 1.5, "memory_bytes": 7},
    ]
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_what_was_logged_after_the_checkpoint_is_dropped(tmp_path: Path) -> None:
    logged(tmp_path, range(0, 6))
    logged(tmp_path, range(4, 8))
    assert [record["step"] for record in read_metrics(metrics(tmp_path))] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_the_clock_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    logged(tmp_path, range(0, 6))
    logged(tmp_path, range(4, 8))
    logged(tmp_path, range(8, 9))
    assert [record["elapsed_s"] for record in read_metrics(metrics(tmp_path))] == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_half_written_last_line_is_passed_over(tmp_path: Path) -> None:
    logged(tmp_path, range(0, 3))
    with metrics(tmp_path).open("a") as file:
        file.write('{"kind": "train", "step": 4, "lo')
    assert [record["step"] for record in read_metrics(metrics(tmp_path))] == [1, 2, 3]
    logged(tmp_path, range(3, 4))
    assert [json.loads(line)["step"] for line in metrics(tmp_path).read_text().splitlines()] == [1, 2, 3, 4]


def test_a_damaged_line_takes_no_other_with_it(tmp_path: Path) -> None:
    logged(tmp_path, range(0, 4))
    first, second, *rest = metrics(tmp_path).read_text().splitlines(keepends=True)
    metrics(tmp_path).write_text(first + second[:9] + "\n" + "".join(rest))
    assert [record["step"] for record in read_metrics(metrics(tmp_path))] == [1, 3, 4]
    logged(tmp_path, range(3, 4))
    assert metrics(tmp_path).read_text().splitlines(keepends=True)[:2] == [first, rest[0]]
    assert [record["step"] for record in read_metrics(metrics(tmp_path))] == [1, 3, 4]


def test_there_is_one_record_of_a_kind_and_step(tmp_path: Path) -> None:
    """Events may repeat; what the process before wrote counts, but for what it lost."""
    log = opened(tmp_path)
    for loss in (1.0, 2.0):
        log.write("train", 4, loss=loss)
        log.write("event", 4, event="resume")
    log.write("train", 5, loss=3.0)
    log.close(failed=True)
    log = opened(tmp_path, 4)
    assert log.has("train", 4)
    assert not log.has("eval", 4) and not log.has("train", 5)
    log.write("train", 4, loss=9.0)
    log.write("train", 5, loss=4.0)
    log.close(failed=False)
    kept = [(record["kind"], record.get("loss")) for record in read_metrics(metrics(tmp_path))]
    assert kept == [("train", 1.0), ("event", None), ("event", None), ("train", 4.0)]


def test_going_back_drops_what_lies_after(tmp_path: Path) -> None:
    log = opened(tmp_path)
    log.write("baseline", 0, unigram_loss=1.0)
    for back in (2, 3, 0):
        for step in range(1, 6):
            log.write("train", step, loss=float(10 * back + step))
        log.rewind(back)
        assert [log.has("train", step) for step in range(1, 6)] == [step <= back for step in range(1, 6)]
        log.write("event", back, event="spike", to_step=back)
    log.write("train", 1, loss=0.5)
    log.close(failed=False)
    kept = [(record["kind"], record["step"]) for record in read_metrics(metrics(tmp_path))]
    assert kept == [("baseline", 0), ("event", 0), ("train", 1)]


def test_going_back_keeps_an_event_between(tmp_path: Path) -> None:
    log = opened(tmp_path)
    for kind, step in (("train", 1), ("train", 2), ("train", 3), ("event", 1), ("train", 4)):
        log.write(kind, step, event="passed_over_checkpoint")
    log.rewind(2)
    log.close(failed=False)
    kept = [(record["kind"], record["step"]) for record in read_metrics(metrics(tmp_path))]
    assert kept == [("train", 1), ("train", 2), ("event", 1)]


@contextmanager
def disk_full_after(path: Path, more: int) -> Iterator[None]:
    """No file may grow longer than this one and `more` bytes: writing what goes beyond is an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines wait in memory; the file never ends in half a line."""
    logged(tmp_path, range(0, 100))
    log = opened(tmp_path, 100)
    whole = metrics(tmp_path).read_bytes()
    with disk_full_after(metrics(tmp_path), 10):
        for step in (101, 102, 103):
            log.write("train", step, loss=float(step))
            assert metrics(tmp_path).read_bytes() == whole
        log.sync()
        assert log.has("train", 103)
        log.rewind(101)
    said = capsys.readouterr().out
    assert said.count("metrics.jsonl cannot be written (File too large): keeping 1 line in memory") == 1
    assert said.count("metrics.jsonl") == 1
    log.write("train", 102, loss=0.0)
    assert "metrics.jsonl can be written again: 2 lines made up for" in capsys.readouterr().out
    assert [record["step"] for record in read_metrics(metrics(tmp_path))] == list(range(1, 103))
    with disk_full_after(metrics(tmp_path), 10):
        log.write("train", 103, loss=0.0)
        log.close(failed=False)
    assert "metrics.jsonl: 1 line could not be written, lost" in capsys.readouterr().out
    assert metrics(tmp_path).read_bytes().endswith(b"\n")


def test_a_run_goes_on_from_a_checkpoint_on_a_full_disk(tmp_path: Path) -> None:
    logged(tmp_path, range(0, 100))
    with disk_full_after(metrics(tmp_path), -4000):
        opened(tmp_path, 90).close(failed=False)
    assert [record["step"] for record in read_metrics(metrics(tmp_path))] == list(range(1, 91))


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    metrics(tmp_path).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"metrics.jsonl: cannot be written \(Is a directory\); restore it"):
        opened(tmp_path)


def test_output_to_a_full_disk_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = opened(tmp_path)
    full = open("/dev/full", "w")  # noqa: SIM115  closing it is an error
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        log.show_train(1, 10, 1.0, 1.0, 1.0)
        log.say("x" * 100_000)
    with suppress(OSError):
        full.close()
    log.close(failed=False)


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    log = opened(tmp_path)
    log.write("train", 1, loss=math.nan, gradient_norm=math.inf, learning_rate=-math.inf, peak_share=None)
    log.close(failed=False)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    record = json.loads(metrics(tmp_path).read_text(), parse_constant=refuse)
    assert set(record.values()) == {"train", 1, None}


def test_the_summary_stands_beside_compressors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = opened(tmp_path)
    log.write("baseline", 0, gzip_bits_per_byte=2.5, xz_bits_per_byte=2.25, unigram_loss=7.5)
    log.write("eval", 3, loss=9.0, perplexity=9.0, bits_per_byte=9.0)
    log.write("eval", 6, loss=1.25, perplexity=3.49, bits_per_byte=1.875)
    log.write("sample", 6, prompt="[once]", text=" upon")
    log.summary()
    log.close(failed=False)
    said = capsys.readouterr().out
    assert "validation loss 1.2500 nats per token, perplexity 3.49; unigram model 7.5000" in said
    assert "model 1.875, gzip -9 2.500, xz -9 2.250" in said
    assert "[once] upon" in said
    assert str(tmp_path / "run") in said


def test_a_run_that_was_never_evaluated_has_no_summary(tmp_path: Path) -> None:
    log = opened(tmp_path)
    log.summary()
    log.close(failed=False)


def test_the_meter_leaves_out_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now.seconds)
    loader: Any = SimpleNamespace(waited_s=5.0)
    meter = Meter(loader)
    for loss in (3.0, 5.0):
        now.seconds += 2.0
        loader.waited_s += 0.5
        metrics = {"masked": torch.tensor(7)}
        meter.add(
            Step(torch.tensor(loss), 30, gradient_norm=1.0, skipped=False, metrics=metrics),
            tokens=32,
            flops=64,
        )
        with meter.paused():
            now.seconds += 50.0
    window = meter.read()
    assert (window.seconds, window.data_wait_share) == (4.0, 0.25)
    assert (window.steps, window.tokens, window.count, float(window.loss_sum)) == (2, 64, 60, 8.0)
    assert window.metrics == {"masked": 14}
    now.seconds += 3.0
    meter.add(Step(torch.tensor(1.0), count=5, gradient_norm=1.0, skipped=False), 32, 64)
    window = meter.read()
    assert (window.seconds, window.tokens, float(window.loss_sum)) == (3.0, 32, 1.0)


def test_the_meter_goes_on_with_the_sums_of_all_ranks() -> None:
    loader: Any = SimpleNamespace(waited_s=0.0)
    first, second = Meter(loader), Meter(loader)
    first.add(
        Step(torch.tensor(2.0), 30, 1.0, skipped=True, metrics={"masked": torch.tensor(7)}),
        tokens=32,
        flops=64,
    )
    state = json.loads(json.dumps(first.state(lambda *values: [2.0 * float(value) for value in values])))
    windows = []
    for rank in (0, 1):
        second.load_state(state, rank)
        second.add(
            Step(torch.tensor(1.0), 30, 1.0, False, metrics={"masked": torch.tensor(1)}), tokens=32, flops=64
        )
        windows.append(second.read())
    assert [(w.steps, w.tokens, w.count, w.skipped) for w in windows] == [(1, 32, 60, 1)] * 2
    assert [float(w.loss_sum) for w in windows] == [5.0, 1.0]
    assert [w.metrics for w in windows] == [{"masked": 15}, {"masked": 1}]


@pytest.fixture
def without_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))


def in_child(function: Callable[..., None], *arguments: Any) -> int:
    """The exit code of a process that calls the function: W&B starts its own once in each."""
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def trained(folder: Path, mode: str, steps: range, kill: str = "", back: int | None = None) -> None:
    """A process that trains these steps.

    kill: "all" or "W&B": this process too, after the last step, or only W&B's, ten steps before.
    back: the step to which it goes back once, from the last.
    """
    log = opened(folder, steps.start, f"track={mode}")
    log.write("event", steps.start, event="resume", tokens=0)
    again = [] if back is None else list(range(back, steps.stop))
    for done in [step + 1 for step in (*steps, *again)]:
        log.write("train", done, loss=done / 7, note="text")
        if done % 10 == 0:
            log.write("eval", done, loss=done / 9, nothing=math.nan)
        log.advance(done)
        if kill == "W&B" and done == steps.stop - 10:
            kill_wandb()
        if done == steps.stop and again:
            log.rewind(again[0])
            again = []
    if kill == "all":
        while len(rows(folder)) < 50:
            time.sleep(0.05)
        kill_wandb()
        os.kill(os.getpid(), signal.SIGKILL)
    log.write("event", steps.stop, event="finish", tokens=0)
    log.close(failed=False)


def kill_wandb() -> None:
    [core] = [one for one in psutil.Process().children() if one.name() == "wandb-core"]
    core.kill()
    core.wait(10)


def rows(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Step and numbers of all rows in W&B's files, in the order of their processes."""
    files = sorted((folder / "run" / "wandb").glob("offline-run-*/*.wandb"))
    return [
        (row.step.num, {item.nested_key[0]: json.loads(item.value_json) for item in row.item})
        for file in files
        for row in history(file)
    ]


@pytest.mark.usefixtures("without_account")
def test_wandb_gets_each_step_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever is killed, wherever the run goes back. Online without a key it says so and is offline."""
    assert in_child(trained, tmp_path, "online", range(0, 150), "all") == -signal.SIGKILL
    assert "track.wandb: online needs an API key" in capfd.readouterr().out
    reached = [step for step, _ in rows(tmp_path)]
    assert reached == list(range(len(reached))) and 50 < len(reached) < 150  # it writes in blocks

    assert in_child(trained, tmp_path, "offline", range(50, 140), "W&B") == 0
    said = capfd.readouterr().out
    assert said.count("track.wandb: log failed") == said.count("track.wandb") == 1
    assert "Traceback" not in said

    (tmp_path / "run" / "wandb.json").write_text("")  # by a power cut
    assert in_child(trained, tmp_path, "offline", range(140, 160), "", 145) == 0
    assert "track.wandb" not in capfd.readouterr().out

    found = rows(tmp_path)
    assert [step for step, _ in found] == list(range(161))
    numbers: dict[int, dict[str, float]] = {}
    for record in read_metrics(metrics(tmp_path)):
        if record["kind"] != "event":
            numbers.setdefault(record["step"], {})[f"{record['kind']}/loss"] = record["loss"]
    for step, row in found[1:]:
        assert {name: row[name] for name in row if name.endswith("/loss")} == numbers[step]
    logs = list((tmp_path / "run" / "wandb").glob("*run-*/*.wandb"))
    assert len(logs) == 3 and len({log.name for log in logs}) == 1  # the same run
    known = json.loads((tmp_path / "run" / "wandb.json").read_text())
    assert (known["step"], f"run-{known['id']}.wandb") == (160, logs[0].name)


@pytest.mark.usefixtures("without_account")
def test_wandb_leaves_an_unfinished_row_to_the_next_start(tmp_path: Path) -> None:
    """Stopped between a checkpoint and the evaluation of its step, which the next start makes up for."""

    def stopped() -> None:
        log = opened(tmp_path, 0, "track=offline")
        log.write("train", 1, loss=1.0)
        log.advance(1)
        log.write("train", 2, loss=2.0)
        log.close(failed=False)

    def gone_on() -> None:
        log = opened(tmp_path, 2, "track=offline")
        if not log.has("eval", 2):
            log.write("eval", 2, loss=3.0)
        log.advance(2)
        log.close(failed=False)

    assert in_child(stopped) == 0
    assert [step for step, _ in rows(tmp_path)] == [1]
    assert in_child(gone_on) == 0
    found = [{name: row[name] for name in row if name.endswith("/loss")} for _, row in rows(tmp_path)]
    assert found == [{"train/loss": 1.0}, {"train/loss": 2.0, "eval/loss": 3.0}]


@pytest.mark.usefixtures("without_account")
def test_wandb_switched_off_leaves_nothing(tmp_path: Path) -> None:
    opened(tmp_path, 0, "track=disabled").close(failed=False)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
