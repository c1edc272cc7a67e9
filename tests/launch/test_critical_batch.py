"""Branches of a run with other batches: what they train on, and what is made of their losses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.order import Order
from launch.critical_batch import Fork, Plan, branch, critical, finding, fork_of, page, tokens_of
from tests.distributed import run_ranks
from tests.tiny import ROOT, begun, config, corpus
from tests.train.test_run import SMALL, train_all
from train.config import RunConfig, steps
from train.records import read_metrics

PARENT = [*SMALL, "schedule=constant", "schedule.warmup=0", "engine.threads=1", "checkpoint.keep=9"]
PLAN = Plan("runs/parent", [4, 8, 16], 3, 512, "sqrt", 0.01, [], 1, None)


def fork(config: RunConfig, place: int = 3, **values: Any) -> Fork:
    stage = steps(config).stage(place)
    return replace(Fork(config, 3, place, stage.global_batch, stage.sequence_length, 1e-3, None), **values)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({4: 2.0, 8: 2.005, 16: 2.009, 32: 2.02}, (16, 32)),
        ({4: 2.1, 8: 2.0, 16: 2.005, 32: math.inf}, (16, 32)),  # too small ones are no matter
        ({4: 2.0, 8: 2.02, 16: 2.005}, (4, 8)),  # where it begins
        ({4: 2.0, 8: 1.99, 16: 1.98}, (16, None)),
        ({4: 1.9, 8: 1.99, 16: 1.98}, (4, 8)),
    ],
)
def test_the_critical_batch(losses: dict[int, float], expected: tuple[int, int | None]) -> None:
    assert critical(losses, 0.01) == expected


@pytest.mark.parametrize("place", [3, 5])  # 5: the run has passed over two batches
@pytest.mark.parametrize(
    "curriculum", ["null", "{2:{global_batch:4}}", "{0:{sequence_length:16},9:{global_batch:32}}"]
)
def test_branches_go_on_where_the_run_was_and_see_the_same_samples(
    tmp_path: Path, curriculum: str, place: int
) -> None:
    parent = config(corpus(tmp_path / "text").parent, f"curriculum={curriculum}")
    start = fork(parent, place)
    plan = replace(PLAN, batches=[2, 8, 16])
    seen = []
    for batch in plan.batches:
        made = branch(start, plan, batch).config()
        for before in range(place):
            assert steps(made).span(before) == steps(parent).span(before)
            assert steps(made).stage(before)[:3] == steps(parent).stage(before)[:3]
        order = Order(1000, steps(made), made.seed)
        assert made.horizon.steps is not None
        count = made.horizon.steps - start.step
        seen.append(np.concatenate([order.step(step) for step in range(place, place + count)]))
        assert steps(made).stage(place).sequence_length == start.sequence_length
        assert count * batch * start.sequence_length == tokens_of(start, plan)
    assert all(np.array_equal(one, seen[0]) for one in seen)
    assert seen[0][0] == Order(1000, steps(parent), parent.seed).step(place)[0]


def test_a_branch_is_the_run_but_for_its_batch(tmp_path: Path) -> None:
    more = ["optim=muon", "micro_batch=4", "model.width=32", "data.source.paths=x y/*.txt", "noise.every=2"]
    parent = config(corpus(tmp_path / "text").parent, *more, "model.init_from=elsewhere")
    made = branch(fork(parent), PLAN, 16).config()
    assert made.optim == parent.optim | {"learning_rate": pytest.approx(1e-3 * math.sqrt(2))}
    assert made.model == parent.model | {"init_from": None}
    for key in ("data", "tokenizer", "objective", "packing", "seed", "sequence_length", "global_batch"):
        assert getattr(made, key) == getattr(parent, key)
    assert (made.micro_batch, made.fork.run, made.fork.step) == (4, "runs/parent", 3)
    rates = {
        rule: branch(fork(parent), replace(PLAN, scaling=rule), 4).config().optim["learning_rate"]
        for rule in ("sqrt", "linear", "none")
    }
    assert rates == pytest.approx({"sqrt": 1e-3 * math.sqrt(0.5), "linear": 5e-4, "none": 1e-3})
    more_of_it = replace(PLAN, overrides=["engine.zero_stage=1"])
    assert branch(fork(parent), more_of_it, 4).config().engine.zero_stage == 1


def test_what_is_no_plan() -> None:
    with pytest.raises(ValueError, match=r"^batches: \[8\] are not two or more"):
        replace(PLAN, batches=[8])
    with pytest.raises(ValueError, match="^scaling: cube is none of sqrt, linear, none"):
        replace(PLAN, scaling="cube")
    with pytest.raises(ValueError, match="^tolerance: 0 is not a positive number"):
        replace(PLAN, tolerance=0)


def test_batches_that_cannot_be_made(tmp_path: Path) -> None:
    parent = config(corpus(tmp_path / "text").parent, "curriculum={0:{sequence_length:8}}")
    with pytest.raises(ValueError, match="^batches: 6 sequences of 8 tokens are no whole number of 32"):
        branch(fork(parent), replace(PLAN, batches=[6, 8]), 6)
    two = config(tmp_path, "engine.ranks=2")
    with pytest.raises(ValueError, match="^batches: with 3, .* not divisible"):
        branch(fork(two), replace(PLAN, batches=[3, 8]), 3)


def test_the_whole_measurement(tmp_path: Path) -> None:
    """The branch with the run's own batch is bit for bit the run."""
    parent = begun(tmp_path, "parent", 1, *PARENT)
    run_ranks(train_all, 1, [parent])
    with pytest.raises(ValueError, match="^step: .* has no checkpoint of step 4, but of 3, 6; choose one"):
        fork_of(str(parent), 4)
    command = [sys.executable, "-m", "launch.critical_batch", f"run={parent}", "batches=[8,16]", "step=3"]
    more = ["tokens=700", "tolerance=5", "parallel=1"]
    done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "parent-critical-batch"
    results = json.loads((folder / "results.json").read_text())
    assert results["tokens"] == 1024  # the next that both batches divide
    first, second = results["branches"]
    assert [first["steps"], second["steps"]] == [4, 2]
    train = [r for r in read_metrics(parent / "metrics.jsonl") if r["kind"] == "train"]
    assert first["curve"]["loss"][:3] == [r["loss"] for r in train[3:]]
    assert first["curve"]["tokens"] == [256 * step for step in range(4, 8)]
    assert second["curve"]["tokens"] == [256 * 3 + 512 * step for step in range(1, 3)]
    assert results["critical"] == {"within": 16, "beyond": None}
    assert "The critical batch is 16 sequences (512 tokens) or larger" in done.stdout
    assert "plotly" in (folder / "report.html").read_text()


def test_what_is_said_of_losses() -> None:
    results: dict[str, Any] = {
        "settings": {"run": "runs/a", "tolerance": 0.01},
        "fork": {"step": 3, "sequence_length": 32, "noise_scale": 400.0},
        "tokens": 512,
        "critical": {"within": 8, "beyond": 16},
        "branches": [
            {"global_batch": 8, "steps": 2, "learning_rate": 1e-3, "loss": 2.0, "diverged": None},
            {"global_batch": 16, "steps": 1, "learning_rate": 1e-3, "loss": None, "diverged": "at step 4"},
        ],
    }
    for one in results["branches"]:
        one["curve"] = {"tokens": [256], "loss": [2.0]}
    said = finding(results)
    assert said.startswith(
        "The critical batch is between 8 sequences (256 tokens) and 16 sequences (512 tokens)"
    )
    assert "Smaller ones were not tried" in said and "noise scale there was 400 tokens" in said
    text = page(results)
    assert "diverged" in text and "Critical batch of runs/a at step 3" in text
