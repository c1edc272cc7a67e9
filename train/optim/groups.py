"""What each parameter is to an optimizer: its role, whether it decays, whether it is stepped whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from train.optim.base import Rule


def role(module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    """Of a model's parameter, by its name in it: "vector" (biases, gains: fewer than two dimensions),
    "embedding" (looked up: tokens, positions, segments, relative positions; a tied head, too), "head" (to the
    classes that are predicted) or "hidden", the matrices between."""
    if parameter.dim() < 2:
        return "vector"
    holder = module.get_submodule(name.rpartition(".")[0])
    if isinstance(holder, nn.Embedding):
        return "embedding"
    return "head" if name.startswith(("head.", "pair_head.")) else "hidden"


@dataclass(frozen=True)
class Scale:
    """Factors of a rule's peak learning rate, weight decay and epsilon, for one parameter."""

    rate: float = 1.0
    decay: float = 1.0
    eps: float = 1.0


def parameter_groups(
    model: nn.Module, rule: Rule, scales: Mapping[str, Scale] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """The parameters that are trained, apart where they are stepped whole or scaled: matrices and embeddings
    decay; biases and gains, of one dimension, do not.

    The split of GPT-2's and GPT-3's public reimplementations, by number of dimensions. Shared parameters
    (a tied head) appear once. scales: by name; those left out are not scaled.
    """
    found: dict[tuple[bool, bool, Scale], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = rule.takes_whole(role(model, name, parameter))
            kind = whole, parameter.dim() < 2, scales.get(name, Scale())
            found.setdefault(kind, []).append(parameter)
    groups = []
    for (whole, flat, scale), members in sorted(found.items(), key=lambda item: item[0][:2]):
        decay = 0.0 if flat else rule.weight_decay * scale.decay
        group: dict[str, Any] = {"params": members, "weight_decay": decay}
        if scale.rate != 1.0:
            group["lr"] = rule.learning_rate * scale.rate
        if scale.eps != 1.0 and not whole and rule.eps is not None:
            group["eps"] = rule.eps * scale.eps
        groups.append(group | ({"whole": True} if whole else {}))
    return groups
