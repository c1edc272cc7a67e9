"""Multi-head attention behind one function, `attend`, and the key-value cache.

Shapes: B batch, T queries, S keys, D model width, H heads, G key-value heads, K head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import Linear, rotate

try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None

HALF = (torch.bfloat16, torch.float16)
CPU_QUERIES = 256  # queries of one product on the CPU
CPU_SCORES = 2**26  # the most scores kept for the backward of one layer on the CPU: 128 MiB


def attend(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, causal: bool, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(K)) v (arXiv 1706.03762, equation 1) with H a multiple of G; returns [B, T, H, K].

    With `causal` the T queries are the last T of the S positions. Uses flash-attn for half-precision tensors
    on a CUDA GPU where the package is installed, `attend_cpu` in bfloat16 on a CPU where the scores are few,
    and `scaled_dot_product_attention` everywhere else.
    """
    if flash_attn_func is not None and q_BTHK.is_cuda and q_BTHK.dtype in HALF:
        return flash_attn_func(q_BTHK, k_BSGK, v_BSGK, dropout_p=dropout, causal=causal)
    batch, queries, heads = q_BTHK.shape[:3]
    square = causal and queries == k_BSGK.shape[1] and batch * heads * queries**2 <= CPU_SCORES
    if square and q_BTHK.device.type == "cpu" and q_BTHK.dtype == torch.bfloat16 and not dropout:
        return attend_cpu(q_BTHK, k_BSGK, v_BSGK)
    return attend_sdpa(q_BTHK, k_BSGK, v_BSGK, causal, dropout)


def attend_sdpa(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, causal: bool, dropout: float = 0.0) -> Tensor:
    """`attend` through PyTorch's own kernels, on any device and in any dtype."""
    queries, keys, mask = q_BTHK.shape[1], k_BSGK.shape[1], None
    if causal and queries != keys:  # SDPA would put the queries first, not last
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q_BTHK.device).tril(keys - queries)
    out_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BSGK.transpose(1, 2),
        v_BSGK.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None,
        enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2],
    )
    return out_BHTK.transpose(1, 2)


def attend_cpu(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Causal `attend` by plain products, for which a CPU has fast bfloat16 kernels.

    Forward and backward take half the time of SDPA's CPU kernel, whose backward is slow, but the softmax is
    kept for the backward and scores are rounded to q's dtype. A block of queries skips the keys after it.
    """
    groups = q_BTHK.shape[2] // k_BTGK.shape[2]
    q_BHTK = q_BTHK.transpose(1, 2) * q_BTHK.shape[-1] ** -0.5
    k_BHTK = k_BTGK.transpose(1, 2).repeat_interleave(groups, dim=1)
    v_BHTK = v_BTGK.transpose(1, 2).repeat_interleave(groups, dim=1)
    outs = []
    for start in range(0, q_BTHK.shape[1], CPU_QUERIES):
        queries = q_BHTK[:, :, start : start + CPU_QUERIES]
        end = start + queries.shape[2]
        future = torch.full((queries.shape[2], end), -torch.inf, dtype=q_BTHK.dtype).triu(start + 1)
        scores = queries @ k_BHTK[:, :, :end].transpose(2, 3) + future
        outs.append(scores.softmax(-1) @ v_BHTK[:, :, :end])
    return torch.cat(outs, dim=2).transpose(1, 2)


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
    """Causal self-attention with grouped key-value heads (arXiv 2305.13245).

    `qk_norm` puts an RMSNorm over each query and key head, before the positions (as in arXiv 2302.05442,
    section 2.1, with LayerNorm).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        *,
        bias: bool,
        qk_norm: bool,
        dropout: float,
        residual_std: float,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width, self.dropout = heads, kv_heads, width // heads, dropout
        self.qkv = Linear(width, (heads + 2 * kv_heads) * self.head_width, bias)
        self.project = Linear(width, width, bias, std=residual_std)
        self.query_norm = nn.RMSNorm(self.head_width, eps=1e-5) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(self.head_width, eps=1e-5) if qk_norm else nn.Identity()

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor] | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        heads_BTHK = self.qkv(x_BTD).unflatten(-1, (-1, self.head_width))
        q_BTHK, k_BTGK, v_BTGK = heads_BTHK.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        q_BTHK, k_BTGK = self.query_norm(q_BTHK), self.key_norm(k_BTGK)
        if rotary is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, rotary), rotate(k_BTGK, rotary)
        if cache is not None:
            k_BTGK, v_BTGK = cache.append(k_BTGK, v_BTGK)
        dropout = self.dropout if self.training else 0.0
        return self.project(attend(q_BTHK, k_BTGK, v_BTGK, causal=True, dropout=dropout).flatten(2))
