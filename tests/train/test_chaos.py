"""Runs broken off at random moments: what `make chaos` does a hundred times, a few times."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.chaos import PHASES, STEPS, Reference, Run, batter, differences, kill, reference, stop

SEED = 0


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference(tmp_path_factory.mktemp("chaos"), zero_stage=2)


def test_a_killed_run_goes_on_bit_for_bit(unbroken: Reference) -> None:
    tally = batter(unbroken.run.folder, kill, [unbroken], count=6, seed=SEED)
    assert tally.wrong == [], f"seed {SEED}"
    assert tally.survived >= 6 and tally.phases["saving"] >= 2


def test_a_run_told_to_stop_saves_and_goes_on_bit_for_bit(unbroken: Reference) -> None:
    tally = batter(unbroken.run.folder, stop, [unbroken], count=5, seed=SEED)
    assert tally.wrong == [], f"seed {SEED}"
    assert tally.survived >= 5 and set(tally.phases) == set(PHASES)


def last(run: Run) -> Path:
    return run.checkpoints / f"step-{STEPS:08d}"


def nudge_a_weight(run: Run) -> None:
    weights = load_file(last(run) / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, last(run) / "model.safetensors")


def nudge_a_moment(run: Run) -> None:
    path = next(last(run).glob("*_rank_1_*optim_states.pt"))
    content = torch.load(path, weights_only=False)
    state = content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg"]
    state.view(-1)[-1] += 1e-6
    torch.save(content, path)


def change_lines(run: Run, change: Callable[[list[str]], list[str]]) -> None:
    path = run.directory / "metrics.jsonl"
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


def nudge_a_loss(run: Run) -> None:
    def change(lines: list[str]) -> list[str]:
        record = json.loads(lines[50])
        return [*lines[:50], json.dumps(record | {"loss": record["loss"] + 1e-12}) + "\n", *lines[51:]]

    change_lines(run, change)


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (lambda run: None, []),
        (nudge_a_weight, ["model.safetensors is damaged", "another content of model.safetensors"]),
        (nudge_a_moment, ["optim_states.pt is damaged", "another content of"]),
        (nudge_a_loss, ["another loss (train) at steps"]),
        (lambda run: change_lines(run, lambda lines: lines[:50] + lines[49:]), ["train records of steps"]),
        (lambda run: change_lines(run, lambda lines: lines[:-1]), ["not one event finish"]),
        (lambda run: shutil.rmtree(last(run)), ["the last checkpoint is that of step 95"]),
        (lambda run: (last(run) / "state.json").unlink(), ["state.json is damaged", "state.json in one of"]),
    ],
)
def test_what_is_wrong_is_found(unbroken: Reference, harm: Callable[[Run], None], found: list[str]) -> None:
    run = Run(unbroken.run.folder, "harmed", zero_stage=2)
    shutil.copytree(unbroken.run.directory, run.directory)
    harm(run)
    told = differences(run, unbroken.run)
    shutil.rmtree(run.directory)
    assert bool(told) == bool(found), told
    assert all(any(part in line for line in told) for part in found), told
