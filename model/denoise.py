"""What a T5 writes about an input, and what a BERT puts in the place of masked tokens."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model.bert import BERT
from model.generate import check_request, sample
from model.t5 import T5


def generate_from(
    model: T5,
    inputs: Sequence[int],
    *,
    start: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    end: int | None = None,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` decoder tokens for the encoder's `inputs`.

    The decoder begins with `start`, which is not yielded; nor is `end`, after which nothing follows. At most
    the model's `target_length` tokens come. The other arguments are those of `model.generate.generate`.

    Raises ValueError with one line that begins with the argument's name for an argument that cannot be.
    """
    check_request(model.vocabulary_size, inputs, max_new_tokens, temperature, top_k, top_p)
    if len(inputs) > model.sequence_length:
        limit = f"model.sequence_length {model.sequence_length}"
        raise ValueError(f"tokens: {len(inputs)} exceed {limit}; give fewer")
    return _generate_from(model, inputs, start, max_new_tokens, temperature, top_k, top_p, seed, end)


def _generate_from(
    model: T5,
    inputs: Sequence[int],
    start: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    end: int | None,
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    was_training, device = model.training, model.embedding.weight.device
    model.eval()
    try:
        with torch.no_grad():
            encoded_1SD = model.encode(torch.tensor([list(inputs)], device=device))
        cache, token = model.new_cache(1), start
        for _ in range(min(max_new_tokens, model.target_length)):
            with torch.no_grad():
                hidden_11D = model.decode(torch.tensor([[token]], device=device), encoded_1SD, cache=cache)
                logits_V = model.head(hidden_11D)[0, 0]
            token = sample(logits_V, temperature, top_k, top_p, generator)
            if token == end:
                return
            yield token
    finally:
        model.train(was_training)


def fill(model: BERT, tokens: Sequence[int], mask_id: int) -> Tensor:
    """Probabilities [N, V] in fp32 of every token in each of the N masked places, in their order.

    Raises ValueError with one line if nothing is masked, a token is not in the vocabulary, or too many come.
    """
    check_request(model.vocabulary_size, tokens, 1, 0.0, None, None)
    tokens_1T = torch.tensor([list(tokens)], device=model.embedding.weight.device)
    if mask_id not in tokens:
        raise ValueError(f"tokens: none is the mask, {mask_id}; put it where the model is to fill in")
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits_1TV = model(tokens_1T)
    finally:
        model.train(was_training)
    return logits_1TV[tokens_1T == mask_id].float().softmax(-1)
