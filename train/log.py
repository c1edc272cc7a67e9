"""What a run tells: metrics.jsonl, Weights & Biases, and the terminal. Only rank 0 has a log."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any, cast

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
from train.config import RunConfig
from train.engine import Step
from train.records import Records
from train.rundir import RunDir
from train.track import Track


class Log:
    """The log of one run. Neither a full disk nor an error of W&B ends it.

    Args:
        start: the step that the run goes on from; what an earlier process logged after it is dropped.
        total_steps: the horizon, for the progress bar.

    Raises:
        ValueError: metrics.jsonl cannot be opened.
    """

    def __init__(self, config: RunConfig, rundir: RunDir, start: int, total_steps: int) -> None:
        self.console = Console(file=cast(IO[str], _Terminal()), highlight=False)
        self._rundir = rundir
        self._records = Records(rundir.metrics, start, self.say)
        records = self._records.read()
        self.elapsed_before = max((record.get("elapsed_s") or 0.0 for record in records), default=0.0)
        disabled = config.track.wandb == "disabled"
        self._track = None if disabled else Track(config, rundir.path, records, self.say)
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
        self._records.close()
        if self._track:
            self._track.close(failed)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One record: a line of metrics.jsonl, and its numbers to W&B under `kind/`.

        A second one of the same kind and step is passed over, unless it is an event.
        """
        if kind != "event" and self.has(kind, step):
            return
        record = {"kind": kind, "step": step} | {name: _finite(value) for name, value in values.items()}
        self._records.append(record)
        if self._track:
            self._track.add(record)

    def has(self, kind: str, step: int) -> bool:
        """Whether a record of this kind was written for this step, by this process or an earlier one."""
        return self._records.has(kind, step)

    def has_event(self, name: str, step: int | None = None) -> bool:
        """Whether an event of this name was written (at this step)."""
        found = [record["step"] for record in self._records.read() if record.get("event") == name]
        return bool(found) if step is None else step in found

    def sync(self) -> None:
        """Have the records on the disk: a checkpoint was completed, and nothing before it is done again."""
        self._records.sync()

    def rewind(self, step: int) -> None:
        """The run goes back to `step`: drop the records after it. W&B keeps its rows, and gets none twice."""
        self._records.rewind(step)
        if self._track:
            self._track.rewind(step)
        self._progress.update(self._bar, completed=step)

    def advance(self, step: int) -> None:
        """`step` steps are done and logged: their row goes to W&B, and the progress bar moves on."""
        if self._track:
            self._track.complete(step)
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
        last = {record["kind"]: record for record in self._records.read()}
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


@dataclass(frozen=True)
class Window:
    """The steps between two readings of a Meter: this rank's seconds and loss, the global batch's tokens.

    skipped: steps whose update was not made: fp16 overflowed, or the loss was refused. metrics: this rank's
    other sums.
    """

    seconds: float
    data_wait_share: float
    steps: int
    tokens: int
    flops: int
    count: int
    loss_sum: Tensor
    skipped: int
    metrics: dict[str, Tensor]


class Meter:
    """Adds up steps and times them, leaving out what happens while it is paused."""

    _loss_sum: Tensor | float
    _metrics: dict[str, Tensor | float]

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._reset()

    def start(self) -> None:
        """Time from now on."""
        self._start, self._waited_s = time.perf_counter(), self._loader.waited_s

    def state(self, total: Callable[..., list[float]]) -> dict[str, Any]:
        """What a checkpoint keeps of the steps since the last reading (JSON), the same on all ranks.

        total: each of its arguments summed over the ranks.
        """
        names = sorted(self._metrics)
        loss_sum, *sums = total(self._loss_sum, *(self._metrics[name] for name in names))
        metrics = dict(zip(names, sums, strict=True))
        return {"count": self._count, "skipped": self._skipped, "loss_sum": loss_sum, "metrics": metrics}

    def load_state(self, state: dict[str, Any], rank: int) -> None:
        """Begin with what `state` kept; rank 0 has the sums of all. Its seconds and tokens are gone."""
        self._reset()
        self._count, self._skipped = state["count"], state["skipped"]
        mine = 1.0 if rank == 0 else 0.0
        self._loss_sum = mine * state["loss_sum"]
        self._metrics = {name: mine * value for name, value in state["metrics"].items()}

    def add(self, step: Step, tokens: int, flops: int) -> None:
        """One more step, over `tokens` tokens, of `flops` operations on all ranks."""
        self._steps += 1
        self._tokens += tokens
        self._flops += flops
        self._count += step.count
        self._skipped += step.skipped
        # In float64 sums of a step's float32 are exact: it is all the same where they are broken off.
        self._loss_sum = self._loss_sum + step.loss_sum.double()
        for name, value in step.metrics.items():
            self._metrics[name] = value.double() + self._metrics.get(name, 0)

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
        counts = (self._steps, self._tokens, self._flops, self._count)
        metrics = {name: torch.as_tensor(value) for name, value in self._metrics.items()}
        window = Window(seconds, share, *counts, loss_sum, self._skipped, metrics)
        self._reset()
        return window

    def _reset(self) -> None:
        self.start()
        self._steps = self._tokens = self._flops = self._count = self._skipped = 0
        self._loss_sum = 0.0
        self._metrics = {}


class _Terminal:
    """Standard output, which a full disk behind it or a closed terminal does not make an error."""

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream().write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream().flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream(), name)

    def _stream(self) -> Any:
        # While there is a progress bar, rich puts something of its own in the place of sys.stdout.
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite becomes null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
