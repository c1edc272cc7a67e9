"""Exact counts of a GPT's parameters and floating-point operations, from the shapes of its parts."""

from dataclasses import dataclass

from model.gpt import GPT
from model.layers import Linear


@dataclass(frozen=True)
class Counts:
    """What a model holds, and what one token of a sequence costs it.

    parameters: all of them, each once: a tied head is the token table.
    parameters_without_embeddings: without the tables that are looked up, tokens and learned positions. So an
        untied head, which is a matrix product, stays in; a tied one goes with the table that it is.
    forward_flops_per_token: multiplications and additions of matrix products, the head's included.
    training_flops_per_token: three times that, as each product has two of its size in the backward.
    """

    parameters: int
    parameters_without_embeddings: int
    forward_flops_per_token: int
    training_flops_per_token: int


def count(model: GPT, sequence_length: int) -> Counts:
    """Count `model`, which may be on the meta device (but not yet partitioned), for sequences of that length.

    A product with a matrix of P weights is 2 P FLOP a token. Attention is counted as PyTorch's own counter
    does: all T x T scores, though half of them are masked: 2 T D a layer for the scores, 2 T D for the
    weighted values. Norms, activations, softmax and whatever a kernel or activation checkpointing recomputes
    are not counted (as in arXiv 2204.02311, appendix B).
    """
    tables = [model.embedding] if model.positions is None else [model.embedding, model.positions]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    linears = [part for part in model.modules() if isinstance(part, Linear)]
    matrices = sum(linear.in_features * linear.out_features for linear in linears)
    matrices += model.vocabulary_size * model.width  # the head
    forward = 2 * matrices + 4 * model.layers * sequence_length * model.width
    return Counts(
        parameters=parameters,
        parameters_without_embeddings=parameters - sum(table.weight.numel() for table in tables),
        forward_flops_per_token=forward,
        training_flops_per_token=3 * forward,
    )
