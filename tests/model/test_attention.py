"""Every way to attend agrees with the formula, and with the others."""

import math

import pytest
import torch
from torch import Tensor

from model import attention
from model.attention import LayerCache, attend, attend_cpu, attend_sdpa


def formula(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Softmax attention written out in fp64, one query head and one query at a time."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    group, earlier = q.shape[2] // k.shape[2], k.shape[1] - q.shape[1]
    for head in range(q.shape[2]):
        for query in range(q.shape[1]):
            seen = earlier + query + 1 if causal else k.shape[1]
            keys, values = k[:, :seen, head // group], v[:, :seen, head // group]
            weights = torch.einsum("bk,bsk->bs", q[:, query, head], keys) / math.sqrt(q.shape[-1])
            out[:, query, head] = torch.einsum("bs,bsk->bk", weights.softmax(-1), values)
    return out


def tensors(queries: int, keys: int, heads: int = 4, kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, queries, heads, 8), (2, keys, kv_heads, 8), (2, keys, kv_heads, 8))
    q, k, v = (torch.randn(shape) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (1, 9), (4, 9)])
def test_attend_is_the_formula(causal: bool, kv_heads: int, queries: int, keys: int) -> None:
    q, k, v = tensors(queries, keys, kv_heads=kv_heads)
    torch.testing.assert_close(
        attend(q, k, v, causal).double(), formula(q, k, v, causal), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("length", [5, 16, 23])
def test_cpu_blocks_equal_sdpa_with_gradients(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int, length: int
) -> None:
    monkeypatch.setattr(attention, "CPU_QUERIES", 8)
    inputs = [x.requires_grad_() for x in tensors(length, length, kv_heads=kv_heads)]
    ours, theirs = attend_cpu(*inputs), attend_sdpa(*inputs, causal=True)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    upstream = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(theirs, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_bfloat16_on_a_cpu_is_close_to_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "attend_sdpa", None)  # so that this must be attend_cpu
    q, k, v = (x.bfloat16() for x in tensors(32, 32))
    torch.testing.assert_close(attend(q, k, v, True).double(), formula(q, k, v, True), atol=2e-2, rtol=2e-2)


def test_many_scores_go_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.bfloat16() for x in tensors(32, 32))
    monkeypatch.setattr(attention, "attend_cpu", None)
    monkeypatch.setattr(attention, "CPU_SCORES", 2 * 4 * 32 * 32 - 1)
    assert attend(q, k, v, True).shape == q.shape
    monkeypatch.setattr(attention, "CPU_SCORES", 2 * 4 * 32 * 32)
    with pytest.raises(TypeError):
        attend(q, k, v, True)


def test_dropout_drops_weights_and_keeps_the_mean() -> None:
    q, k, v = tensors(8, 8)
    for dtype in (torch.float32, torch.bfloat16):
        ones = torch.ones_like(v, dtype=dtype)
        out = torch.cat([attend(q.to(dtype), k.to(dtype), ones, True, 0.5) for _ in range(100)]).float()
        assert out.std() > 0.1
        assert out.mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: flash-attn is not compared with SDPA")
@pytest.mark.skipif(attention.flash_attn_func is None, reason="flash-attn is not installed")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (1, 64), (16, 64)])
def test_flash_attn_equals_sdpa(kv_heads: int, queries: int, keys: int) -> None:
    q, k, v = (
        torch.randn(2, length, heads, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for length, heads in ((queries, 4), (keys, kv_heads), (keys, kv_heads))
    )
    ours, theirs = attend(q, k, v, True), attend_sdpa(q, k, v, True)
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)
    upstream = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, (q, k, v), upstream),
        torch.autograd.grad(theirs, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=5e-2, rtol=5e-2)


def test_layer_cache_returns_all_it_was_given() -> None:
    cache = LayerCache(2, 6, 1, 4, torch.float32, torch.device("cpu"))
    keys, values = torch.randn(2, 5, 1, 4), torch.randn(2, 5, 1, 4)
    cache.append(keys[:, :3], values[:, :3])
    held_keys, held_values = cache.append(keys[:, 3:], values[:, 3:])
    assert cache.length == 5
    assert torch.equal(held_keys, keys)
    assert torch.equal(held_values, values)
