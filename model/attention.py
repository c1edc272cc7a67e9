"""Multi-head attention behind one function, `attend`, and the key-value cache.

Shapes: B batch, T queries, S keys, D model width, H heads, G key-value heads, K head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.documents import Documents, attend_blocks
from model.layers import Linear
from model.rotary import Table, rotate

try:
    from flash_attn import flash_attn_func, flash_attn_varlen_func
except ImportError:
    flash_attn_func = flash_attn_varlen_func = None

HALF = (torch.bfloat16, torch.float16)
CPU_QUERIES = 256  # queries of one product on the CPU
CPU_PRODUCT = 2**21  # the most scores of one product on the CPU, if it has more than one sequence
CPU_SCORES = 2**26  # the most scores kept for the backward of one layer on the CPU: 128 MiB


def attend(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    causal: bool,
    dropout: float = 0.0,
    documents: Documents | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T + bias) v (arXiv 1706.03762, equation 1), H a multiple of G; returns [B, T, H, K].

    With `causal` the T queries are the last T of the S positions. With `documents`, which are of T = S
    positions, a query sees its own document only. bias: [1 or B, 1 or H, T, S]. scale: None means 1/sqrt(K).

    Without a bias this is flash-attn for half-precision tensors on a CUDA GPU where the package is installed,
    and on a CPU `attend_blocks` with documents and `attend_cpu` in bfloat16 where the scores are few.
    `scaled_dot_product_attention` does everything else.
    """
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    if documents is not None:
        return attend_documents(q_BTHK, k_BSGK, v_BSGK, causal, dropout, documents, bias, scale)
    if flash_attn_func is not None and bias is None and q_BTHK.is_cuda and q_BTHK.dtype in HALF:
        return flash_attn_func(q_BTHK, k_BSGK, v_BSGK, dropout, scale, causal)
    batch, queries, heads = q_BTHK.shape[:3]
    square = queries == k_BSGK.shape[1] and batch * heads * queries**2 <= CPU_SCORES
    plain = square and bias is None and not dropout
    if plain and q_BTHK.device.type == "cpu" and q_BTHK.dtype == torch.bfloat16:
        return attend_cpu(q_BTHK, k_BSGK, v_BSGK, causal, scale)
    return attend_sdpa(q_BTHK, k_BSGK, v_BSGK, causal, dropout, bias, scale)


