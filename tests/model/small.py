"""Small models for the tests of `model`."""

from typing import Any

from model.gpt import GPT

SMALL: dict[str, Any] = {"vocabulary_size": 97, "sequence_length": 32, "layers": 2, "width": 48, "heads": 4}
LLAMA: dict[str, Any] = {
    "position": "rotary",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "tied": False,
}


def small_gpt(**options: Any) -> GPT:
    return GPT(**{**SMALL, **options})
