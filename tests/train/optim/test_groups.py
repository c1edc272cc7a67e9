"""Which parameters decay."""

from __future__ import annotations

import pytest
import torch

from model.gpt import GPT
from train.optim.adamw import AdamW
from train.optim.groups import parameter_groups


def gpt(**arguments: object) -> GPT:
    return GPT(vocabulary_size=7, sequence_length=4, layers=2, width=8, heads=2, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_every_parameter_stands_in_one_group_once(tied: bool, bias: bool) -> None:
    model = gpt(tied=tied, bias=bias)
    grouped = [id(p) for group in parameter_groups(model, AdamW(1e-3)) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters()}


def test_matrices_decay_and_vectors_do_not() -> None:
    model = gpt()
    decayed, others = parameter_groups(model, AdamW(1e-3))
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in others["params"])
    assert not any("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in decayed["params"])
    assert any(p is model.head.weight for p in decayed["params"])


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad = False
    (group,) = parameter_groups(model, AdamW(1e-3))
    assert len(group["params"]) == 1 and group["params"][0] is model.weight