def attend_sdpa(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    causal: bool,
    dropout: float = 0.0,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`attend` through PyTorch's own kernels, on any device and in any dtype.

    bias: as there, or bool: whether a key is seen.
    """
    queries, keys, mask = q_BTHK.shape[1], k_BSGK.shape[1], bias
    if causal and (bias is not None or queries != keys):  # SDPA would put the queries first, not last
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q_BTHK.device).tril(keys - queries)
        mask = mask if bias is None else bias.masked_fill(~mask, -torch.inf)
    out_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BSGK.transpose(1, 2),
        v_BSGK.transpose(1, 2),
        attn_mask=mask if mask is None or mask.dtype == torch.bool else mask.to(q_BTHK.dtype),
        dropout_p=dropout,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2],
    )
    return out_BHTK.transpose(1, 2)


def attend_cpu(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, causal: bool, scale: float) -> Tensor:
    """Self-`attend` by plain products, for which a CPU has fast bfloat16 kernels.

    Forward and backward take less than half the time of SDPA's CPU kernel, whose backward is slow, but the
    softmax is kept for the backward and scores are rounded to q's dtype. Parts of the batch whose scores stay
    in the cache go one after the other. A causal block of queries skips the keys after it.
    """
    length, heads = q_BTHK.shape[1:3]
    groups = heads // k_BTGK.shape[2]
    q_BHTK = q_BTHK.transpose(1, 2) * scale
    k_BHTK, v_BHTK = (x.transpose(1, 2).repeat_interleave(groups, dim=1) for x in (k_BTGK, v_BTGK))
    part = max(1, CPU_PRODUCT // (heads * min(length, CPU_QUERIES) * length))
    outs = []
    for q, k, v in zip(q_BHTK.split(part), k_BHTK.split(part), v_BHTK.split(part), strict=True):
        blocks = []
        for start in range(0, length, CPU_QUERIES):
            queries = q[:, :, start : start + CPU_QUERIES]
            end = start + queries.shape[2] if causal else length
            scores = queries @ k[:, :, :end].transpose(2, 3)
            if causal:
                scores = scores + scores.new_full(scores.shape[2:], -torch.inf).triu(start + 1)
            blocks.append(scores.softmax(-1) @ v[:, :, :end])
        outs.append(torch.cat(blocks, dim=2))
    return torch.cat(outs).transpose(1, 2)


@torch.compiler.disable  # each batch has other documents: compiled code would be for one of them only
def attend_documents(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    causal: bool,
    dropout: float,
    documents: Documents,
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """`attend` within documents."""
    if bias is None and q_BTHK.device.type == "cpu":
        return attend_blocks(q_BTHK, k_BTGK, v_BTGK, documents, causal, dropout, scale)
    if bias is None and flash_attn_varlen_func is not None and q_BTHK.dtype in HALF:
        return attend_varlen(q_BTHK, k_BTGK, v_BTGK, documents, causal, dropout, scale)
    mask = documents.mask(causal)
    bias = mask if bias is None else bias.masked_fill(~mask, -torch.inf)
    return attend_sdpa(q_BTHK, k_BTGK, v_BTGK, False, dropout, bias, scale)


def attend_varlen(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    documents: Documents,
    causal: bool,
    dropout: float,
    scale: float,
) -> Tensor:
    """`attend` within documents by flash-attn, to which the batch is one row of documents."""
    bounds, longest = documents.bounds
    flat = (x.flatten(0, 1) for x in (q_BTHK, k_BTGK, v_BTGK))
    out = flash_attn_varlen_func(*flat, bounds, bounds, longest, longest, dropout, scale, causal)
    return out.view(q_BTHK.shape)


class LayerCache:
    """Keys and values [B, S, G, K] of one layer, preallocated for `capacity` positions."""

    def __init__(
        self,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.keys = torch.empty(batch, capacity, kv_heads, head_width, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the next T positions; returns views of all keys and values held so far."""
        end = self.length + k_BTGK.shape[1]
        self.keys[:, self.length : end] = k_BTGK
        self.values[:, self.length : end] = v_BTGK
        self.length = end
        return self.keys[:, :end], self.values[:, :end]


class Attention(nn.Module):
    """Self-attention with grouped key-value heads (arXiv 2305.13245).

    head_width: None means width / heads. `qk_norm` puts an RMSNorm over each query and key head, before the
    positions (as in arXiv 2302.05442, section 2.1, with LayerNorm). scale: of the scores, see `attend`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        *,
        bias: bool,
        residual_std: float,
        dropout: float = 0.0,
        causal: bool = True,
        qk_norm: bool = False,
        head_width: int | None = None,
        norm_eps: float = 1e-5,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, head_width or width // heads
        self.causal, self.dropout = causal, dropout
        self.scale = self.head_width**-0.5 if scale is None else scale
        self.qkv = Linear(width, (heads + 2 * kv_heads) * self.head_width, bias)
        self.project = Linear(heads * self.head_width, width, bias, std=residual_std)
        self.query_norm = nn.RMSNorm(self.head_width, eps=norm_eps) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(self.head_width, eps=norm_eps) if qk_norm else nn.Identity()

    def forward(
        self,
        x_BTD: Tensor,
        rotary: Table | None = None,
        cache: LayerCache | None = None,
        documents: Documents | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """bias: added to the scores, [1 or B, 1 or H, T, S]."""
        heads_BTHK = self.qkv(x_BTD).unflatten(-1, (-1, self.head_width))
        q_BTHK, k_BTGK, v_BTGK = heads_BTHK.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        q_BTHK, k_BTGK = self.query_norm(q_BTHK), self.key_norm(k_BTGK)
        if rotary is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, rotary), rotate(k_BTGK, rotary)
        if cache is not None:
            k_BTGK, v_BTGK = cache.append(k_BTGK, v_BTGK)
        dropout = self.dropout if self.training else 0.0
        out_BTHK = attend(q_BTHK, k_BTGK, v_BTGK, self.causal, dropout, documents, bias, scale=self.scale)
        return self.project(out_BTHK.flatten(2))
