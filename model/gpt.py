"""GPT: a causal transformer of the GPT-2 and Llama families.

Shapes: B batch, T sequence, D model width, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import check
from model.attention import Attention, LayerCache
from model.heads import LMHead
from model.layers import GELU, INIT_STD, Embedding, Linear, SwiGLU, make_norm, rotary_table

ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "gelu": GELU,
    "gelu_tanh": partial(GELU, approximate="tanh"),
    "swiglu": SwiGLU,
}


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + feedforward(norm(x))."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        feedforward_width: int,
        *,
        norm: str,
        activation: str,
        bias: bool,
        qk_norm: bool,
        dropout: float,
        residual_std: float,
    ) -> None:
        super().__init__()
        self.attention_norm = make_norm(norm, width, bias)
        self.attention = Attention(
            width, heads, kv_heads, bias=bias, qk_norm=qk_norm, dropout=dropout, residual_std=residual_std
        )
        self.feedforward_norm = make_norm(norm, width, bias)
        self.feedforward = ACTIVATIONS[activation](width, feedforward_width, bias, residual_std)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor] | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), rotary, cache))
        return x_BTD + self.dropout(self.feedforward(self.feedforward_norm(x_BTD)))


class GPT(nn.Module):
    """A decoder-only language model, initialised as GPT-2 from torch's global random state.

    Args:
        vocabulary_size, sequence_length, layers, width, heads: sizes; `width` is a multiple of `heads`.
        kv_heads: key-value heads, each shared by a group of query heads; None means `heads`.
        feedforward_width: inner width; None means 4 width for GELU, and for SwiGLU 8/3 width rounded up to a
            multiple of 64, with which its three matrices hold as much as GELU's two.
        position: "learned" table, or "rotary" with `rotary_base` for the longest wavelength.
        norm: "layernorm" or "rmsnorm". activation: "gelu" (exact), "gelu_tanh" (GPT-2's) or "swiglu".
        bias: whether linear maps and LayerNorms have biases (the head never has).
        qk_norm: RMSNorm over each query and key head.
        tied: the head's weight is the token table: one Parameter, registered in both modules.
        dropout: probability, of embeddings, attention weights and both branches of every block.

    Raises ValueError with one line that begins with `model.<key>:` for an argument that cannot be.
    """

    def __init__(
        self,
        *,
        vocabulary_size: int,
        sequence_length: int,
        layers: int,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        feedforward_width: int | None = None,
        position: str = "learned",
        norm: str = "layernorm",
        activation: str = "gelu",
        bias: bool = True,
        qk_norm: bool = False,
        tied: bool = True,
        dropout: float = 0.0,
        rotary_base: float = 10000.0,
    ) -> None:
        super().__init__()
        check.size("vocabulary_size", vocabulary_size)
        check.size("sequence_length", sequence_length)
        check.size("layers", layers)
        check.size("width", width)
        check.size("heads", heads)
        check.choice("position", position, ("learned", "rotary"))
        check.choice("norm", norm, ("layernorm", "rmsnorm"))
        check.choice("activation", activation, tuple(ACTIVATIONS))
        check.flag("bias", bias)
        check.flag("qk_norm", qk_norm)
        check.flag("tied", tied)
        check.number("dropout", dropout, 0, 1, include_above=True)
        check.number("rotary_base", rotary_base, 0, math.inf, include_above=False)
        kv_heads = heads if kv_heads is None else kv_heads
        if feedforward_width is None:
            feedforward_width = 64 * math.ceil(width / 24) if activation == "swiglu" else 4 * width
        check.size("kv_heads", kv_heads)
        check.size("feedforward_width", feedforward_width)
        check.divides("width", width, "heads", heads)
        check.divides("heads", heads, "kv_heads", kv_heads)
        if position == "rotary":
            check.divides("width", width, "2 x heads (rotary turns pairs)", 2 * heads)

        self.vocabulary_size, self.sequence_length = vocabulary_size, sequence_length
        self.layers, self.width, self.heads, self.kv_heads = layers, width, heads, kv_heads
        self.rotary_base = rotary_base
        self.activation_checkpointing = False
        self.embedding = Embedding(vocabulary_size, width)
        # GPT-2's released code (src/model.py) starts positions at half the spread of tokens.
        learned = position == "learned"
        self.positions = Embedding(sequence_length, width, std=INIT_STD / 2) if learned else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                kv_heads,
                feedforward_width,
                norm=norm,
                activation=activation,
                bias=bias,
                qk_norm=qk_norm,
                dropout=dropout,
                residual_std=INIT_STD / math.sqrt(2 * layers),  # GPT-2, section 2.3: 2 residual sums a layer
            )
            for _ in range(layers)
        )
        self.norm = make_norm(norm, width, bias)
        self.head = LMHead(vocabulary_size, width, self.embedding.weight if tied else None)

    def forward(
        self, tokens_BT: Tensor, labels_BT: Tensor | None = None, cache: list[LayerCache] | None = None
    ) -> Tensor:
        """Logits [B, T, V]; or, with labels, the fp32 scalar sum of the token losses in nats (-100: no loss).

        With a cache (see `new_cache`) the tokens follow those already in it, and are added to it.
        """
        start = cache[0].length if cache else 0
        end = start + tokens_BT.shape[1]
        if end > self.sequence_length:
            raise ValueError(f"tokens: {end} exceed model.sequence_length {self.sequence_length}; give fewer")
        positions_T = torch.arange(start, end, device=tokens_BT.device)
        x_BTD, rotary = self.embedding(tokens_BT), None
        if self.positions is None:
            rotary = rotary_table(positions_T, self.width // self.heads, self.rotary_base)
        else:
            x_BTD = x_BTD + self.positions(positions_T)
        x_BTD = self.dropout(x_BTD)
        for layer, block in enumerate(self.blocks):
            if self.activation_checkpointing and self.training:
                x_BTD = checkpoint(block, x_BTD, rotary, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, rotary, cache[layer] if cache else None)
        return self.head(self.norm(x_BTD), labels_BT)

    def reset_parameters(self) -> None:
        """Initialise every weight anew from torch's global random state, as the constructor does.

        For a model built on the meta device, after `to_empty(device=...)`.
        """
        if self.head.tied:  # `to_empty` gave each of the two modules a tensor of its own
            self.head.weight = self.embedding.weight
        for module in self.modules():
            if isinstance(module, Linear | Embedding | LMHead | nn.LayerNorm | nn.RMSNorm):
                module.reset_parameters()

    def new_cache(self, batch: int) -> list[LayerCache]:
        """An empty key-value cache for `batch` sequences of up to `sequence_length` tokens."""
        weight = self.embedding.weight
        head_width = self.width // self.heads
        return [
            LayerCache(batch, self.sequence_length, self.kv_heads, head_width, weight.dtype, weight.device)
            for _ in self.blocks
        ]
