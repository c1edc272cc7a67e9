"""Rotary positions: what turning does, and every way to stretch it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.rotary import check_scaling, rotary_table, rotate

BASE = 10000.0


def frequencies(scaling: dict[str, Any] | None, width: int = 64, base: float = BASE) -> Tensor:
    """Angles of position 1, by their sines: all are below a quarter turn."""
    return rotary_table(torch.tensor([1]), width, base, scaling)[1][0].asin()


def test_rotation_depends_only_on_the_distance() -> None:
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(query: int, key: int) -> float:
        table = rotary_table(torch.tensor([query, key]), 8, BASE)
        turned = rotate(torch.cat((q, k), dim=1), table)
        return float((turned[0, 0, 0] * turned[0, 1, 0]).sum())

    assert score(3, 1) == pytest.approx(score(12, 10), abs=1e-5)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-3)


def test_rotation_keeps_length_and_leaves_position_zero_alone() -> None:
    x = torch.randn(2, 5, 3, 8)
    turned = rotate(x, rotary_table(torch.arange(5), 8, BASE))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, 0], x[:, 0])


def test_each_sequence_may_have_its_own_positions() -> None:
    x, positions = torch.randn(2, 5, 3, 8), torch.tensor([[0, 1, 2, 0, 1], [4, 0, 1, 2, 3]])
    turned = rotate(x, rotary_table(positions, 8, BASE))
    for row in range(2):
        alone = rotate(x[row : row + 1], rotary_table(positions[row], 8, BASE))
        assert torch.equal(turned[row : row + 1], alone)


def test_rotation_of_bfloat16_is_the_rounded_rotation_of_float32() -> None:
    x = torch.randn(1, 600, 1, 8).bfloat16()
    table = rotary_table(torch.arange(600), 8, BASE)
    assert rotate(x, table).dtype == torch.bfloat16
    assert torch.equal(rotate(x, table), rotate(x.float(), table).bfloat16())


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"kind": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"kind": "yarn", "factor": 4.0, "original_length": 256}, {"rope_type": "yarn", "factor": 4.0}),
        (
            {"kind": "yarn", "factor": 16.0, "original_length": 256, "beta_fast": 16, "beta_slow": 2},
            {"rope_type": "yarn", "factor": 16.0, "beta_fast": 16, "beta_slow": 2},
        ),
        (
            {"kind": "yarn", "factor": 8.0, "original_length": 256, "attention_factor": 0.5},
            {"rope_type": "yarn", "factor": 8.0, "attention_factor": 0.5},
        ),
        (
            {"kind": "llama3", "factor": 8.0, "original_length": 256},
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        ),
        (
            {
                "kind": "llama3",
                "factor": 32.0,
                "original_length": 256,
                "low_frequency": 2.0,
                "high_frequency": 9.0,
            },
            {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 9.0},
        ),
    ],
)
def test_scaling_is_that_of_transformers(ours: dict[str, Any], theirs: dict[str, Any], base: float) -> None:
    original = {"original_max_position_embeddings": 256, "rope_theta": base}
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=1024,
        rope_parameters={**original, **theirs},
    )
    check_scaling(ours)
    their_frequencies, magnitude = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, torch.device("cpu"))
    angles = torch.arange(1024)[:, None] * their_frequencies
    cos, sin = rotary_table(torch.arange(1024), 64, base, ours)
    torch.testing.assert_close(cos, angles.cos() * magnitude, atol=2e-4, rtol=0)  # 1e-7 of 1024 radians
    torch.testing.assert_close(sin, angles.sin() * magnitude, atol=2e-4, rtol=0)
    near = rotary_table(torch.arange(2), 64, base, ours)[1][1]
    torch.testing.assert_close(near, their_frequencies.sin() * magnitude, atol=0, rtol=1e-5)


def test_ntk_keeps_the_shortest_wavelength_and_stretches_the_longest() -> None:
    plain, scaled = frequencies(None), frequencies({"kind": "ntk", "factor": 8.0})
    assert scaled[0] == plain[0]
    assert scaled[-1].item() == pytest.approx(plain[-1].item() / 8, rel=1e-5)
    as_base = frequencies(None, base=BASE * 8 ** (64 / 62))
    torch.testing.assert_close(scaled, as_base, atol=0, rtol=1e-5)


def test_yarn_grows_queries_and_keys() -> None:
    table = rotary_table(torch.arange(9), 8, BASE, {"kind": "yarn", "factor": 4.0, "original_length": 64})
    x = torch.randn(1, 9, 1, 8)
    torch.testing.assert_close(rotate(x, table).norm(dim=-1), x.norm(dim=-1) * (0.1 * math.log(4) + 1))


YARN = {"kind": "yarn", "factor": 4, "original_length": 64}


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ("yarn", "model.rotary_scaling: 'yarn' is not a mapping"),
        (
            {"factor": 2},
            "model.rotary_scaling.kind: None is not known; choose one of linear, ntk, yarn, llama3",
        ),
        ({"kind": "dynamic"}, "model.rotary_scaling.kind: 'dynamic' is not known"),
        ({"kind": "linear"}, "model.rotary_scaling.factor: is missing; linear needs it"),
        ({"kind": "linear", "factor": 0.5}, "model.rotary_scaling.factor: 0.5 is not a number at least 1"),
        ({"kind": "ntk", "factor": "2"}, "model.rotary_scaling.factor: '2' is not a number"),
        ({"kind": "ntk", "factor": 2, "beta": 1}, "model.rotary_scaling.beta: unknown key; ntk knows factor"),
        ({"kind": "yarn", "factor": 2}, "model.rotary_scaling.original_length: is missing; yarn needs it"),
        ({**YARN, "beta_slow": 40}, "model.rotary_scaling.beta_slow: 40 is not below beta_fast"),
        ({**YARN, "attention_factor": 0}, "model.rotary_scaling.attention_factor: 0 is not a number above 0"),
        (
            {**YARN, "kind": "llama3", "high_frequency": 1},
            "model.rotary_scaling.low_frequency: 1.0 is not below",
        ),
    ],
)
def test_bad_scaling_is_one_line_that_names_the_key(scaling: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as error:
        check_scaling(scaling)
    assert "\n" not in str(error.value)
