"""Counts from shapes equal what PyTorch counts while the model runs.

Attention runs as plain products here: the counter does not know SDPA's CPU kernel, and a fused kernel
recomputes its scores in the backward.
"""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import heads
from model.flops import count
from tests.model.small import LLAMA, small_gpt

VARIANTS: list[dict[str, Any]] = [
    {},
    LLAMA,
    {"kv_heads": 2},
    {"kv_heads": 1, "activation": "swiglu", "qk_norm": True},
    {"tied": False, "feedforward_width": 40, "layers": 3},
    {"head_width": 20, "activation": "relu"},
]


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("length", [32, 8])
def test_forward_is_what_the_counter_counts(options: dict[str, Any], length: int) -> None:
    model = small_gpt(**options)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(3, length, dtype=torch.int64))
    assert counter.get_total_flops() == 3 * length * count(model, length).forward_flops_per_token


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("chunk", [5, 1000])
def test_training_is_what_the_counter_counts(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], chunk: int
) -> None:
    monkeypatch.setattr(heads, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(heads, "CHUNK_TOKENS", chunk)
    model, tokens = small_gpt(**options), torch.zeros(3, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, tokens).backward()
    assert counter.get_total_flops() == 3 * 32 * count(model, 32).training_flops_per_token


def test_the_cpu_path_is_counted_too() -> None:
    model, tokens = small_gpt(kv_heads=2).bfloat16(), torch.zeros(3, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    assert counter.get_total_flops() == 3 * 32 * count(model, 32).training_flops_per_token


@pytest.mark.parametrize("options", VARIANTS)
def test_parameters_are_the_models_own(options: dict[str, Any]) -> None:
    model = small_gpt(**options)
    counts = count(model, 32)
    assert counts.parameters == sum(parameter.numel() for parameter in model.parameters())
    tables = 97 * 48 + (32 * 48 if options.get("position") != "rotary" else 0)
    assert counts.parameters - counts.parameters_without_embeddings == tables


def test_gpt2_has_twelve_width_squared_a_layer() -> None:
    """GPT-2's closed form: 12 D^2 in matrices and 13 D in vectors a layer, 2 D in the last norm."""
    counts = count(small_gpt(), 32)
    assert counts.parameters_without_embeddings == 2 * (12 * 48**2 + 13 * 48) + 2 * 48
    assert counts.forward_flops_per_token == 2 * (24 * 48**2 + 4 * 32 * 48) + 2 * 97 * 48


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_only_what_is_predicted_goes_through_the_head(share: float) -> None:
    model, tokens = small_gpt(), torch.zeros(3, 32, dtype=torch.int64)
    labels = tokens.clone()
    labels[:, round(32 * share) :] = -100
    counts = count(model, 32, share)
    assert counts.parameters == count(model, 32).parameters
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, labels).backward()
    assert counter.get_total_flops() == 3 * 32 * counts.training_flops_per_token


def test_a_share_that_is_no_whole_number_of_positions_is_rounded() -> None:
    model = small_gpt()
    assert model.forward_flops(32, 0.1) == model.forward_flops(32, 0) + 3 * 2 * 97 * 48
    assert model.family == "decoder"
    assert model.tables == [model.embedding, model.positions]
    assert small_gpt(**LLAMA).tables[1:] == []


def test_counts_need_no_memory() -> None:
    with torch.device("meta"):
        model = small_gpt()
    assert count(model, 32) == count(small_gpt(), 32)
