"""How long a run will take, told before it is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from launch.overrides import exactly
from launch.study import Planned, Trained, run_all
from train import hardware
from train.config import RunConfig

PROBE_STEPS = 20  # from whose last half a step's time is estimated
START_S = 8.0  # until a process makes its first step, about


@dataclass(frozen=True)
class Pace:
    """What was measured of a shape. Seconds, of one step and of one evaluation."""

    step: float
    evaluation: float

    def seconds(self, steps: int, evaluations: int) -> float:
        return START_S + steps * self.step + evaluations * self.evaluation


def device_peak(config: RunConfig) -> float | None:
    """FLOP/s of a rank on this device; None where it is not known."""
    threads = torch.get_num_threads()
    torch.set_num_threads(config.engine.threads or 1)
    peak = hardware.peak_flops(config.engine.precision)
    torch.set_num_threads(threads)
    return peak


def probe(planned: Sequence[Planned], folder: Path, console: Console, parallel: int | None) -> list[Pace]:
    """The pace of each run, by a few steps of it. Raises ValueError where a run fails or diverges in them."""
    few = [_few(one) for one in planned]
    return [_pace(one) for one in run_all(few, folder, console, parallel)]


def _few(planned: Planned) -> Planned:
    """A few steps of a run, under a schedule that fits into them, and too short to diverge."""
    whole = exactly(planned.overrides, "schedule", "constant", warmup=0)
    few = f"horizon.steps={PROBE_STEPS}", "optim.learning_rate=1e-8", f"log.every={PROBE_STEPS // 2}"
    return Planned(f"{planned.name}-probe", (*whole, *few, "evaluation.every=null", "checkpoint.every=null"))


def _pace(trained: Trained) -> Pace:
    if trained.diverged:
        raise ValueError(f"shapes: {trained.planned.name} diverges from the start: {trained.diverged}")
    half, end = trained.records("train")
    step = (end["tokens"] - half["tokens"]) / end["tokens_per_s"] / (end["step"] - half["step"])
    return Pace(step, trained.records("eval")[-1]["elapsed_s"] - end["elapsed_s"])
