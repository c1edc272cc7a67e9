"""Sampling from a causal model, token by token, with a key-value cache."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model.gpt import GPT


def generate(
    model: GPT,
    tokens: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    end_of_text: int | None = None,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` token ids that continue `tokens`.

    `end_of_text` ends the text and is not yielded. `temperature` 0 takes the likeliest token; `top_k` and
    `top_p` (arXiv 1904.09751, section 3.1) narrow the choice, and together both hold. The same seed gives the
    same tokens. Of a prompt longer than the model's `sequence_length` the end is used. Where the text
    outgrows that length, the model goes on from its last half sequence: older tokens are forgotten, and the
    cache is rebuilt once every half sequence instead of for each token.

    Raises ValueError with one line that begins with the argument's name for an argument that cannot be.
    """
    check_request(model.vocabulary_size, tokens, max_new_tokens, temperature, top_k, top_p)
    return _generate(model, list(tokens), max_new_tokens, temperature, top_k, top_p, seed, end_of_text)


def _generate(
    model: GPT,
    text: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    end_of_text: int | None,
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    was_training, device = model.training, model.embedding.weight.device
    model.eval()
    try:
        cache, new = model.new_cache(1), text[-model.sequence_length :]
        for _ in range(max_new_tokens):
            if cache[0].length + len(new) > model.sequence_length:
                cache, new = model.new_cache(1), text[-max(1, model.sequence_length // 2) :]
            with torch.no_grad():
                logits_V = model(torch.tensor([new], device=device), cache=cache)[0, -1]
            token = sample(logits_V, temperature, top_k, top_p, generator)
            if token == end_of_text:
                return
            text.append(token)
            new = [token]
            yield token
    finally:
        model.train(was_training)


def sample(
    logits_V: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    """Draw one token id from the logits of one position, on the CPU, where the generator is."""
    if temperature == 0:
        return int(logits_V.argmax())
    p_V = truncated_probabilities(logits_V.float().cpu() / temperature, top_k, top_p)
    return int(torch.multinomial(p_V, 1, generator=generator))


def truncated_probabilities(logits_V: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Probabilities [V] of the `top_k` likeliest tokens, cut to the fewest of mass `top_p`; sums to 1."""
    p_V, order_V = logits_V.softmax(-1).sort(descending=True, stable=True)
    if top_k is not None:
        p_V[top_k:] = 0
        p_V /= p_V.sum()
    if top_p is not None:
        mass_before_V = p_V.cumsum(-1) - p_V
        p_V[mass_before_V >= top_p] = 0
        p_V /= p_V.sum()
    return torch.empty_like(p_V).scatter_(-1, order_V, p_V)


def check_request(
    vocabulary_size: int,
    tokens: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    """Refuse, with one line that begins with the argument's name, what cannot be generated from or with."""
    if not tokens:
        raise ValueError("tokens: the prompt is empty; give at least one token, such as end of text")
    outside = [token for token in tokens if not 0 <= token < vocabulary_size]
    if outside:
        raise ValueError(f"tokens: {outside[0]} is not below model.vocabulary_size {vocabulary_size}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: {max_new_tokens} is not a positive integer; give one")
    if temperature < 0:
        raise ValueError(f"temperature: {temperature} is negative; give 0 for greedy or a positive number")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: {top_k} is not a positive integer; give one, or null for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: {top_p} is not above 0 and at most 1; give such a number, or null for all")
