"""The chunked loss is the plain loss, with its gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import heads
from model.heads import LMHead


@pytest.fixture(params=[1, 7, 64], ids=lambda tokens: f"chunk of {tokens}")
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(heads, "CHUNK_TOKENS", request.param)


def batch(ignored: int = 5) -> tuple[Tensor, Tensor]:
    labels = torch.randint(97, (4, 8))
    labels.view(-1)[torch.randperm(32)[:ignored]] = -100
    return torch.randn(4, 8, 16, requires_grad=True), labels


def plain_loss(head: LMHead, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("ignored", [0, 5, 31])
def test_loss_and_gradients_equal_the_plain_ones(ignored: int) -> None:
    head, (hidden, labels) = LMHead(97, 16), batch(ignored)
    nn.init.normal_(head.weight)  # wide, so that some probabilities are near one
    ours, theirs = head(hidden, labels), plain_loss(head, hidden, labels)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-5)
    inputs = (hidden, head.weight)
    for mine, other in zip(
        torch.autograd.grad(ours * 0.37, inputs), torch.autograd.grad(theirs * 0.37, inputs), strict=True
    ):
        assert ((mine - other).norm() / other.norm()).item() < 1e-5


@pytest.mark.usefixtures("_chunk")
def test_all_ignored_is_zero_with_zero_gradients() -> None:
    head, (hidden, labels) = LMHead(97, 16), batch(ignored=32)
    loss = head(hidden, labels)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None and not hidden.grad.any()
    assert head.weight.grad is not None and not head.weight.grad.any()


def test_bfloat16_loss_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(heads, "CHUNK_TOKENS", 100)
    head = LMHead(97, 16).bfloat16()
    hidden = torch.randn(4, 512, 16, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(97, (4, 512))
    ours = head(hidden, labels)
    theirs = F.cross_entropy(head(hidden).float().flatten(0, 1), labels.flatten(), reduction="sum")
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-5)
    inputs = (hidden, head.weight)
    for mine, other in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True
    ):
        assert mine.dtype == torch.bfloat16
        assert ((mine - other).float().norm() / other.float().norm()).item() < 1e-2


def test_no_gradients_where_none_are_wanted() -> None:
    head, (hidden, labels) = LMHead(97, 16), batch()
    with torch.no_grad():
        loss = head(hidden, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain_loss(head, hidden, labels), atol=0, rtol=1e-5)


def test_weight_is_read_in_the_forward_only() -> None:
    """ZeRO-3 releases the weight after the forward: its values then must not matter."""
    head, (hidden, labels) = LMHead(97, 16), batch()
    expected = torch.autograd.grad(plain_loss(head, hidden, labels), hidden)[0]
    loss = head(hidden, labels)
    head.weight.data = torch.empty(0)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], expected)


def test_tied_weight_gathers_both_gradients() -> None:
    table = nn.Embedding(97, 16)
    head, tokens, labels = LMHead(97, 16, table.weight), torch.randint(97, (4, 8)), batch()[1]
    head(table(tokens), labels).backward()
    ours, table.weight.grad = table.weight.grad, None
    plain_loss(head, table(tokens), labels).backward()
    assert ours is not None and table.weight.grad is not None
    torch.testing.assert_close(ours, table.weight.grad, atol=1e-5, rtol=1e-5)


def test_fp16_gradients_of_many_tokens_do_not_overflow() -> None:
    """The sum over tokens leaves fp16's range (65,504) before the mean brings it back."""
    tokens, width = 32_768, 8
    head = LMHead(4, width).half()
    hidden_BTD = torch.full((1, tokens, width), 4.0, dtype=torch.float16, requires_grad=True)
    labels_BT = torch.zeros(1, tokens, dtype=torch.long)
    (head(hidden_BTD, labels_BT) / tokens).backward()
    logits_BTV = hidden_BTD.detach().float() @ head.weight.detach().float().T
    errors_V = logits_BTV.softmax(-1)[0, 0] - torch.tensor([1.0, 0, 0, 0])
    expected_VD = errors_V[:, None] * torch.full((width,), 4.0)
    torch.testing.assert_close(head.weight.grad.float(), expected_VD, rtol=5e-3, atol=1e-3)


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("ignored", [0, 5, 32])
def test_bias_is_in_logits_loss_and_gradients(ignored: int) -> None:
    head, (hidden, labels) = LMHead(97, 16, bias=True), batch(ignored)
    assert head.bias is not None and not head.bias.any()
    nn.init.normal_(head.bias)
    torch.testing.assert_close(head(hidden), hidden @ head.weight.T + head.bias)
    inputs = (hidden, head.weight, head.bias)
    ours = torch.autograd.grad(head(hidden, labels) * 0.37, inputs)
    theirs = torch.autograd.grad(plain_loss(head, hidden, labels) * 0.37, inputs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_tokens_are_zero_with_zero_gradients(dtype: torch.dtype) -> None:
    head = LMHead(97, 16, bias=True).to(dtype)
    hidden = torch.empty(0, 16, dtype=dtype, requires_grad=True)
    loss = head(hidden, torch.empty(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    for parameter in head.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == dtype and not parameter.grad.any()


def test_untied_weight_starts_with_the_spread_asked_for() -> None:
    assert LMHead(500, 64, std=0.1).weight.std().item() == pytest.approx(0.1, rel=0.03)
