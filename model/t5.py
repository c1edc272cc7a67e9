"""T5: an encoder-decoder with relative positions (arXiv 1910.10683); by options that of arXiv 1706.03762.

Shapes: B batch, S encoder inputs, T decoder inputs, D model width, H heads, K head width, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import check
from model.attention import LayerCache
from model.flops import linear_flops
from model.heads import LMHead
from model.layers import Embedding, Linear, make_norm
from model.positions import RelativeBias, Sinusoidal, unseen
from model.t5_block import FUNCTIONS, Block, BlockCache, Shape


class T5(nn.Module):
    """An encoder-decoder language model, initialised as T5 from torch's global random state.

    The defaults are T5's. The original of 2017 has position="sinusoidal", norm="layernorm", norm_first=False,
    norm_eps=1e-5, bias=True, scaled_attention=True and scaled_embedding=True.

    Args:
        vocabulary_size, width, heads, layers: sizes; `layers` are the encoder's.
        sequence_length: the most encoder inputs. target_length: the most decoder inputs; None: as many.
        decoder_layers: None means `layers`.
        head_width: of queries, keys and values; None means width / heads.
        feedforward_width: inner width; None means 4 width.
        position: "relative", with that many `buckets` up to `max_distance`, a table for the encoder and one
            for the decoder, each shared by all layers; or "sinusoidal".
        norm: "rmsnorm" or "layernorm" (with bias). norm_eps: added to the variance.
        norm_first: norms before each branch and at the end of encoder and decoder, not after each sum.
        activation: of the feed-forward: "relu", or gated "geglu_tanh" (T5 1.1) or "swiglu".
        bias: whether linear maps have biases (the head never has).
        scaled_attention: divide scores by sqrt(head_width); T5 starts with smaller queries instead.
        scaled_embedding: multiply looked-up tokens by sqrt(width); their table starts that much smaller.
        tied: the head's weight is the token table, one Parameter; without `scaled_embedding` its input is
            divided by sqrt(width), which an untied head's is not.
        dropout: probability, of embeddings, attention weights, inner layers, all branches and final states.

    Raises ValueError with one line that begins with `model.<key>:` for an argument that cannot be.
    """

    family = "encoder-decoder"

    def __init__(
        self,
        *,
        vocabulary_size: int,
        sequence_length: int,
        layers: int,
        width: int,
        heads: int,
        target_length: int | None = None,
        decoder_layers: int | None = None,
        head_width: int | None = None,
        feedforward_width: int | None = None,
        position: str = "relative",
        buckets: int = 32,
        max_distance: int = 128,
        norm: str = "rmsnorm",
        norm_first: bool = True,
        norm_eps: float = 1e-6,
        activation: str = "relu",
        bias: bool = False,
        scaled_attention: bool = False,
        scaled_embedding: bool = False,
        tied: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        target_length = sequence_length if target_length is None else target_length
        decoder_layers = layers if decoder_layers is None else decoder_layers
        for key, value in (
            ("vocabulary_size", vocabulary_size),
            ("sequence_length", sequence_length),
            ("target_length", target_length),
            ("layers", layers),
            ("decoder_layers", decoder_layers),
            ("width", width),
            ("heads", heads),
            ("buckets", buckets),
            ("max_distance", max_distance),
        ):
            check.size(key, value)
        if head_width is None:
            check.divides("width", width, "heads (or give head_width)", heads)
            head_width = width // heads
        feedforward_width = 4 * width if feedforward_width is None else feedforward_width
        check.size("head_width", head_width)
        check.size("feedforward_width", feedforward_width)
        check.choice("position", position, ("relative", "sinusoidal"))
        check.divides("buckets", buckets, "4 (before and after, near and far)", 4)
        check.number("max_distance", max_distance, buckets // 2, float("inf"), include_above=False)
        check.choice("norm", norm, ("rmsnorm", "layernorm"))
        check.choice("activation", activation, tuple(FUNCTIONS))
        for key, flag in (
            ("norm_first", norm_first),
            ("bias", bias),
            ("scaled_attention", scaled_attention),
            ("scaled_embedding", scaled_embedding),
            ("tied", tied),
        ):
            check.flag(key, flag)
        check.number("norm_eps", norm_eps, 0, 1, include_above=False)
        check.number("dropout", dropout, 0, 1, include_above=True)
        if position == "sinusoidal":
            check.divides("width", width, "2 (a sine and a cosine each)", 2)

        self.vocabulary_size, self.sequence_length = vocabulary_size, sequence_length
        self.target_length, self.layers, self.decoder_layers = target_length, layers, decoder_layers
        self.width = width
        self.activation_checkpointing = False
        self.shape = Shape(
            width=width,
            heads=heads,
            head_width=head_width,
            feedforward_width=feedforward_width,
            norm=norm,
            norm_first=norm_first,
            norm_eps=norm_eps,
            activation=activation,
            bias=bias,
            scaled_attention=scaled_attention,
            dropout=dropout,
        )
        # Whether in the table or at its two ends, the factors make looked-up tokens and logits of order one.
        self.embedding = Embedding(vocabulary_size, width, std=width**-0.5 if scaled_embedding else 1.0)
        self.embedding_factor = width**0.5 if scaled_embedding else 1.0
        self.head_factor = width**-0.5 if tied and not scaled_embedding else 1.0
        relative = position == "relative"
        self.positions = None if relative else Sinusoidal(width)
        std = width**-0.5
        self.encoder_bias = RelativeBias(buckets, max_distance, heads, False, std) if relative else None
        self.decoder_bias = RelativeBias(buckets, max_distance, heads, True, std) if relative else None
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(Block(self.shape, decoder=False) for _ in range(layers))
        self.decoder = nn.ModuleList(Block(self.shape, decoder=True) for _ in range(decoder_layers))
        layernorm = norm == "layernorm"
        self.encoder_norm = make_norm(norm, width, layernorm, norm_eps) if norm_first else None
        self.decoder_norm = make_norm(norm, width, layernorm, norm_eps) if norm_first else None
        self.head = LMHead(vocabulary_size, width, self.embedding.weight if tied else None, std=width**-0.5)

    def forward(
        self,
        inputs_BS: Tensor,
        decoder_BT: Tensor,
        labels_BT: Tensor | None = None,
        documents_BS: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V]; or, with labels, the fp32 scalar sum of the token losses in nats (-100: no loss).

        documents_BS: 0 for inputs, -1 for padding, which nothing attends to.
        """
        encoded_BSD = self.encode(inputs_BS, documents_BS)
        hidden_BTD = self.decode(decoder_BT, encoded_BSD, documents_BS)
        return self.head(hidden_BTD, labels_BT)

    def encode(self, inputs_BS: Tensor, documents_BS: Tensor | None = None) -> Tensor:
        """The encoder's output [B, S, D]."""
        length = inputs_BS.shape[1]
        if length > self.sequence_length:
            raise ValueError(
                f"inputs: {length} exceed model.sequence_length {self.sequence_length}; give fewer"
            )
        positions_S = torch.arange(length, device=inputs_BS.device)
        x_BSD = self._embed(inputs_BS, positions_S)
        bias = _padding_mask(documents_BS, x_BSD.dtype)
        if self.encoder_bias is not None:
            relative_1HSS = self.encoder_bias(positions_S, positions_S)
            bias = relative_1HSS if bias is None else relative_1HSS + bias
        for block in self.encoder:
            x_BSD = self._run(block, x_BSD, bias)
        return x_BSD if self.encoder_norm is None else self.dropout(self.encoder_norm(x_BSD))

    def decode(
        self,
        decoder_BT: Tensor,
        encoded_BSD: Tensor,
        documents_BS: Tensor | None = None,
        cache: list[BlockCache] | None = None,
    ) -> Tensor:
        """What the head takes [B, T, D], from decoder tokens and what `encode` returned.

        With a cache (see `new_cache`) the tokens follow those already in it, and are added to it.
        """
        start = cache[0].own.length if cache else 0
        end = start + decoder_BT.shape[1]
        if end > self.target_length:
            raise ValueError(f"decoder: {end} exceed model.target_length {self.target_length}; give fewer")
        positions = torch.arange(end, device=decoder_BT.device)
        x_BTD = self._embed(decoder_BT, positions[start:])
        bias = None if self.decoder_bias is None else self.decoder_bias(positions[start:], positions)
        mask = _padding_mask(documents_BS, x_BTD.dtype)
        for layer, block in enumerate(self.decoder):
            x_BTD = self._run(block, x_BTD, bias, encoded_BSD, mask, cache[layer] if cache else None)
        x_BTD = x_BTD if self.decoder_norm is None else self.dropout(self.decoder_norm(x_BTD))
        return x_BTD * self.head_factor

    def new_cache(self, batch: int) -> list[BlockCache]:
        """An empty key-value cache for `batch` decoder sequences of up to `target_length` tokens."""
        weight, shape = self.embedding.weight, self.shape
        size = (batch, self.target_length, shape.heads, shape.head_width)
        return [BlockCache(LayerCache(*size, weight.dtype, weight.device)) for _ in self.decoder]

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embedding(tokens) * self.embedding_factor
        if self.positions is not None:
            x = x + self.positions(positions).to(x.dtype)
        return self.dropout(x)

    def _run(self, block: nn.Module, *arguments: object) -> Tensor:
        if self.activation_checkpointing and self.training:
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    @property
    def blocks(self) -> list[nn.Module]:
        """Those of the encoder, then those of the decoder."""
        return [*self.encoder, *self.decoder]

    @property
    def tables(self) -> list[nn.Embedding]:
        """The embeddings that are looked up."""
        biases = (self.encoder_bias, self.decoder_bias)
        return [self.embedding, *(table for table in biases if table is not None)]

    def forward_flops(self, sequence_length: int, predicted_share: float = 1.0) -> int:
        """FLOP of one sequence; see model/flops.py.

        predicted_share: decoder tokens, every one of which is predicted, for each of the encoder's inputs.
        """
        targets, inner = round(predicted_share * sequence_length), self.shape.inner
        # The decoder's keys and values of the encoder's output are as many as the inputs, not the targets.
        crossed = self.decoder_layers * 4 * self.width * inner
        inputs = linear_flops(self.encoder) + crossed + 4 * self.layers * sequence_length * inner
        outputs = linear_flops(self.decoder) - crossed + 2 * self.vocabulary_size * self.width
        outputs += 4 * self.decoder_layers * (targets + sequence_length) * inner
        return sequence_length * inputs + targets * outputs

    def reset_parameters(self) -> None:
        """Initialise every weight anew from torch's global random state, as the constructor does.

        For a model built on the meta device, after `to_empty(device=...)`.
        """
        if self.head.tied:  # `to_empty` gave each of the two modules a tensor of its own
            self.head.weight = self.embedding.weight
        for module in self.modules():
            if isinstance(module, Linear | Embedding | LMHead | nn.LayerNorm | nn.RMSNorm):
                module.reset_parameters()


def _padding_mask(documents_BS: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """To be added to scores, [B, 1, 1, S]: 0, and `unseen` for padding."""
    if documents_BS is None:
        return None
    padding_B11S = (documents_BS < 0)[:, None, None]
    return torch.zeros_like(padding_B11S, dtype=dtype).masked_fill(padding_B11S, unseen(dtype))
