"""What each parameter is to an optimizer: its role, whether it decays, whether it is stepped whole."""

from __future__ import annotations

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


def parameter_groups(model: nn.Module, rule: Rule) -> list[dict[str, Any]]:
    """The parameters that are trained, those that are stepped whole apart: matrices and embeddings decay;
    biases and gains, of one dimension, do not.

    The split of GPT-2's and GPT-3's public reimplementations, by number of dimensions. Shared parameters
    (a tied head) appear once.
    """
    found: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = rule.takes_whole(role(model, name, parameter)), parameter.dim() < 2
            found.setdefault(kind, []).append(parameter)
    return [
        {"params": found[whole, flat], "weight_decay": 0.0 if flat else rule.weight_decay}
        | ({"whole": True} if whole else {})
        for whole, flat in sorted(found)
    ]
