"""Every way to attend agrees with the formula, and with the others."""

import math

import pytest
import torch
from torch import Tensor

from model import attention
from model.attention import Attention, LayerCache, attend, attend_cpu, attend_sdpa


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


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("length", [5, 16, 23])
@pytest.mark.parametrize("product", [1, 2**21])
def test_cpu_blocks_equal_sdpa_with_gradients(
    monkeypatch: pytest.MonkeyPatch, causal: bool, kv_heads: int, length: int, product: int
) -> None:
    monkeypatch.setattr(attention, "CPU_QUERIES", 8)
    monkeypatch.setattr(attention, "CPU_PRODUCT", product)
    inputs = [x.requires_grad_() for x in tensors(length, length, kv_heads=kv_heads)]
    ours, theirs = attend_cpu(*inputs, causal, 0.3), attend_sdpa(*inputs, causal, scale=0.3)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    upstream = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(theirs, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_bfloat16_on_a_cpu_is_close_to_the_formula(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    monkeypatch.setattr(attention, "attend_sdpa", None)  # so that this must be attend_cpu
    q, k, v = (x.bfloat16() for x in tensors(32, 32))
    ours, theirs = attend(q, k, v, causal).double(), formula(q, k, v, causal)
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)


def test_many_scores_go_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.bfloat16() for x in tensors(32, 32))
    monkeypatch.setattr(attention, "attend_cpu", None)
    monkeypatch.setattr(attention, "CPU_SCORES", 2 * 4 * 32 * 32 - 1)
    assert attend(q, k, v, True).shape == q.shape
    monkeypatch.setattr(attention, "CPU_SCORES", 2 * 4 * 32 * 32)
    with pytest.raises(TypeError):
        attend(q, k, v, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("queries", [9, 1])
def test_a_bias_is_added_to_the_scores(dtype: torch.dtype, causal: bool, kv_heads: int, queries: int) -> None:
    q, k, v = (x.to(dtype).requires_grad_() for x in tensors(queries, 9, kv_heads=kv_heads))
    for shape in ((1, 4), (2, 4), (2, 1)):
        bias = torch.randn(*shape, queries, 9, requires_grad=True)
        with torch.no_grad():
            bias[..., 3] = -torch.inf  # what a caller hides
        keys, values = (x.repeat_interleave(4 // kv_heads, dim=2) for x in (k, v))
        scores = torch.einsum("bthk,bshk->bhts", q.double(), keys.double()) * 0.5 + bias
        if causal:
            scores = scores.masked_fill(~torch.ones(queries, 9).bool().tril(9 - queries), -torch.inf)
        expected = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), values.double())
        ours, tolerance = attend(q, k, v, causal, bias=bias, scale=0.5), 1e-5
        if dtype == torch.bfloat16:
            tolerance = 3e-2
        torch.testing.assert_close(ours.double(), expected, atol=tolerance, rtol=tolerance)
        upstream = torch.randn(expected.shape)
        arguments = (bias, q, k, v)
        for mine, other in zip(
            torch.autograd.grad(ours, arguments, upstream.to(dtype)),
            torch.autograd.grad(expected, arguments, upstream.double()),
            strict=True,
        ):
            torch.testing.assert_close(mine.double(), other.double(), atol=5 * tolerance, rtol=5 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_the_scale_is_one_over_the_root_of_the_head_width_unless_given(
    dtype: torch.dtype, causal: bool
) -> None:
    q, k, v = (x.to(dtype) for x in tensors(9, 9))
    torch.testing.assert_close(attend(q, k, v, causal, scale=8**-0.5), attend(q, k, v, causal))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    scaled = attend(q * 8**0.5, k, v, causal)
    torch.testing.assert_close(attend(q, k, v, causal, scale=1.0), scaled, atol=tolerance, rtol=tolerance)


def test_a_layer_may_look_both_ways_and_have_heads_of_any_width() -> None:
    layer = Attention(24, 4, 2, bias=False, residual_std=0.2, causal=False, head_width=10, scale=1.0)
    assert layer.qkv.weight.shape == (80, 24) and layer.project.weight.shape == (24, 40)
    x, bias = torch.randn(2, 7, 24), torch.randn(1, 4, 7, 7)
    q, k, v = layer.qkv(x).unflatten(-1, (8, 10)).split((4, 2, 2), dim=2)
    out = attend_sdpa(q, k, v, False, bias=bias, scale=1.0)
    torch.testing.assert_close(layer(x, bias=bias), layer.project(out.flatten(2)))
    changed = x.clone()
    changed[:, -1] += 1
    assert not torch.allclose(layer(x)[:, 0], layer(changed)[:, 0], atol=1e-3)


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
