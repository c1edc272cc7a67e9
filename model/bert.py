"""BERT: a bidirectional transformer that predicts masked tokens (arXiv 1810.04805).

Shapes: B batch, T sequence, N positions with a label, D model width, V vocabulary.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import check
from model.attention import Attention
from model.documents import Documents
from model.flops import linear_flops
from model.heads import IGNORED, LMHead
from model.layers import ACTIVATIONS, INIT_STD, Embedding, Linear
from model.positions import Sinusoidal
from model.rotary import Table, rotary_table

ROTARY_BASE = 10000.0
Function = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """Post-norm block, norm(x + attention(x)) and norm(x + feedforward(x)); or pre-norm as GPT's."""

    def __init__(
        self,
        width: int,
        heads: int,
        feedforward_width: int,
        *,
        norm_first: bool,
        activation: str,
        bias: bool,
        dropout: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention = Attention(
            width,
            heads,
            heads,
            bias=bias,
            qk_norm=False,
            dropout=dropout,
            residual_std=INIT_STD,
            causal=False,
        )
        self.attention_norm = nn.LayerNorm(width, eps=norm_eps)
        self.feedforward = ACTIVATIONS[activation](width, feedforward_width, bias, INIT_STD)
        self.feedforward_norm = nn.LayerNorm(width, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_BTD: Tensor, rotary: Table | None = None, documents: Documents | None = None
    ) -> Tensor:
        attention = partial(self.attention, rotary=rotary, documents=documents)
        if self.norm_first:
            x_BTD = x_BTD + self.dropout(attention(self.attention_norm(x_BTD)))
            return x_BTD + self.dropout(self.feedforward(self.feedforward_norm(x_BTD)))
        x_BTD = self.attention_norm(x_BTD + self.dropout(attention(x_BTD)))
        return self.feedforward_norm(x_BTD + self.dropout(self.feedforward(x_BTD)))


class BERT(nn.Module):
    """An encoder with a masked-token head, initialised as BERT from torch's global random state.

    Args:
        vocabulary_size, sequence_length, layers, width, heads: sizes; `width` is a multiple of `heads`.
        feedforward_width: inner width; None means 4 width.
        position: "learned" table, "rotary", or "sinusoidal" with a learned scale.
        norm_first: norms before attention and feed-forward, and one at the end, instead of after each sum.
        activation: of the feed-forward, see `model.layers.ACTIVATIONS`, and of the head's transform, ungated.
        bias: whether linear maps and the head have biases (LayerNorms always have).
        segments: kinds of segment (sentence A and B), each with an embedding; 0 for none.
        transform: a linear map, activation and norm between the last block and the head.
        tied: the head's weight is the token table: one Parameter, registered in both modules.
        pair_head: classifies a pair of segments by the first position, through a pooler with tanh.
        dropout: probability, of embeddings, attention weights and both branches of every block.
        norm_eps: added to the variance in every norm.

    Raises ValueError with one line that begins with `model.<key>:` for an argument that cannot be.
    """

    family = "encoder"

    def __init__(
        self,
        *,
        vocabulary_size: int,
        sequence_length: int,
        layers: int,
        width: int,
        heads: int,
        feedforward_width: int | None = None,
        position: str = "learned",
        norm_first: bool = False,
        activation: str = "gelu",
        bias: bool = True,
        segments: int = 2,
        transform: bool = True,
        tied: bool = True,
        pair_head: bool = False,
        dropout: float = 0.0,
        norm_eps: float = 1e-12,
    ) -> None:
        super().__init__()
        check.size("vocabulary_size", vocabulary_size)
        check.size("sequence_length", sequence_length)
        check.size("layers", layers)
        check.size("width", width)
        check.size("heads", heads)
        check.choice("position", position, ("learned", "rotary", "sinusoidal"))
        check.choice("activation", activation, tuple(ACTIVATIONS))
        for key, value in (
            ("norm_first", norm_first),
            ("bias", bias),
            ("transform", transform),
            ("tied", tied),
            ("pair_head", pair_head),
        ):
            check.flag(key, value)
        if segments != 0:
            check.size("segments", segments)
        check.number("dropout", dropout, 0, 1, include_above=True)
        check.number("norm_eps", norm_eps, 0, 1, include_above=False)
        feedforward_width = 4 * width if feedforward_width is None else feedforward_width
        check.size("feedforward_width", feedforward_width)
        check.divides("width", width, "heads", heads)
        if position == "rotary":
            check.divides("width", width, "2 x heads (rotary turns pairs)", 2 * heads)
        if position == "sinusoidal":
            check.divides("width", width, "2 (a sine and a cosine each)", 2)

        self.vocabulary_size, self.sequence_length = vocabulary_size, sequence_length
        self.layers, self.width, self.heads = layers, width, heads
        self.activation_checkpointing = False
        self.embedding = Embedding(vocabulary_size, width)
        self.positions: nn.Module | None = None  # rotary ones are in the blocks
        if position == "learned":
            self.positions = Embedding(sequence_length, width)
        elif position == "sinusoidal":
            self.positions = Sinusoidal(width, scaled=True)
        self.segments = Embedding(segments, width) if segments else None
        self.embedding_norm = nn.LayerNorm(width, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                feedforward_width,
                norm_first=norm_first,
                activation=activation,
                bias=bias,
                dropout=dropout,
                norm_eps=norm_eps,
            )
            for _ in range(layers)
        )
        self.function: Function = self.blocks[0].feedforward.function  # type: ignore[union-attr,assignment]
        self.norm = nn.LayerNorm(width, eps=norm_eps) if norm_first else None
        self.transform = Linear(width, width, bias) if transform else None
        self.transform_norm = nn.LayerNorm(width, eps=norm_eps) if transform else None
        self.head = LMHead(vocabulary_size, width, self.embedding.weight if tied else None, bias=bias)
        self.pooler = Linear(width, width) if pair_head else None
        self.pair_head = Linear(width, 2) if pair_head else None

    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        pairs: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, T, V]; or, with labels, the fp32 scalar sum of the token losses in nats (-100: no loss).

        documents_BT: ids; positions restart with each, and nothing is attended to outside of the own one.
        segments_BT: from 0; None means all 0. pairs: return the pair head's logits [B, 2] as well.
        Only the positions with a label go through the transform and the head.
        """
        if tokens_BT.shape[1] > self.sequence_length:
            length = f"model.sequence_length {self.sequence_length}"
            raise ValueError(f"tokens: {tokens_BT.shape[1]} exceed {length}; give fewer")
        hidden_BTD = self.encode(tokens_BT, documents_BT, segments_BT)
        if labels_BT is None:
            result = self.head(self._transformed(hidden_BTD))
        else:
            labelled_N = (labels_BT.flatten() != IGNORED).nonzero()[:, 0]
            hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, labelled_N)
            result = self.head(self._transformed(hidden_ND), labels_BT.flatten()[labelled_N])
        if not pairs:
            return result
        if self.pooler is None or self.pair_head is None:
            raise ValueError("model.pair_head: is false, but pairs are to be classified; set it to true")
        return result, self.pair_head(self.pooler(hidden_BTD[:, 0]).tanh())

    def encode(
        self, tokens_BT: Tensor, documents_BT: Tensor | None = None, segments_BT: Tensor | None = None
    ) -> Tensor:
        """The last hidden states [B, T, D]; for the arguments see `forward`."""
        positions, rotary = torch.arange(tokens_BT.shape[1], device=tokens_BT.device), None
        documents = None if documents_BT is None else Documents(documents_BT)
        if documents is not None:
            positions = documents.positions_BT
        x_BTD = self.embedding(tokens_BT)
        if self.segments is not None:
            x_BTD = x_BTD + self.segments(torch.zeros_like(tokens_BT) if segments_BT is None else segments_BT)
        elif segments_BT is not None:
            raise ValueError("model.segments: is 0, but the batch has segments; set it to 2")
        if self.positions is None:
            rotary = rotary_table(positions, self.width // self.heads, ROTARY_BASE)
        else:
            x_BTD = x_BTD + self.positions(positions).to(x_BTD.dtype)
        x_BTD = self.dropout(self.embedding_norm(x_BTD))
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x_BTD = checkpoint(block, x_BTD, rotary, documents, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, rotary, documents)
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def _transformed(self, hidden_BTD: Tensor) -> Tensor:
        if self.transform is None or self.transform_norm is None:
            return hidden_BTD
        return self.transform_norm(self.function(self.transform(hidden_BTD)))

    @property
    def tables(self) -> list[nn.Embedding]:
        """The embeddings that are looked up."""
        candidates = (self.embedding, self.positions, self.segments)
        return [table for table in candidates if isinstance(table, nn.Embedding)]

    def forward_flops(self, sequence_length: int, predicted_share: float = 1.0) -> int:
        """FLOP of one sequence, with logits at that share of its positions; see model/flops.py.

        A pair head is counted where the model has one.
        """
        scores = 4 * self.layers * sequence_length * self.width
        blocks = sequence_length * (linear_flops(self.blocks) + scores)
        head = 2 * self.vocabulary_size * self.width + (2 * self.width**2 if self.transform else 0)
        pair = 2 * self.width**2 + 4 * self.width if self.pair_head else 0
        return blocks + round(sequence_length * predicted_share) * head + pair

    def reset_parameters(self) -> None:
        """Initialise every weight anew from torch's global random state, as the constructor does.

        For a model built on the meta device, after `to_empty(device=...)`.
        """
        if self.head.tied:  # `to_empty` gave each of the two modules a tensor of its own
            self.head.weight = self.embedding.weight
        for module in self.modules():
            if isinstance(module, Linear | Embedding | LMHead | nn.LayerNorm | Sinusoidal):
                module.reset_parameters()
