"""Loss over the whole validation set."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from train.engine import Batch, Engine


@dataclass(frozen=True)
class Evaluation:
    """loss: mean nats per token. perplexity: exp(loss). bits_per_byte: all nats / ln 2 / bytes of text."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens_evaluated: int
    bytes_evaluated: int


def evaluate(engine: Engine, batches: Iterable[Batch], text_bytes: int) -> Evaluation:
    """Evaluate this rank's share of the batches and add up all ranks'. Called by all ranks.

    Args:
        batches: this rank's micro batches; as many on every rank.
        text_bytes: UTF-8 bytes of the whole text that the batches of all ranks spell.
    """
    losses = torch.zeros((), dtype=torch.float64, device=engine.world.device)
    tokens = torch.zeros((), dtype=torch.float64, device=engine.world.device)
    for batch in batches:
        loss_sum, count = engine.evaluate(batch)
        losses += loss_sum
        tokens += count
    nats, evaluated = engine.world.sum(losses, tokens)
    loss = nats / evaluated
    return Evaluation(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=nats / math.log(2) / text_bytes,
        tokens_evaluated=int(evaluated),
        bytes_evaluated=text_bytes,
    )
