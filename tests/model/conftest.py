"""Small models for the tests of `model`."""

import pytest
import torch

from model.gpt import GPT

SMALL = {"vocabulary_size": 97, "sequence_length": 32, "layers": 2, "width": 48, "heads": 4}
LLAMA = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tied": False}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small_gpt(**options: object) -> GPT:
    return GPT(**{**SMALL, **options})  # type: ignore[arg-type]
