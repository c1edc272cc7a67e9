"""GPT: a causal transformer of the GPT-2 and Llama families.

Shapes: B batch, T sequence, D model width, V vocabulary.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import check
from model.attention import Attention, LayerCache
from model.documents import Documents
from model.flops import linear_flops
from model.heads import LMHead
from model.layers import ACTIVATIONS, GATED, INIT_STD, Embedding, Linear, make_norm
from model.rotary import Table, check_scaling, rotary_table


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + feedforward(norm(x))."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        feedforward_width: int,
        *,
        head_width: int,
        norm: str,
        norm_eps: float,
        activation: str,
        bias: bool,
        qk_norm: bool,
        dropout: float,
        residual_std: float,
    ) -> None:
        super().__init__()
        self.attention_norm = make_norm(norm, width, bias, norm_eps)
        self.attention = Attention(
            width,
            heads,
            kv_heads,
            bias=bias,
            residual_std=residual_std,
            dropout=dropout,
            qk_norm=qk_norm,
            head_width=head_width,
            norm_eps=norm_eps,
        )
        self.feedforward_norm = make_norm(norm, width, bias, norm_eps)
        self.feedforward = ACTIVATIONS[activation](width, feedforward_width, bias, residual_std)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: Table | None = None,
        cache: LayerCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), rotary, cache, documents))
        return x_BTD + self.dropout(self.feedforward(self.feedforward_norm(x_BTD)))


class GPT(nn.Module):
    """A decoder-only language model, initialised as GPT-2 from torch's global random state.

    Args:
        vocabulary_size, sequence_length, layers, width, heads: sizes.
        head_width: None means width / heads, which then must be a whole number.
        kv_heads: key-value heads, each shared by a group of query heads; None means `heads`.
        feedforward_width: inner width; None means 4 width, and for a gated activation 8/3 width rounded up to
            a multiple of 64, with which its three matrices hold as much as the others' two.
        position: "learned" table, or "rotary" with `rotary_base` for the longest wavelength.
        rotary_scaling: {"kind": "linear", "ntk", "yarn" or "llama3", "factor": how many times as long texts
            may become, and other keywords of that kind's function in model/rotary.py}; None means none.
        norm: "layernorm" or "rmsnorm", with `norm_eps` under its root.
        activation: "gelu" (exact), "gelu_tanh" (GPT-2's), "relu", "swiglu", "geglu" or "geglu_tanh".
        bias: whether linear maps and LayerNorms have biases (the head never has).
        qk_norm: RMSNorm over each query and key head.
        tied: the head's weight is the token table: one Parameter, registered in both modules.
        dropout: probability, of embeddings, attention weights and both branches of every block.

    Raises ValueError with one line that begins with `model.<key>:` for an argument that cannot be.
    """

    family = "decoder"

    def __init__(
        self,
        *,
        vocabulary_size: int,
        sequence_length: int,
        layers: int,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        head_width: int | None = None,
        feedforward_width: int | None = None,
        position: str = "learned",
        norm: str = "layernorm",
        norm_eps: float = 1e-5,
        activation: str = "gelu",
        bias: bool = True,
        qk_norm: bool = False,
        tied: bool = True,
        dropout: float = 0.0,
        rotary_base: float = 10000.0,
        rotary_scaling: Mapping[str, Any] | None = None,
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
        check.number("norm_eps", norm_eps, 0, 1, include_above=False)
        check.flag("bias", bias)
        check.flag("qk_norm", qk_norm)
        check.flag("tied", tied)
        check.number("dropout", dropout, 0, 1, include_above=True)
        check.number("rotary_base", rotary_base, 0, math.inf, include_above=False)
        check_scaling(rotary_scaling)
        kv_heads = heads if kv_heads is None else kv_heads
        if feedforward_width is None:
            feedforward_width = 64 * math.ceil(width / 24) if activation in GATED else 4 * width
        check.size("kv_heads", kv_heads)
        check.size("feedforward_width", feedforward_width)
        check.divides("heads", heads, "kv_heads", kv_heads)
        if head_width is None:
            check.divides("width", width, "heads", heads)
            head_width = width // heads
        check.size("head_width", head_width)
        if position == "rotary" and head_width * heads == width:
            check.divides("width", width, "2 x heads (rotary turns pairs)", 2 * heads)
        elif position == "rotary":
            check.divides("head_width", head_width, "a pair (which rotary turns) of", 2)
        elif rotary_scaling is not None:
            raise ValueError(f"model.rotary_scaling: is of no use with position={position}; drop one of them")

        self.vocabulary_size, self.sequence_length = vocabulary_size, sequence_length
        self.layers, self.width, self.heads, self.kv_heads = layers, width, heads, kv_heads
        self.head_width, self.rotary_base, self.rotary_scaling = head_width, rotary_base, rotary_scaling
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
                head_width=head_width,
                norm=norm,
                norm_eps=norm_eps,
                activation=activation,
                bias=bias,
                qk_norm=qk_norm,
                dropout=dropout,
                residual_std=INIT_STD / math.sqrt(2 * layers),  # GPT-2, section 2.3: 2 residual sums a layer
            )
            for _ in range(layers)
        )
        self.norm = make_norm(norm, width, bias, norm_eps)
        self.head = LMHead(vocabulary_size, width, self.embedding.weight if tied else None)

    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        cache: list[LayerCache] | None = None,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V]; or, with labels, the fp32 scalar sum of the token losses in nats (-100: no loss).

        With a cache (see `new_cache`) the tokens follow those already in it, and are added to it. With
        documents, int32 ids, neighbours of one id are a text of their own: positions start anew, and no token
        sees another text.
        """
        if cache and documents_BT is not None:
            raise ValueError("documents: a cache holds one text a sequence; give one or the other")
        start = cache[0].length if cache else 0
        end = start + tokens_BT.shape[1]
        if end > self.sequence_length:
            raise ValueError(f"tokens: {end} exceed model.sequence_length {self.sequence_length}; give fewer")
        documents = None if documents_BT is None else Documents(documents_BT)
        positions = torch.arange(start, end, device=tokens_BT.device)
        if documents is not None:
            positions = documents.positions_BT
        x_BTD, rotary = self.embedding(tokens_BT), None
        if self.positions is None:
            rotary = rotary_table(positions, self.head_width, self.rotary_base, self.rotary_scaling)
        else:
            x_BTD = x_BTD + self.positions(positions)
        x_BTD = self.dropout(x_BTD)
        for layer, block in enumerate(self.blocks):
            if self.activation_checkpointing and self.training:
                x_BTD = checkpoint(block, x_BTD, rotary, None, documents, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, rotary, cache[layer] if cache else None, documents)
        return self.head(self.norm(x_BTD), labels_BT)

    @property
    def tables(self) -> list[nn.Embedding]:
        """The embeddings that are looked up."""
        return [self.embedding] if self.positions is None else [self.embedding, self.positions]

    def forward_flops(self, sequence_length: int, predicted_share: float = 1.0) -> int:
        """FLOP of one sequence, with logits at that share of its positions; see model/flops.py."""
        scores = 4 * self.layers * sequence_length * self.heads * self.head_width
        blocks = sequence_length * (linear_flops(self.blocks) + scores)
        return blocks + round(sequence_length * predicted_share) * 2 * self.vocabulary_size * self.width

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
        shape = batch, self.sequence_length, self.kv_heads, self.head_width
        return [LayerCache(*shape, weight.dtype, weight.device) for _ in self.blocks]
