"""Evaluation against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from train.eval.evaluate import evaluate, unigram_loss
from train.objective.base import AUXILIARY


def score(batch: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Batches are (nats, tokens, and what else was seen)."""
    nats, tokens, *counts = batch
    return torch.tensor(nats), torch.tensor(tokens), {"seen": torch.tensor(counts[0])} if counts else {}


def and_others(*others: float) -> Any:
    """The sum in a world where the other ranks have added up `others`, by default nothing."""
    return lambda *values: [float(v) + o for v, o in zip(values, others or [0.0] * len(values), strict=True)]


def test_the_numbers_of_one_rank() -> None:
    result = evaluate(score, and_others(), [(6.0, 4), (2.0, 1), (0.0, 0)], text_bytes=16, predicts_text=True)
    assert result.loss == pytest.approx(8 / 5)  # not (6/4 + 2/1) / 2: each token weighs the same
    assert result.perplexity == pytest.approx(math.exp(1.6))
    assert result.bits_per_byte == pytest.approx(8 / math.log(2) / 16)
    assert (result.tokens_evaluated, result.bytes_evaluated) == (5, 16)


def test_the_numbers_of_several_ranks() -> None:
    result = evaluate(score, and_others(12.0, 3), [(8.0, 5)], text_bytes=10, predicts_text=True)
    assert result.loss == pytest.approx(20 / 8)
    assert result.bits_per_byte == pytest.approx(20 / math.log(2) / 10)
    assert result.tokens_evaluated == 8


def test_a_hopeless_loss_has_no_finite_perplexity() -> None:
    result = evaluate(score, and_others(), [(1e6, 1)], text_bytes=1, predicts_text=True)
    assert result.loss == 1e6 and result.perplexity == math.inf


def test_many_small_losses_are_not_lost() -> None:
    """Added up in fp32, 1e-3 onto 1e5 would be lost in part."""
    batches = [(1e5, 1), *[(1e-3, 1)] * 1000]
    result = evaluate(score, and_others(), batches, text_bytes=1, predicts_text=True)
    assert result.loss * 1001 == pytest.approx(1e5 + 1, abs=1e-4)


def test_labels_that_are_not_the_text_have_no_bits_per_byte() -> None:
    batches = [(6.0, 4, 3), (2.0, 1, 2)]
    result = evaluate(score, and_others(0.0, 0.0, 5.0), batches, text_bytes=16, predicts_text=False)
    assert result.bits_per_byte is None
    assert result.loss == pytest.approx(8 / 5)
    assert result.metrics == {"seen": 10.0}


def test_what_is_trained_on_beside_the_labels_is_not_their_loss() -> None:
    def with_pairs(batch: Any) -> Any:
        return torch.tensor(batch[0]), torch.tensor(batch[1]), {AUXILIARY: torch.tensor(batch[2])}

    result = evaluate(with_pairs, and_others(), [(6.0, 4, 2.0), (3.0, 1, 1.0)], 16, predicts_text=False)
    assert result.loss == pytest.approx((9 - 3) / 5)
    assert result.perplexity == pytest.approx(math.exp(6 / 5))


def test_nothing_to_predict_is_refused() -> None:
    with pytest.raises(ValueError, match="^data.validation: holds nothing"):
        evaluate(score, and_others(), [(0.0, 0)], text_bytes=1, predicts_text=True)


def test_the_unigram_loss_is_that_of_the_frequencies_seen() -> None:
    training = [{"labels": torch.tensor([[0, 0, 1], [-100, 0, 2]])}]  # 3, 1, 1 and, never seen, 0
    held_out = [{"labels": torch.tensor([[0, 3, -100]])}, {"labels": torch.tensor([[0, -100, -100]])}]
    expected = -(2 * math.log(4 / 9) + math.log(1 / 9)) / 3
    assert unigram_loss(training, held_out, vocabulary_size=4) == pytest.approx(expected)
