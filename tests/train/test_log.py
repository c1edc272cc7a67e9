"""What a run tells, and what it tells after it was broken off."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny import config
from train.engine import Step
from train.log import Log, Meter, read_metrics
from train.rundir import RunDir


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
        meter.add(Step(torch.tensor(loss), 30, gradient_norm=1.0, skipped=False, metrics=metrics), tokens=32)
        with meter.paused():
            now.seconds += 50.0
    window = meter.read()
    assert (window.seconds, window.data_wait_share) == (4.0, 0.25)
    assert (window.steps, window.tokens, window.count, float(window.loss_sum)) == (2, 64, 60, 8.0)
    assert window.metrics == {"masked": 14}
    now.seconds += 3.0
    meter.add(Step(torch.tensor(1.0), count=5, gradient_norm=1.0, skipped=False), tokens=32)
    window = meter.read()
    assert (window.seconds, window.tokens, float(window.loss_sum)) == (3.0, 32, 1.0)


@pytest.fixture
def without_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))


@pytest.mark.usefixtures("without_account")
def test_wandb_goes_on_under_the_same_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Asked online without a key it says so and is offline; a restart finds its run again."""
    for start, mode in enumerate(("online", "offline")):
        log = opened(tmp_path, start, f"track={mode}")
        log.write("train", start + 1, loss=1.0, note="text")
        log.close(failed=False)
        said = capsys.readouterr().out
        assert ("track.wandb: online needs an API key" in said) == (mode == "online")
        assert said.count("\n") == (mode == "online")
        time.sleep(1.1)  # W&B names its folders by the second
    identity = (tmp_path / "run" / "wandb_id").read_text()
    assert len(identity) == 8
    folders = [path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert len(folders) == 2
    assert all(name.endswith(f"-{identity}") for name in folders)
    assert not list((tmp_path / "run" / "wandb").glob("run-*"))


@pytest.mark.usefixtures("without_account")
def test_wandb_switched_off_leaves_nothing(tmp_path: Path) -> None:
    opened(tmp_path, 0, "track=disabled").close(failed=False)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
