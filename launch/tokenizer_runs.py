"""The runs of a tokenizer study: each is trained once, by `train`, in a process of its own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.config import RunConfig, differences, load, to_container
from train.ranks import start
from train.records import read_metrics
from train.rundir import COMMAND, RunDir, command
from train.start import begin


def trained(config: RunConfig, prepared: Path, steps: int, say: Callable[[str], object]) -> dict[str, Any]:
    """The figures of a run of so many steps, which is trained, or gone on with, unless it has finished.

    Raises:
        ValueError: it was trained with another config, or its objective has no bits per byte.
        SystemExit: with its exit code, where training fails or is interrupted.
    """
    rundir = RunDir(config.directory)
    if rundir.config.exists():
        keys = differences("", to_container(load(rundir.config)), to_container(config))
        if keys:
            raise ValueError(
                f"{keys[0].lstrip('.')}: differs from what {rundir.path} was trained with; undo the change,"
                " or choose another name=…"
            )
    if _result(rundir, steps) is None or rundir.prepared() != prepared.resolve():
        _train(config)
    else:
        say(f"{rundir.path}: trained before")
    result = _result(rundir, steps)
    assert result is not None
    if result["bits_per_byte"] is None:
        raise ValueError("objective: does not predict the text, so it has no bits per byte; choose causal")
    return {"seed": config.seed, "directory": config.directory, **result}


def _train(config: RunConfig) -> None:
    """Train in a process of its own, for DeepSpeed starts only once in each. Where it fails, so do we."""
    rundir = begin(config, 1)
    environment = {**os.environ, COMMAND: command()}
    rank = [sys.executable, "-m", "train.run", str(rundir.path.resolve())]
    try:
        code = start(rank, 1, environment, [rundir.lock_descriptor()], config.stop.grace)
    finally:
        rundir.unlock()
    if code:
        sys.exit(code)


def _result(rundir: RunDir, steps: int) -> dict[str, Any] | None:
    """The last evaluation of a run, and the counts of its model; None where it has not finished."""
    found = [
        record
        for record in read_metrics(rundir.metrics)
        if record["kind"] == "eval" and record["step"] == steps
    ]
    if not found or not rundir.model.exists():
        return None
    counts = json.loads(rundir.model.read_text())
    kept = ("bits_per_byte", "bytes_evaluated", "flops")
    return {key: found[-1][key] for key in kept} | {
        key: counts[key] for key in ("parameters", "parameters_without_embeddings")
    }
