"""Loss over the whole validation set, and what a model without context would lose there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from data.loader import IGNORED, Batch
from train.objective.base import AUXILIARY

Score = tuple[Tensor, Tensor, dict[str, Tensor]]  # what an objective says of a batch


@dataclass(frozen=True)
class Evaluation:
    """loss: mean nats per label. perplexity: exp(loss). bits_per_byte: all nats / ln 2 / bytes of text, None
    where the labels are not the text. metrics: the objective's other sums."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens_evaluated: int
    bytes_evaluated: int
    metrics: dict[str, float]


def evaluate(
    score: Callable[[Batch], Score],
    add_up: Callable[..., list[float]],
    batches: Iterable[Batch],
    text_bytes: int,
    predicts_text: bool,
) -> Evaluation:
    """Evaluate this rank's share of the batches and add up all ranks'. Called by all ranks.

    Args:
        score: what the objective says of one batch: sum of losses in nats, number of labels, other sums.
        add_up: each of its arguments summed over the ranks.
        batches: this rank's micro batches; as many on every rank.
        text_bytes: UTF-8 bytes of the whole text that the batches of all ranks spell.
        predicts_text: whether every token of that text is a label once.

    Raises:
        ValueError: no batch has a label.
    """
    losses = labels = torch.zeros((), dtype=torch.float64)
    metrics: dict[str, Tensor] = {}
    for batch in batches:
        loss_sum, count, counts = score(batch)
        losses, labels = losses + loss_sum.double(), labels + count
        metrics = {name: value.double() + metrics.get(name, 0) for name, value in counts.items()}
    nats, evaluated, *sums = add_up(losses, labels, *metrics.values())
    totals = dict(zip(metrics, sums, strict=True))
    nats -= totals.get(AUXILIARY, 0.0)
    if not evaluated:
        raise ValueError("data.validation: holds nothing that the objective predicts; hold out more text")
    loss = nats / evaluated
    return Evaluation(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=nats / math.log(2) / text_bytes if predicts_text else None,
        tokens_evaluated=int(evaluated),
        bytes_evaluated=text_bytes,
        metrics=totals,
    )


def unigram_loss(training: Iterable[Batch], validation: Iterable[Batch], vocabulary_size: int) -> float:
    """Mean nats per validation label under the frequencies of training labels, each counted once more than it
    occurs (add-one smoothing): what knowing nothing but how common tokens are achieves."""
    seen = _label_counts(training, vocabulary_size) + 1
    held_out = _label_counts(validation, vocabulary_size)
    return float((held_out * (seen.sum().log() - seen.log())).sum() / held_out.sum().clamp(min=1))


def _label_counts(batches: Iterable[Batch], vocabulary_size: int) -> torch.Tensor:
    """float64 [V]: how often each token is a label."""
    counts = torch.zeros(vocabulary_size, dtype=torch.float64)
    for batch in batches:
        labels = batch["labels"]
        counts += torch.bincount(labels[labels != IGNORED], minlength=vocabulary_size)
    return counts
