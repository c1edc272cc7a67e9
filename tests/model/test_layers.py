import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.layers import GELU, Linear, SwiGLU, make_norm, rotary_table, rotate


def test_linear_starts_with_its_spread_and_no_bias() -> None:
    linear = Linear(200, 300, std=0.05)
    assert linear.weight.std().item() == pytest.approx(0.05, rel=0.02)
    assert not linear.bias.any()


def test_rotation_depends_only_on_the_distance() -> None:
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(query: int, key: int) -> float:
        table = rotary_table(torch.tensor([query, key]), 8, 10000.0)
        turned = rotate(torch.cat((q, k), dim=1), table)
        return float((turned[0, 0, 0] * turned[0, 1, 0]).sum())

    assert score(3, 1) == pytest.approx(score(12, 10), abs=1e-5)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-3)


def test_rotation_keeps_length_and_leaves_position_zero_alone() -> None:
    x = torch.randn(2, 5, 3, 8)
    turned = rotate(x, rotary_table(torch.arange(5), 8, 10000.0))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, 0], x[:, 0])


def test_rotation_of_bfloat16_is_the_rounded_rotation_of_float32() -> None:
    x = torch.randn(1, 600, 1, 8).bfloat16()
    table = rotary_table(torch.arange(600), 8, 10000.0)
    assert rotate(x, table).dtype == torch.bfloat16
    assert torch.equal(rotate(x, table), rotate(x.float(), table).bfloat16())


def test_feedforwards_are_their_formulas() -> None:
    x = torch.randn(3, 8)
    exact = GELU(8, 16, True, 0.5)
    nn.init.normal_(exact.expand.weight)  # wide enough for the two forms to differ
    inner = F.linear(x, exact.expand.weight)
    half = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
    torch.testing.assert_close(exact(x), F.linear(half, exact.project.weight), atol=1e-6, rtol=1e-6)
    tanh = GELU(8, 16, True, 0.5, approximate="tanh")
    tanh.load_state_dict(exact.state_dict())
    half = 0.5 * inner * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
    torch.testing.assert_close(tanh(x), F.linear(half, exact.project.weight), atol=1e-6, rtol=1e-6)
    swiglu = SwiGLU(8, 16, False, 0.02)
    gate, up = F.linear(x, swiglu.expand.weight[:16]), F.linear(x, swiglu.expand.weight[16:])
    torch.testing.assert_close(swiglu(x), F.linear(gate * gate.sigmoid() * up, swiglu.project.weight))


def test_norms() -> None:
    x = torch.randn(4, 8) * 3 + 1
    rms = make_norm("rmsnorm", 8, True)
    torch.testing.assert_close(rms(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    assert [name for name, _ in rms.named_parameters()] == ["weight"]
    layer = make_norm("layernorm", 8, False)
    torch.testing.assert_close(layer(x).mean(-1), torch.zeros(4), atol=1e-6, rtol=0)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert len(list(make_norm("layernorm", 8, True).parameters())) == 2
