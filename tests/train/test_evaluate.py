"""Evaluation against numbers worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from train.eval.evaluate import evaluate


class FakeEngine:
    """A rank whose batches are (nats, tokens), in a world where other ranks have added up `others`."""

    def __init__(self, others: tuple[float, float] = (0.0, 0.0)) -> None:
        def add(*values: torch.Tensor) -> list[float]:
            return [float(value) + other for value, other in zip(values, others, strict=True)]

        self.world = SimpleNamespace(device=torch.device("cpu"), sum=add)

    def evaluate(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        nats, tokens = batch
        return torch.tensor(nats), torch.tensor(tokens)


def test_the_numbers_of_one_rank() -> None:
    result = evaluate(FakeEngine(), [(6.0, 4), (2.0, 1), (0.0, 0)], text_bytes=16)  # type: ignore[arg-type, list-item]
    assert result.loss == pytest.approx(8 / 5)  # not (6/4 + 2/1) / 2: each token weighs the same
    assert result.perplexity == pytest.approx(math.exp(1.6))
    assert result.bits_per_byte == pytest.approx(8 / math.log(2) / 16)
    assert (result.tokens_evaluated, result.bytes_evaluated) == (5, 16)


def test_the_numbers_of_several_ranks() -> None:
    result = evaluate(FakeEngine(others=(12.0, 3)), [(8.0, 5)], text_bytes=10)  # type: ignore[arg-type, list-item]
    assert result.loss == pytest.approx(20 / 8)
    assert result.bits_per_byte == pytest.approx(20 / math.log(2) / 10)
    assert result.tokens_evaluated == 8


def test_a_hopeless_loss_has_no_finite_perplexity() -> None:
    result = evaluate(FakeEngine(), [(1e6, 1)], text_bytes=1)  # type: ignore[arg-type, list-item]
    assert result.loss == 1e6 and result.perplexity == math.inf


def test_many_small_losses_are_not_lost() -> None:
    """Added up in fp32, 1e-3 onto 1e5 would be lost in part."""
    batches = [(1e5, 1), *[(1e-3, 1)] * 1000]
    result = evaluate(FakeEngine(), batches, text_bytes=1)  # type: ignore[arg-type]
    assert result.loss * 1001 == pytest.approx(1e5 + 1, abs=1e-4)
