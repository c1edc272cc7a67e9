from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import ACTIVATIONS, GATED, Linear, make_norm

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "swiglu": lambda x: x * x.sigmoid(),
}
FORMULAS |= {"geglu": FORMULAS["gelu"], "geglu_tanh": FORMULAS["gelu_tanh"]}


def test_linear_starts_with_its_spread_and_no_bias() -> None:
    linear = Linear(200, 300, std=0.05)
    assert linear.weight.std().item() == pytest.approx(0.05, rel=0.02)
    assert not linear.bias.any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_feedforwards_are_their_formulas(name: str, bias: bool) -> None:
    x, feedforward = torch.randn(3, 8), ACTIVATIONS[name](8, 16, bias, 0.5)
    for parameter in feedforward.parameters():
        nn.init.normal_(parameter)  # wide enough for the two forms of GELU to differ
    assert (feedforward.expand.bias is not None) == bias
    inner = F.linear(x, feedforward.expand.weight, feedforward.expand.bias)
    gate, up = (inner[:, :16], inner[:, 16:]) if name in GATED else (inner, 1)
    expected = F.linear(FORMULAS[name](gate) * up, feedforward.project.weight, feedforward.project.bias)
    torch.testing.assert_close(feedforward(x), expected, atol=1e-5, rtol=1e-5)


def test_a_feedforward_adds_little_to_the_residual_at_first() -> None:
    for make in ACTIVATIONS.values():
        feedforward = make(100, 400, True, 0.003)
        assert feedforward.expand.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert feedforward.project.weight.std().item() == pytest.approx(0.003, rel=0.02)


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_norms(eps: float) -> None:
    x = torch.randn(4, 8) * 3 + 1
    rms = make_norm("rmsnorm", 8, True, eps)
    torch.testing.assert_close(rms(x), x / (x.square().mean(-1, keepdim=True) + eps).sqrt())
    assert [name for name, _ in rms.named_parameters()] == ["weight"]
    layer = make_norm("layernorm", 8, False, eps)
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(layer(x), centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt())
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert len(list(make_norm("layernorm", 8, True).parameters())) == 2
