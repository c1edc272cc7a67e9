"""Documents that share a sequence: where each lies, and attention that does not leave it.

Shapes: B batch, T sequence, H heads, G key-value heads, K head width, C chunks of CHUNK positions of a
sequence, N sequences in one product, Q queries and S keys of each, both multiples of CHUNK.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# On a CPU small products wait for each other, large ones leave the cache.
CHUNK = 32  # positions; keys are taken in whole chunks
QUERY_CHUNKS = 4  # chunks of queries of one product, half as many where documents are short
SHORT = 100  # positions of such a document on average
PRODUCT_SCORES = 2**20  # the most scores of one product, if it has more than one sequence
KEPT_SCORES = 2**26  # the most scores kept for the backward of one layer; more are computed again


class Documents:
    """Where the documents of a batch lie. Made once in a model's forward and handed to all its layers.

    ids_BT: int32 [B, T]; neighbours of one id are one document. Padding, with an id of its own, is one too,
    so that every position sees something. positions_BT: int64 [B, T], counted from the document's first.
    """

    def __init__(self, ids_BT: Tensor) -> None:
        steps_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        self._first_BT = F.pad(ids_BT[:, 1:] != ids_BT[:, :-1], (1, 0), value=True)
        self._starts_BT = torch.where(self._first_BT, steps_T, 0).cummax(dim=1).values
        self.positions_BT = steps_T - self._starts_BT
        self._masks: dict[bool, Tensor] = {}
        self._layouts: dict[tuple[bool, int, int, torch.dtype], Layout] = {}

    def mask(self, causal: bool) -> Tensor:
        """Whether a query (third dimension) sees a key: bool [B, 1, T, T]."""
        if causal not in self._masks:
            seen_BTT = self._starts_BT[:, :, None] == self._starts_BT[:, None, :]
            self._masks[causal] = (seen_BTT.tril() if causal else seen_BTT)[:, None]
        return self._masks[causal]

    @cached_property
    def bounds(self) -> tuple[Tensor, int]:
        """Where documents start in the flattened batch, and the last ends, int32; the longest's length."""
        total = self._first_BT.numel()
        starts = self._first_BT.flatten().nonzero().squeeze(1)
        bounds = F.pad(starts, (0, 1), value=total).int()
        return bounds, int(bounds.diff().max())

    def layout(self, causal: bool, heads: int, kv_heads: int, dtype: torch.dtype) -> Layout:
        """The products that `attend_blocks` makes of such a layer."""
        key = causal, heads, kv_heads, dtype
        if key not in self._layouts:
            self._layouts[key] = _layout(self._starts_BT.cpu().numpy(), causal, heads, kv_heads, dtype)
        return self._layouts[key]


@dataclass(frozen=True)
class Product:
    """Blocks of Q queries and S keys each, multiplied together.

    rows: of the queries and of the keys, of all sequences and heads. mask: [N, 1, Q, S], -inf at what is
    unseen; None where all is seen.
    """

    queries: int
    keys: int
    rows: tuple[int, int]
    mask: Tensor | None


@dataclass(frozen=True)
class Layout:
    """A layer's attention as products. A row is one chunk of one head of one sequence: CHUNK x K numbers.

    chunks: C. queries, keys: rows [B, H, C] and [B, G, C], flattened, that the products take, one product
    after the other. outputs: where each query row lies there. kept: whether scores are kept for the backward.
    """

    chunks: int
    queries: Tensor
    keys: Tensor
    outputs: Tensor
    products: list[Product]
    kept: bool


