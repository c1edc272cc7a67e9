"""The sizes of a study: what of `model` tells them apart, and what each counts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from launch.overrides import spelled
from launch.study import Planned
from model.flops import Counts, count, linear_flops
from model.heads import LMHead
from train.start import build_model


@dataclass(frozen=True)
class Shape:
    """A size. settings: keys of `model`. columns: of its counts, as the table of points has them."""

    settings: dict[str, Any]
    counts: Counts
    columns: dict[str, float]

    def __str__(self) -> str:
        return spelled(self.settings)

    @property
    def overrides(self) -> tuple[str, ...]:
        return tuple(f"model.{key}={spelled(value)}" for key, value in self.settings.items())


def shapes_of(
    given: Sequence[dict[str, Any]], typed: Sequence[str], vocabulary: int, predicted: float
) -> list[Shape]:
    """From the smallest to the largest. typed: the overrides of every run. predicted: share of positions.

    Raises ValueError where one is none, or two are of one size.
    """
    found: dict[int, Shape] = {}
    for settings in given:
        shape = _shape(settings, typed, vocabulary, predicted)
        size = shape.counts.parameters
        if size in found:
            raise ValueError(
                f"shapes: {found[size]} and {shape} are both of {size:,} parameters; give shapes of"
                " different sizes"
            )
        found[size] = shape
    return [found[size] for size in sorted(found)]


def _shape(settings: dict[str, Any], typed: Sequence[str], vocabulary: int, predicted: float) -> Shape:
    bare = Shape(settings, Counts(0, 0, 0, 0), {})
    try:
        config = Planned("shape", (*typed, *bare.overrides)).config()
        with torch.device("meta"):
            model = build_model(config, vocabulary)
    except ValueError as error:
        raise ValueError(f"shapes: {bare}: {error}") from None
    counts = count(model, config.sequence_length, predicted)  # type: ignore[arg-type]
    return Shape(settings, counts, columns_of(model, counts, predicted))


def columns_of(model: nn.Module, counts: Counts, predicted: float = 1.0) -> dict[str, float]:
    """What the conventions of counting parameters and FLOP differ in.

    all_parameters: each once. body_parameters: without tables and head. head_parameters: of the head's
    matrix, tied or not, times the share of positions that is predicted. attention_flops_per_token: what is
    left of the training FLOP when the products with matrices are taken away. Of a decoder alone: in other
    families a token does not pass through every matrix.
    """
    columns: dict[str, float] = {
        "all_parameters": counts.parameters,
        "parameters_without_embeddings": counts.parameters_without_embeddings,
    }
    if getattr(model, "family", None) != "decoder":
        return columns
    head = next(module for module in model.modules() if isinstance(module, LMHead))
    inside = 0 if head.tied else head.weight.numel()
    matrix = round(head.weight.numel() * predicted)
    return columns | {
        "body_parameters": counts.parameters_without_embeddings - inside,
        "head_parameters": matrix,
        "attention_flops_per_token": counts.training_flops_per_token - 3 * linear_flops(model) - 6 * matrix,
    }


def scientific(number: float) -> str:
    """2.4e+09 -> "2.4e9"."""
    return re.sub(r"e\+0*", "e", f"{number:.3g}")


def short(number: float) -> str:
    """147456 -> "147k"."""
    for power, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= power:
            return f"{number / power:.3g}{unit}"
    return f"{number:.3g}"
