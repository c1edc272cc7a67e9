"""Exact counts of a model's parameters and floating-point operations, from the shapes of its parts.

Multiplications and additions of matrix products are counted: a product with a matrix of P weights is 2 P FLOP
a token. Attention is counted as PyTorch's own counter does, with all T x T scores, though half of them may be
masked: 2 T H K a layer and token for the scores, as much for the weighted values. Norms, activations, softmax
and what a kernel or activation checkpointing recomputes are not counted (as in arXiv 2204.02311, appendix B).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from model.layers import Linear


class Countable(Protocol):
    """What every model family has. tables: the embeddings that are looked up."""

    @property
    def tables(self) -> Sequence[nn.Embedding]: ...

    def forward_flops(self, sequence_length: int, predicted_share: float = 1.0) -> int: ...


@dataclass(frozen=True)
class Counts:
    """What a model holds, and what one token of a sequence costs it.

    parameters: all of them, each once: a tied head is the token table.
    parameters_without_embeddings: without the tables that are looked up, tokens and learned positions. So an
        untied head, which is a matrix product, stays in; a tied one goes with the table that it is.
    forward_flops_per_token: the head's included, where a token is predicted.
    training_flops_per_token: three times that, as each product has two of its size in the backward.
    """

    parameters: int
    parameters_without_embeddings: int
    forward_flops_per_token: int
    training_flops_per_token: int


def linear_flops(module: nn.Module) -> int:
    """FLOP of one token through every `Linear` of a module."""
    linears = (part for part in module.modules() if isinstance(part, Linear))
    return sum(2 * linear.in_features * linear.out_features for linear in linears)


def count(model: Countable, sequence_length: int, predicted_share: float = 1.0) -> Counts:
    """Count `model`, which may be on the meta device (but not yet partitioned), for sequences of that length,
    of whose positions that share is predicted."""
    assert isinstance(model, nn.Module)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    forward = round(model.forward_flops(sequence_length, predicted_share) / sequence_length)
    return Counts(
        parameters=parameters,
        parameters_without_embeddings=parameters - sum(table.weight.numel() for table in model.tables),
        forward_flops_per_token=forward,
        training_flops_per_token=3 * forward,
    )
