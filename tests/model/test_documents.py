"""Documents that share a sequence: every way to attend within them equals a mask written out."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import attention, documents
from model.attention import attend
from model.documents import Documents
from tests.model.small import LLAMA, small_gpt

SINGLE, MANY, PADDED = [0] * 9, [0, 0, 0, 1, 1, 2, 3, 3, 3], [0, 0, 1, 1, 1, 1, -1, -1, -1]


def random_ids(batch: int, length: int, mean: float, padded: bool) -> Tensor:
    """Ids [B, T] of documents of geometric lengths; `padded`: sequences end early, and the first is empty."""
    starts = torch.rand(batch, length) < 1 / mean
    ids = starts.int().cumsum(1).int()
    if padded:
        used = torch.randint(0, length + 1, (batch, 1))
        used[0] = 0
        ids[torch.arange(length) >= used] = -1
    return ids


def naive(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, causal: bool, scale: float) -> Tensor:
    """Every score, then a mask, one query head at a time; in the inputs' dtype."""
    out, groups = [], q.shape[2] // k.shape[2]
    seen = ids[:, :, None] == ids[:, None, :]
    seen = seen.tril() if causal else seen
    for head in range(q.shape[2]):
        scores = torch.einsum("btk,bsk->bts", q[:, :, head], k[:, :, head // groups]) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(torch.einsum("bts,bsk->btk", weights, v[:, :, head // groups]))
    return torch.stack(out, dim=2)


def inputs(batch: int, length: int, heads: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(batch, length, count, 8) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def compare(ids: Tensor, causal: bool, kv_heads: int, tolerance: float, scale: float | None = None) -> None:
    """Forward and gradients in fp32."""
    tensors = inputs(*ids.shape, 4, kv_heads, torch.float32)
    ours = attend(*tensors, causal, documents=Documents(ids), scale=scale)
    theirs = naive(*tensors, ids, causal, 8**-0.5 if scale is None else scale)
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    upstream = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, tensors, upstream),
        torch.autograd.grad(theirs, tensors, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_many_random_layouts_equal_a_naive_mask(causal: bool, kv_heads: int) -> None:
    for length, mean, padded in itertools.product(
        (1, 31, 32, 100, 200, 260), (1, 5, 40, 1000), (False, True)
    ):
        compare(random_ids(3, length, mean, padded), causal, kv_heads, tolerance=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_any_size_of_block_gives_the_same(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk, query_chunks, scores in itertools.product((1, 4), (1, 3), (1, 300)):
        monkeypatch.setattr(documents, "CHUNK", chunk)
        monkeypatch.setattr(documents, "QUERY_CHUNKS", query_chunks)
        monkeypatch.setattr(documents, "SHORT", 9)
        monkeypatch.setattr(documents, "PRODUCT_SCORES", scores)
        for mean in (2, 9, 50):
            compare(random_ids(3, 23, mean, True), causal, 2, tolerance=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_scores_too_many_to_keep_are_computed_again(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, kept = random_ids(2, 130, 20, True), []
    for limit in (2**26, 0):
        monkeypatch.setattr(documents, "KEPT_SCORES", limit)
        compare(ids, causal, 2, tolerance=1e-5)
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            attend(*inputs(2, 130, 4, 2, torch.float32), causal, documents=Documents(ids))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_the_scale_is_taken() -> None:
    compare(random_ids(2, 40, 9, False), True, 2, tolerance=1e-5, scale=1.0)


@pytest.mark.parametrize("causal", [True, False])
def test_bfloat16_is_the_formula_within_its_rounding(causal: bool) -> None:
    for mean in (3, 40, 1000):
        ids, exact = random_ids(2, 200, mean, True), []
        tensors = inputs(2, 200, 4, 2, torch.bfloat16)
        ours = attend(*tensors, causal, documents=Documents(ids))
        theirs = naive(*(tensor.double() for tensor in tensors), ids, causal, 8**-0.5)
        torch.testing.assert_close(ours.double(), theirs, atol=2e-2, rtol=2e-2)
        upstream = torch.randn_like(ours)
        exact = torch.autograd.grad(theirs, tensors, upstream.double())
        for mine, other in zip(torch.autograd.grad(ours, tensors, upstream), exact, strict=True):
            torch.testing.assert_close(mine.double(), other.double(), atol=1e-1, rtol=5e-2)


@pytest.mark.parametrize("causal", [True, False])
def test_a_mask_for_other_kernels_is_the_same(causal: bool) -> None:
    ids = random_ids(3, 50, 6, True)
    tensors = inputs(3, 50, 4, 2, torch.float32)
    expected = naive(*tensors, ids, causal, 8**-0.5)
    ours = attention.attend_sdpa(*tensors, False, bias=Documents(ids).mask(causal))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_documents_join_a_bias(causal: bool) -> None:
    ids, bias = random_ids(3, 50, 6, True), torch.randn(1, 4, 50, 50)
    q, k, v = inputs(3, 50, 4, 4, torch.float32)
    ours = attend(q, k, v, causal, documents=Documents(ids), bias=bias, scale=1.0)
    scores = torch.einsum("bthk,bshk->bhts", q, k) + bias
    weights = scores.masked_fill(~Documents(ids).mask(causal), -torch.inf).softmax(-1)
    torch.testing.assert_close(ours, torch.einsum("bhts,bshk->bthk", weights, v), atol=1e-5, rtol=1e-5)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    longest: int,
    longest_key: int,
    dropout: float,
    scale: float,
    causal: bool,
) -> Tensor:
    """flash-attn's function of this signature, document by document."""
    assert torch.equal(starts, key_starts) and starts.dtype == torch.int32
    assert longest == longest_key == int(starts.diff().max()) and not dropout
    parts = []
    for start, stop in itertools.pairwise(starts.tolist()):
        one = (x[start:stop].transpose(0, 1) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*one, is_causal=causal, scale=scale, enable_gqa=True)
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("causal", [True, False])
def test_flash_attn_gets_the_documents_of_the_whole_batch(
    causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "flash_attn_varlen_func", varlen)
    for mean in (1, 6, 1000):
        ids = random_ids(3, 50, mean, True)
        tensors = inputs(3, 50, 4, 2, torch.float32)
        ours = attention.attend_varlen(*tensors, Documents(ids), causal, 0.0, 0.3)
        torch.testing.assert_close(ours, naive(*tensors, ids, causal, 0.3), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(causal: bool, dtype: torch.dtype) -> None:
    ids = random_ids(3, 200, 30, True).cuda()
    tensors = [x.detach().cuda().requires_grad_() for x in inputs(3, 200, 4, 2, dtype)]
    ours = attend(*tensors, causal, documents=Documents(ids))
    theirs = naive(*(x.double() for x in tensors), ids, causal, 8**-0.5)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("causal", [True, False])
def test_dropout_drops_weights_and_keeps_the_mean(causal: bool) -> None:
    ids = random_ids(3, 20, 8, False)
    q, k, v = inputs(3, 20, 2, 2, torch.float32)
    drawn = [attend(q, k, torch.ones_like(v), causal, 0.5, Documents(ids)) for _ in range(200)]
    assert torch.stack(drawn).std(0).min() > 0.1
    assert torch.stack(drawn).mean().item() == pytest.approx(1, abs=0.05)


def test_positions_start_anew() -> None:
    ids = torch.tensor([SINGLE, MANY, PADDED], dtype=torch.int32)
    assert Documents(ids).positions_BT.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
        [0, 1, 2, 0, 1, 0, 0, 1, 2],
        [0, 1, 0, 1, 2, 3, 0, 1, 2],
    ]
    bounds, longest = Documents(ids).bounds
    assert bounds.tolist() == [0, 9, 12, 14, 15, 18, 20, 24, 27]
    assert longest == 9


VARIANTS: list[dict[str, Any]] = [{}, LLAMA, {"position": "rotary", "kv_heads": 2, "qk_norm": True}]


def packed() -> tuple[Tensor, Tensor]:
    """Tokens and ids [2, 32]: documents of 10, 1, 15 and 6 tokens, and of 20 tokens and padding."""
    lengths = [[10, 1, 15, 6], [20, 12]]
    ids = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]).int()
    ids[1, 20:] = -1
    return torch.randint(97, (2, 32)), ids


@pytest.mark.parametrize("options", VARIANTS)
def test_a_packed_document_has_the_logits_it_has_alone(options: dict[str, Any]) -> None:
    model, (tokens, ids) = small_gpt(**options), packed()
    logits = model(tokens, documents_BT=ids)
    assert logits.isfinite().all()
    for row, start, stop in ((0, 0, 10), (0, 10, 11), (0, 11, 26), (0, 26, 32), (1, 0, 20)):
        alone = model(tokens[row : row + 1, start:stop])
        torch.testing.assert_close(logits[row : row + 1, start:stop], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", VARIANTS)
def test_one_document_a_sequence_changes_nothing(options: dict[str, Any]) -> None:
    model, tokens = small_gpt(**options), torch.randint(97, (2, 32))
    same = model(tokens, documents_BT=torch.zeros(2, 32, dtype=torch.int32))
    torch.testing.assert_close(same, model(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"dropout": 0.3}, {**LLAMA, "dropout": 0.3}])
def test_activation_checkpointing_changes_no_gradient(options: dict[str, Any]) -> None:
    model, (tokens, ids) = small_gpt(**options), packed()
    results = []
    for model.activation_checkpointing in (False, True):
        torch.manual_seed(1)
        loss = model(tokens, tokens, documents_BT=ids)
        results.append(torch.autograd.grad(loss, list(model.parameters())))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_the_layout_is_worked_out_once_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = [], documents._layout
    monkeypatch.setattr(documents, "_layout", lambda *arguments: made.append(1) or make(*arguments))  # type: ignore[func-returns-value]
    model, (tokens, ids) = small_gpt(layers=3), packed()
    model.activation_checkpointing = True
    model(tokens, tokens, documents_BT=ids).backward()
    assert len(made) == 1


def test_compiled_blocks_take_every_layout_without_compiling_again() -> None:
    model, (tokens, _) = small_gpt(**LLAMA), packed()
    batches = [random_ids(2, 32, mean, True) for mean in (1, 2, 3, 5, 8, 12, 20, 50)]
    expected = [model(tokens, tokens, documents_BT=ids) for ids in batches]
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    model(tokens, tokens, documents_BT=batches[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for ids, loss in zip(batches, expected, strict=True):
            torch.testing.assert_close(model(tokens, tokens, documents_BT=ids), loss, atol=0, rtol=1e-5)


def test_a_cache_cannot_hold_documents() -> None:
    model, (tokens, ids) = small_gpt(), packed()
    with pytest.raises(ValueError, match="^documents: a cache holds one text a sequence"):
        model(tokens, cache=model.new_cache(2), documents_BT=ids)
