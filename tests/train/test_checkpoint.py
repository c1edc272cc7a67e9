"""Checkpoints in a directory: complete or not there. What they hold is tested with whole runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.gpt import GPT
from train.checkpoint import WEIGHTS, load_weights, path_of, restore, save, steps


def model(width: int = 8) -> GPT:
    return GPT(vocabulary_size=7, sequence_length=4, layers=1, width=width, heads=2)


class FakeEngine:
    """Saves one file and the weights of a model; `breaks` says where in it the process dies."""

    def __init__(self, module: GPT, breaks: bool = False) -> None:
        self.module, self.breaks = module, breaks
        self.world = SimpleNamespace(rank=0, barrier=lambda: None, broadcast=lambda value: value)

    def save(self, directory: Path, tag: str, state: dict[str, Any]) -> dict[str, Tensor]:
        (directory / tag).mkdir(parents=True)
        (directory / tag / "shard.pt").write_text(str(state["step"]))
        if self.breaks:
            raise KeyboardInterrupt
        return {name: parameter.detach() for name, parameter in self.module.named_parameters()}

    def load(self, directory: Path, tag: str) -> dict[str, Any]:
        return {"step": int((directory / tag / "shard.pt").read_text())}


def saved(directory: Path, *numbers: int, keep: int = 9) -> FakeEngine:
    engine = FakeEngine(model())
    for step in numbers:
        save(engine, directory, step, keep)  # type: ignore[arg-type]
    return engine


def test_the_newest_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 3, 6, 9, 100, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000009", "step-00000100"]
    assert steps(tmp_path) == [9, 100]
    assert steps(tmp_path / "absent") == []


def test_a_killed_save_is_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    with pytest.raises(KeyboardInterrupt):
        save(FakeEngine(model(), breaks=True), tmp_path, 6, 1)  # type: ignore[arg-type]
    assert len(list(tmp_path.iterdir())) == 2  # the other is half of step 6
    assert steps(tmp_path) == [3]
    engine = FakeEngine(model())
    assert restore(engine, tmp_path) == 3  # type: ignore[arg-type]
    assert load_weights(model(), tmp_path) == 3
    saved(tmp_path, 9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000009"]


def test_the_older_ones_go_only_when_the_new_one_is_there(tmp_path: Path) -> None:
    saved(tmp_path, 3, keep=1)
    with pytest.raises(KeyboardInterrupt):
        save(FakeEngine(model(), breaks=True), tmp_path, 6, 1)  # type: ignore[arg-type]
    assert steps(tmp_path) == [3]
    saved(tmp_path, 6, keep=1)
    assert steps(tmp_path) == [6]


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    engine = saved(tmp_path, 3)
    target = model()
    assert load_weights(target, tmp_path) == 3
    assert torch.equal(target.embedding.weight, engine.module.embedding.weight)


def test_other_folders_are_passed_over(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    (tmp_path / "step-00000009.bak").mkdir()
    (tmp_path / "step-00000012").touch()
    assert steps(tmp_path) == [3]


def test_restore_takes_the_newest_or_none(tmp_path: Path) -> None:
    engine: Any = FakeEngine(model())
    assert restore(engine, tmp_path) == 0
    saved(tmp_path, 99, 100)
    assert restore(engine, tmp_path) == 100


def test_weights_are_those_of_the_step_asked_for(tmp_path: Path) -> None:
    first, second = saved(tmp_path, 3), saved(tmp_path, 6)
    for step, engine in ((3, first), (6, second), (None, second)):
        target = model()
        assert load_weights(target, tmp_path, step) == (step or 6)
        for name, parameter in target.named_parameters():
            assert torch.equal(parameter, engine.module.get_parameter(name))
        assert target.head.weight is target.embedding.weight


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r": no checkpoint; there is none$"):
        load_weights(model(), tmp_path)
    saved(tmp_path, 3, 6)
    with pytest.raises(ValueError, match=r": no checkpoint of step 4; there are 3, 6$"):
        load_weights(model(), tmp_path, 4)


def test_weights_of_another_model_are_refused_and_change_nothing(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    deeper = GPT(vocabulary_size=7, sequence_length=4, layers=2, width=8, heads=2)
    for other in (model(width=16), deeper):
        before = other.embedding.weight.clone()
        with pytest.raises(ValueError, match=f"{WEIGHTS}: holds another model than config.yaml says"):
            load_weights(other, tmp_path)
        assert torch.equal(other.embedding.weight, before)


def test_names_sort_as_numbers_do() -> None:
    assert path_of(Path("c"), 7).name < path_of(Path("c"), 10).name < path_of(Path("c"), 2_000_000).name