def _layout(starts_BT: np.ndarray, causal: bool, heads: int, kv_heads: int, dtype: torch.dtype) -> Layout:
    batch, length = starts_BT.shape
    chunks = -(-length // CHUNK)
    first_BT = np.full(
        (batch, chunks * CHUNK), length
    )  # the first key that a query sees; the fill sees itself
    first_BT[:, :length] = starts_BT
    steps_T = np.arange(chunks * CHUNK)
    last_BT = np.broadcast_to(steps_T, first_BT.shape) if causal else _last(first_BT)
    head_H = np.arange(heads)
    queries, keys, products, scores = [], [], [], 0
    for (query_chunks, key_chunks), blocks in _blocks(first_BT, last_BT).items():
        each = heads * query_chunks * key_chunks * CHUNK**2
        scores += each * len(blocks)
        part = max(1, PRODUCT_SCORES // each)
        for start in range(0, len(blocks), part):
            row_N1, query_N1, key_N1 = np.array(blocks[start : start + part]).T[..., None]
            query_NQ = query_N1 * CHUNK + steps_T[: query_chunks * CHUNK]
            key_NS = key_N1 * CHUNK + steps_T[: key_chunks * CHUNK]
            first_NQ, last_NQ = first_BT[row_N1, query_NQ], last_BT[row_N1, query_NQ]
            unseen_NQS = (key_NS[:, None] < first_NQ[..., None]) | (key_NS[:, None] > last_NQ[..., None])
            mask = torch.zeros(unseen_NQS.shape, dtype=dtype)
            mask.masked_fill_(torch.from_numpy(unseen_NQS), -torch.inf)
            query_NH = (row_N1 * heads + head_H) * chunks + query_N1
            key_NH = (row_N1 * kv_heads + head_H // (heads // kv_heads)) * chunks + key_N1
            queries.append((query_NH[..., None] + np.arange(query_chunks)).ravel())
            keys.append((key_NH[..., None] + np.arange(key_chunks)).ravel())
            rows = len(queries[-1]), len(keys[-1])
            seen = None if not unseen_NQS.any() else mask[:, None]
            products.append(Product(query_NQ.shape[1], key_NS.shape[1], rows, seen))
    query_rows = torch.from_numpy(np.concatenate(queries))
    return Layout(
        chunks=chunks,
        queries=query_rows,
        keys=torch.from_numpy(np.concatenate(keys)),
        outputs=query_rows.argsort(),
        products=products,
        kept=scores <= KEPT_SCORES,
    )


def _blocks(first_BT: np.ndarray, last_BT: np.ndarray) -> dict[tuple[int, int], list[tuple[int, int, int]]]:
    """Blocks of queries with the keys from the first to the last that any of them sees.

    {(chunks of queries, chunks of keys): [(sequence, first chunk of queries, first chunk of keys)]}.
    Neighbours that see the same chunks of keys are one block.
    """
    chunks = first_BT.shape[1] // CHUNK
    documents = len(first_BT) + (first_BT[:, 1:] != first_BT[:, :-1]).sum()
    size = QUERY_CHUNKS if first_BT.size >= SHORT * documents else max(1, QUERY_CHUNKS // 2)
    blocks: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for row in range(len(first_BT)):
        by_keys: dict[tuple[int, int], tuple[int, int]] = {}
        for query in range(0, chunks, size):
            stop = min(query + size, chunks)
            span = first_BT[row, query * CHUNK] // CHUNK, last_BT[row, stop * CHUNK - 1] // CHUNK + 1
            by_keys[span] = by_keys.get(span, (query, stop))[0], stop
        for (key, key_stop), (query, stop) in by_keys.items():
            blocks.setdefault((stop - query, key_stop - key), []).append((row, query, key))
    return blocks


def _last(first_BT: np.ndarray) -> np.ndarray:
    """The last position of each position's document, given the first."""
    end = first_BT.shape[1] - 1
    last_BT = np.full_like(first_BT, end)
    ends_BT = np.where(first_BT[:, 1:] != first_BT[:, :-1], np.arange(end), end)
    last_BT[:, :-1] = np.minimum.accumulate(ends_BT[:, ::-1], axis=1)[:, ::-1]
    return last_BT


def attend_blocks(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    documents: Documents,
    causal: bool,
    dropout: float,
    scale: float,
) -> Tensor:
    """Attention within documents by plain products of blocks of queries with the keys of their documents.

    Blocks with equally many keys are gathered into one product, from wherever they lie in the batch. Scores
    are rounded to q's dtype.
    """
    batch, length, heads, head_width = q_BTHK.shape
    layout = documents.layout(causal, heads, k_BTGK.shape[2], q_BTHK.dtype)
    query_rows = (_rows(q_BTHK, layout.chunks) * scale).index_select(0, layout.queries)
    key_rows = _rows(k_BTGK, layout.chunks).index_select(0, layout.keys)
    value_rows = _rows(v_BTGK, layout.chunks).index_select(0, layout.keys)
    query_sizes, key_sizes = zip(*(product.rows for product in layout.products), strict=True)
    outs = []
    for product, q, k, v in zip(
        layout.products,
        query_rows.split(query_sizes),
        key_rows.split(key_sizes),
        value_rows.split(key_sizes),
        strict=True,
    ):
        if layout.kept or not torch.is_grad_enabled():
            outs.append(_multiply(q, k, v, product, dropout))
        else:
            outs.append(checkpoint(_multiply, q, k, v, product, dropout, use_reentrant=False))
    out_rows = torch.cat(outs).index_select(0, layout.outputs)
    return out_rows.view(batch, heads, -1, head_width)[:, :, :length].transpose(1, 2)


def _rows(x_BTHK: Tensor, chunks: int) -> Tensor:
    """Rows [B * H * C, CHUNK * K] (see `Layout`), zeros past the last position."""
    missing = chunks * CHUNK - x_BTHK.shape[1]
    if missing:
        x_BTHK = F.pad(x_BTHK, (0, 0, 0, 0, 0, missing))
    return x_BTHK.transpose(1, 2).reshape(-1, CHUNK * x_BTHK.shape[3])


def _multiply(queries: Tensor, keys: Tensor, values: Tensor, product: Product, dropout: float) -> Tensor:
    """One product: its rows of queries, keys and values to rows of outputs."""
    head_width = queries.shape[1] // CHUNK
    q_NQK = queries.view(-1, product.queries, head_width)
    k_NSK, v_NSK = (rows.view(-1, product.keys, head_width) for rows in (keys, values))
    scores_NQS = q_NQK @ k_NSK.transpose(1, 2)  # here N counts heads as well
    if product.mask is not None:
        sequences = len(product.mask)
        scores_NQS.unflatten(0, (sequences, -1)).add_(product.mask)
    weights_NQS = F.dropout(scores_NQS.softmax(-1), dropout)
    return (weights_NQS @ v_NSK).view(queries.shape)
