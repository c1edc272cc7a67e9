"""Small encoders and encoder-decoders for the tests of `model`."""

from typing import Any

import torch
from torch import Tensor, nn

from model.bert import BERT
from model.t5 import T5

SMALL: dict[str, Any] = {"vocabulary_size": 97, "sequence_length": 32, "layers": 2, "width": 48, "heads": 4}
CRAMMING: dict[str, Any] = {
    "position": "sinusoidal",
    "norm_first": True,
    "activation": "geglu",
    "bias": False,
    "segments": 0,
    "transform": False,
}
ORIGINAL: dict[str, Any] = {  # of 2017
    "position": "sinusoidal",
    "norm": "layernorm",
    "norm_first": False,
    "norm_eps": 1e-5,
    "bias": True,
    "scaled_attention": True,
    "scaled_embedding": True,
}


def small_bert(**options: Any) -> BERT:
    return BERT(**{**SMALL, **options})


def small_t5(**options: Any) -> T5:
    return T5(**{**SMALL, "head_width": 8, "decoder_layers": 3, "buckets": 8, "max_distance": 16, **options})


def spread(model: nn.Module) -> None:
    """Give every parameter values that show in the outputs."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.2)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))
