"""What all rules share: what they are asked for, and the checks of their settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Groups = list[dict[str, Any]]


class Rule:
    """An optimizer's settings, which build it for the parameters of a run.

    Under ZeRO a group's parameters are one flat fp32 tensor, this rank's share of them all, on which a rule
    that works element by element is right. A parameter that must be seen whole is stepped by the one rank
    that owns it, in its own shape, by the optimizer of `whole`.

    A group is {"params": [...], "weight_decay": float}, with "lr" where its peak learning rate is not the
    rule's; other entries stand in the optimizer's groups as they are.

    counters: entries of the optimizer's groups that count steps: there from the beginning, saved with a run.
    averages: weights are evaluated other than they are stepped: see `average`.
    keeps_state: the elementwise optimizer keeps tensors beside the weights.
    adam_like: it moves every element by about the learning rate, and decays apart from that, in proportion.
    matrix_scaling: how far it moves whole matrices: see the table in train.parametrization.
    eps: what is added to its denominators, where there are any.

    Args:
        learning_rate: peak learning rate, which the schedule multiplies.
        weight_decay: of matrices and embeddings only.
    """

    counters: tuple[str, ...] = ()
    averages: bool = False
    keeps_state: bool = True
    adam_like: bool = False
    matrix_scaling: str | None = None
    eps: Any = None

    def __init__(self, learning_rate: float, weight_decay: float) -> None:
        self.learning_rate = positive("learning_rate", learning_rate)
        self.weight_decay = not_negative("weight_decay", weight_decay)

    def takes_whole(self, role: str) -> bool:
        """Whether parameters of a role must be seen whole: "hidden" (matrices inside blocks), "embedding",
        "head" or "vector" (fewer than two dimensions)."""
        return False

    def __call__(self, groups: Groups, offload: bool) -> torch.optim.Optimizer:
        """The optimizer that works element by element, over all groups; those marked "whole" it never steps.
        offload: the states are in host memory."""
        raise NotImplementedError

    def whole(self, groups: Groups) -> torch.optim.Optimizer:
        """The optimizer over whole parameters."""
        raise NotImplementedError

    def optimizers(self, groups: Groups) -> list[torch.optim.Optimizer]:
        """Those of both kinds over groups of whole parameters, as on one process without an engine."""
        whole = [group for group in groups if group.get("whole")]
        others = [group for group in groups if not group.get("whole")]
        return ([self(others, False)] if others else []) + ([self.whole(whole)] if whole else [])

    def average(self, weights: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Have the weights that are stepped be those that are evaluated, in place. state: the optimizer's, of
        these weights; empty before the first step."""
        raise NotImplementedError

    def own(self, groups: Groups, **entries: Any) -> Groups:
        """Copies of groups, for an optimizer to write in, with a peak learning rate and `entries` where they
        have none."""
        defaults = {"lr": self.learning_rate, "weight_decay": self.weight_decay, **entries}
        return [{**defaults, **group} for group in groups]


class WholeRule(Rule):
    """A rule that must see every parameter whole."""

    def takes_whole(self, role: str) -> bool:
        return True

    def __call__(self, groups: Groups, offload: bool) -> torch.optim.Optimizer:
        """An optimizer that holds the groups and cannot be stepped."""
        return torch.optim.Optimizer(self.own(groups), {})


def positive(key: str, value: float) -> float:
    """Raises ValueError unless value > 0."""
    if not value > 0:
        raise ValueError(f"optim.{key}: {value} is not positive; give a number above 0")
    return float(value)


def not_negative(key: str, value: float) -> float:
    """Raises ValueError unless value >= 0."""
    if not value >= 0:
        raise ValueError(f"optim.{key}: {value} is negative; give 0 or more")
    return float(value)


def share(key: str, value: float) -> float:
    """Raises ValueError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise ValueError(f"optim.{key}: {value} is not a number from 0 to below 1; give one")
    return float(value)


def shares(key: str, values: Sequence[float]) -> tuple[float, float]:
    """Raises ValueError unless there are two values, 0 <= value < 1 each."""
    if len(values) != 2 or not all(0 <= value < 1 for value in values):
        raise ValueError(f"optim.{key}: {list(values)} are not two numbers from 0 to below 1; give two")
    return float(values[0]), float(values[1])


def at_least_one(key: str, value: int) -> int:
    """Raises ValueError unless value >= 1."""
    if value < 1:
        raise ValueError(f"optim.{key}: {value} is below 1; give 1 or more")
    return value
