"""What a run tells: metrics.jsonl, Weights & Biases, and the terminal. Only rank 0 has a log."""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from data.loader import Loader
from train.config import RunConfig, to_container
from train.engine import Step
from train.rundir import RunDir, write


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every record of a metrics.jsonl. A last line that a killed run left half-written is passed over."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class Log:
    """The log of one run.

    Args:
        start: the step that the run goes on from; what an earlier process logged after it is dropped.
        total_steps: the horizon, for the progress bar.
    """

    def __init__(self, config: RunConfig, rundir: RunDir, start: int, total_steps: int) -> None:
        self.console = Console(highlight=False)
        self._rundir = rundir
        self.elapsed_before = self._truncate(start)
        self._file = open(rundir.metrics, "a")  # noqa: SIM115  open for the life of the run
        self._wandb = self._start_wandb(config)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tokens/s  ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._bar = self._progress.add_task("train", total=total_steps, completed=start, loss="-", rate="-")
        self._progress.start()

    def close(self, failed: bool) -> None:
        """End the progress bar, the file and the W&B run."""
        self._progress.stop()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One record: a line of metrics.jsonl, and its numbers to W&B under `kind/`."""
        record = {"kind": kind, "step": step, **values}
        self._file.write(json.dumps({k: _finite(v) for k, v in record.items()}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
            self._wandb.log(numbers, step=step)

    def advance(self, step: int) -> None:
        """Move the progress bar to `step` steps done."""
        self._progress.update(self._bar, completed=step)

    def show_train(
        self, step: int, total_steps: int, loss: float, tokens_per_s: float, seconds_left: float
    ) -> None:
        """Loss and rate in the progress bar; a line each time where there is no terminal to redraw."""
        self._progress.update(self._bar, loss=f"{loss:.4f}", rate=f"{tokens_per_s:,.0f}")
        if not self.console.is_terminal:
            self.say(
                f"step {step}/{total_steps}  loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s"
                f"  ETA {_clock(seconds_left)}"
            )

    def say(self, line: str) -> None:
        """A line for the person at the terminal, above the progress bar."""
        self.console.print(line, soft_wrap=True, markup=False)

    def summary(self) -> None:
        """The end of the run: the last evaluation beside compressors on the same text, and a sample."""
        records = read_metrics(self._rundir.metrics)
        last = {record["kind"]: record for record in records}
        if "eval" not in last or "baseline" not in last:  # the horizon was drawn in, or the file taken away
            return
        result, baseline = last["eval"], last["baseline"]
        self.say(
            f"validation loss {result['loss']:.4f} nats per token, perplexity {result['perplexity']:.2f};"
            f" unigram model {baseline['unigram_loss']:.4f}"
        )
        if result["bits_per_byte"] is not None:
            self.say(
                f"bits per byte of the held-out text: model {result['bits_per_byte']:.3f},"
                f" gzip -9 {baseline['gzip_bits_per_byte']:.3f}, xz -9 {baseline['xz_bits_per_byte']:.3f}"
            )
        if "sample" in last:
            self.say(f"sample:\n{last['sample']['prompt']}{last['sample']['text']}")
        self.say(f"run directory: {self._rundir.path}")

    def _truncate(self, start: int) -> float:
        """Drop records after step `start` (all, at the beginning); returns the training seconds up to it."""
        kept = [r for r in read_metrics(self._rundir.metrics) if start > 0 and r["step"] <= start]
        write(self._rundir.metrics, "".join(json.dumps(record) + "\n" for record in kept))
        return max((record["elapsed_s"] for record in kept if "elapsed_s" in record), default=0.0)

    def _start_wandb(self, config: RunConfig) -> Any:
        mode = config.track.wandb
        if mode == "disabled":
            return None
        import wandb

        if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
            self.say("track.wandb: online needs an API key (wandb login, or WANDB_API_KEY); going on offline")
            mode = "offline"
        identity = self._rundir.path / "wandb_id"
        if not identity.exists():
            write(identity, uuid.uuid4().hex[:8])
        settings = {
            "project": config.track.project,
            "name": config.name,
            "id": identity.read_text().strip(),
            "resume": "allow",
            "dir": self._rundir.path,
            "config": to_container(config),
            "settings": wandb.Settings(silent=True, console="off"),
        }
        try:
            return wandb.init(mode=mode, **settings)  # type: ignore[arg-type]
        except wandb.errors.Error as error:
            self.say(f"track.wandb: {mode} failed ({str(error).splitlines()[0]}); going on offline")
            return wandb.init(mode="offline", **settings)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Window:
    """The steps between two readings of a Meter: this rank's seconds and loss, the global batch's tokens.

    skipped: steps that changed nothing because fp16 overflowed. metrics: this rank's other sums.
    """

    seconds: float
    data_wait_share: float
    steps: int
    tokens: int
    count: int
    loss_sum: Tensor
    skipped: int
    metrics: dict[str, Tensor]


class Meter:
    """Adds up steps and times them, leaving out what happens while it is paused."""

    _loss_sum: Tensor | float

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._reset()

    def add(self, step: Step, tokens: int) -> None:
        """One more step, over `tokens` tokens."""
        self._steps += 1
        self._tokens += tokens
        self._count += step.count
        self._skipped += step.skipped
        self._loss_sum = self._loss_sum + step.loss_sum
        for name, value in step.metrics.items():
            self._metrics[name] = value + self._metrics.get(name, 0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here is not training."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def read(self) -> Window:
        """What has been added since the last reading."""
        seconds = time.perf_counter() - self._start
        waited = self._loader.waited_s - self._waited_s
        share = waited / seconds
        loss_sum = torch.as_tensor(self._loss_sum)
        counts = (self._steps, self._tokens, self._count)
        window = Window(seconds, share, *counts, loss_sum, self._skipped, self._metrics)
        self._reset()
        return window

    def _reset(self) -> None:
        self._start, self._waited_s = time.perf_counter(), self._loader.waited_s
        self._steps = self._tokens = self._count = self._skipped = 0
        self._loss_sum = 0.0
        self._metrics: dict[str, Tensor] = {}


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite becomes null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
