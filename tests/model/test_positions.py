"""Sinusoids and buckets of distances, against values written out."""

import math

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from model.positions import RelativeBias, Sinusoidal


def test_sinusoids_are_the_formula() -> None:
    waves = Sinusoidal(8)(torch.arange(5))
    for position in range(5):
        for pair in range(4):
            angle = position / 10000 ** (2 * pair / 8)
            assert waves[position, pair].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert waves[position, 4 + pair].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_scaled_sinusoids_start_at_one_over_the_root_of_the_width() -> None:
    plain, scaled = Sinusoidal(16), Sinusoidal(16, scaled=True)
    positions = torch.tensor([[0, 1, 2], [0, 0, 1]])
    torch.testing.assert_close(scaled(positions), plain(positions) / 4)
    assert [parameter.shape for parameter in scaled.parameters()] == [(1,)]
    assert not list(plain.parameters())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 16), (16, 1000)])
def test_buckets_are_t5s(causal: bool, buckets: int, max_distance: int) -> None:
    bias = RelativeBias(buckets, max_distance, 2, causal, std=1.0)
    after = torch.arange(-1500, 1501)
    expected = T5Attention._relative_position_bucket(
        after, bidirectional=not causal, num_buckets=buckets, max_distance=max_distance
    )
    assert torch.equal(bias.bucket(after), expected)
    assert bias.bucket(after).unique().numel() == buckets - (
        not causal
    )  # bucket of "after, by 0" stays empty


def test_causal_bias_hides_what_comes_later() -> None:
    bias = RelativeBias(8, 16, 2, causal=True, std=1.0)
    scores = bias(torch.arange(3, 6), torch.arange(6))
    hidden = torch.arange(6) > torch.arange(3, 6)[:, None]
    assert scores.shape == (1, 2, 3, 6)
    assert (scores[..., hidden] < -1e30).all()
    assert (scores[..., ~hidden].abs() < 100).all()
