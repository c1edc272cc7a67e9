"""Which parameter here is which tensor of a Hugging Face model, and how the one becomes the other.

The tables are data; `model.hf` applies them. Shapes: H heads, K head width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class How:
    """One tensor of ours into theirs, and theirs into ours. Both get the model, for its numbers of heads."""

    split: Callable[[Tensor, Any], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor], Any], Tensor]


def _turn(tensor: Tensor) -> Tensor:
    return tensor.T if tensor.dim() == 2 else tensor


def _heads(tensor: Tensor, model: Any) -> Sequence[Tensor]:
    groups = model.heads // model.kv_heads
    kv_width = len(tensor) // (groups + 2)
    return tensor.split((groups * kv_width, kv_width, kv_width))


def _join(theirs: Sequence[Tensor], model: Any) -> Tensor:
    return torch.cat(list(theirs))


SAME = How(lambda ours, model: [ours], lambda theirs, model: theirs[0])
TRANSPOSED = How(lambda ours, model: [_turn(ours)], lambda theirs, model: _turn(theirs[0]))
HALVES = How(lambda ours, model: ours.chunk(2), _join)
THIRDS = How(lambda ours, model: ours.chunk(3), _join)
GROUPED = How(_heads, _join)  # queries, and fewer keys and values
INTERLEAVED = How(  # [3, H, K, ...] here, [H, 3, K, ...] there
    lambda ours, model: [ours.unflatten(0, (3, model.heads, -1)).transpose(0, 1).flatten(0, 2)],
    lambda theirs, model: theirs[0].unflatten(0, (model.heads, 3, -1)).transpose(0, 1).flatten(0, 2),
)

BOTH, WEIGHT, BIAS = ("weight", "bias"), ("weight",), ("bias",)


@dataclass(frozen=True)
class Key:
    """A module of ours, `{layer}` standing for a number, and theirs: several where theirs are apart.

    parts: of the module that they have. also: further names of the same tensor; a file may hold any of them.
    copies: names that they keep a second tensor under, which nothing reads.
    """

    ours: str
    theirs: tuple[str, ...]
    how: How = SAME
    parts: tuple[str, ...] = BOTH
    also: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """prefix: of all but their head's tensors, which files of the model without a head lack.
    zeros: what they have though we may not, as zeros (see `Key.ours`): "bias" for every bias.
    skipped: patterns of what files hold that is no parameter."""

    keys: tuple[Key, ...]
    prefix: str = ""
    heads: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


GPT2 = Table(
    prefix="transformer.",
    heads=("lm_head.",),
    zeros=("bias",),
    skipped=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
    keys=(
        Key("embedding", ("transformer.wte",), parts=WEIGHT),
        Key("positions", ("transformer.wpe",), parts=WEIGHT),
        Key("blocks.{layer}.attention_norm", ("transformer.h.{layer}.ln_1",)),
        Key("blocks.{layer}.attention.qkv", ("transformer.h.{layer}.attn.c_attn",), TRANSPOSED),
        Key("blocks.{layer}.attention.project", ("transformer.h.{layer}.attn.c_proj",), TRANSPOSED),
        Key("blocks.{layer}.feedforward_norm", ("transformer.h.{layer}.ln_2",)),
        Key("blocks.{layer}.feedforward.expand", ("transformer.h.{layer}.mlp.c_fc",), TRANSPOSED),
        Key("blocks.{layer}.feedforward.project", ("transformer.h.{layer}.mlp.c_proj",), TRANSPOSED),
        Key("norm", ("transformer.ln_f",)),
        Key("head", ("lm_head",), parts=WEIGHT),
    ),
)

_LLAMA = "model.layers.{layer}"
LLAMA = Table(
    prefix="model.",
    heads=("lm_head.",),
    skipped=(r".*\.rotary_emb\.inv_freq",),
    keys=(
        Key("embedding", ("model.embed_tokens",), parts=WEIGHT),
        Key("blocks.{layer}.attention_norm", (f"{_LLAMA}.input_layernorm",), parts=WEIGHT),
        Key(
            "blocks.{layer}.attention.qkv",
            tuple(f"{_LLAMA}.self_attn.{part}_proj" for part in "qkv"),
            GROUPED,
        ),
        Key("blocks.{layer}.attention.project", (f"{_LLAMA}.self_attn.o_proj",)),
        Key("blocks.{layer}.feedforward_norm", (f"{_LLAMA}.post_attention_layernorm",), parts=WEIGHT),
        Key(
            "blocks.{layer}.feedforward.expand",
            (f"{_LLAMA}.mlp.gate_proj", f"{_LLAMA}.mlp.up_proj"),
            HALVES,
        ),
        Key("blocks.{layer}.feedforward.project", (f"{_LLAMA}.mlp.down_proj",)),
        Key("norm", ("model.norm",), parts=WEIGHT),
        Key("head", ("lm_head",), parts=WEIGHT),
    ),
)

_NEOX = "gpt_neox.layers.{layer}"
GPT_NEOX = Table(
    prefix="gpt_neox.",
    heads=("lm_head.", "embed_out."),
    zeros=("bias",),
    skipped=(r".*\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",),
    keys=(
        Key("embedding", ("gpt_neox.embed_in",), parts=WEIGHT),
        Key("blocks.{layer}.attention_norm", (f"{_NEOX}.input_layernorm",)),
        Key("blocks.{layer}.attention.qkv", (f"{_NEOX}.attention.query_key_value",), INTERLEAVED),
        Key("blocks.{layer}.attention.project", (f"{_NEOX}.attention.dense",)),
        Key("blocks.{layer}.feedforward_norm", (f"{_NEOX}.post_attention_layernorm",)),
        Key("blocks.{layer}.feedforward.expand", (f"{_NEOX}.mlp.dense_h_to_4h",)),
        Key("blocks.{layer}.feedforward.project", (f"{_NEOX}.mlp.dense_4h_to_h",)),
        Key("norm", ("gpt_neox.final_layer_norm",)),
        Key("head", ("embed_out",), parts=WEIGHT, also=("lm_head",)),
    ),
)

_BERT = "bert.encoder.layer.{layer}"
_BERT_KEYS = (
    Key("embedding", ("bert.embeddings.word_embeddings",), parts=WEIGHT),
    Key("positions", ("bert.embeddings.position_embeddings",), parts=WEIGHT),
    Key("segments", ("bert.embeddings.token_type_embeddings",), parts=WEIGHT),
    Key("embedding_norm", ("bert.embeddings.LayerNorm",)),
    Key(
        "blocks.{layer}.attention.qkv",
        tuple(f"{_BERT}.attention.self.{part}" for part in ("query", "key", "value")),
        THIRDS,
    ),
    Key("blocks.{layer}.attention.project", (f"{_BERT}.attention.output.dense",)),
    Key("blocks.{layer}.attention_norm", (f"{_BERT}.attention.output.LayerNorm",)),
    Key("blocks.{layer}.feedforward.expand", (f"{_BERT}.intermediate.dense",)),
    Key("blocks.{layer}.feedforward.project", (f"{_BERT}.output.dense",)),
    Key("blocks.{layer}.feedforward_norm", (f"{_BERT}.output.LayerNorm",)),
    Key("transform", ("cls.predictions.transform.dense",)),
    Key("transform_norm", ("cls.predictions.transform.LayerNorm",)),
    Key("pooler", ("bert.pooler.dense",)),
    Key("pair_head", ("cls.seq_relationship",)),
)
_BERT_REST: dict[str, Any] = {
    "prefix": "bert.",
    "heads": ("cls.",),
    "zeros": ("bias", "segments.weight"),
    "skipped": (r"bert\.embeddings\.(position_ids|token_type_ids)",),
}
# Where the weights are tied, so are the biases, by the first name; where not, the second is the one used.
BERT_TIED = Table(
    keys=(
        *_BERT_KEYS,
        Key("head", ("cls.predictions.decoder",), parts=WEIGHT),
        Key("head", ("cls.predictions",), parts=BIAS, also=("cls.predictions.decoder",)),
    ),
    **_BERT_REST,
)
BERT_UNTIED = Table(
    keys=(
        *_BERT_KEYS,
        Key("head", ("cls.predictions.decoder",), parts=WEIGHT),
        Key("head", ("cls.predictions.decoder",), parts=BIAS, copies=("cls.predictions",)),
    ),
    **_BERT_REST,
)


def _t5_layers(stack: str, feedforward: int) -> tuple[Key, ...]:
    theirs, first = stack + ".block.{layer}.layer", f"{stack}.block.0.layer.0.SelfAttention"
    return (
        Key(f"{stack}.{{layer}}.attention_norm", (f"{theirs}.0.layer_norm",), parts=WEIGHT),
        Key(
            f"{stack}.{{layer}}.attention.qkv",
            tuple(f"{theirs}.0.SelfAttention.{part}" for part in "qkv"),
            THIRDS,
            parts=WEIGHT,
        ),
        Key(f"{stack}.{{layer}}.attention.project", (f"{theirs}.0.SelfAttention.o",), parts=WEIGHT),
        Key(f"{stack}.{{layer}}.feedforward_norm", (f"{theirs}.{feedforward}.layer_norm",), parts=WEIGHT),
        Key(
            f"{stack}.{{layer}}.feedforward.project",
            (f"{theirs}.{feedforward}.DenseReluDense.wo",),
            parts=WEIGHT,
        ),
        Key(f"{stack}_bias", (f"{first}.relative_attention_bias",), parts=WEIGHT),
        Key(f"{stack}_norm", (f"{stack}.final_layer_norm",), parts=WEIGHT),
    )


def _t5_expand(*inner: str) -> tuple[Key, ...]:
    """The inner maps of both stacks: `wi`, or `wi_0` for the gate and `wi_1`."""
    return tuple(
        Key(
            f"{stack}.{{layer}}.feedforward.expand",
            tuple(f"{stack}.block.{{layer}}.layer.{number}.DenseReluDense.{name}" for name in inner),
            HALVES if len(inner) == 2 else SAME,
            parts=WEIGHT,
        )
        for stack, number in (("encoder", 1), ("decoder", 2))
    )


_CROSS = "decoder.block.{layer}.layer.1"
_T5_KEYS = (
    Key("embedding", ("shared",), parts=WEIGHT, also=("encoder.embed_tokens", "decoder.embed_tokens")),
    *_t5_layers("encoder", 1),
    *_t5_layers("decoder", 2),
    Key("decoder.{layer}.cross_norm", (f"{_CROSS}.layer_norm",), parts=WEIGHT),
    Key("decoder.{layer}.cross.query", (f"{_CROSS}.EncDecAttention.q",), parts=WEIGHT),
    Key(
        "decoder.{layer}.cross.key_value",
        (f"{_CROSS}.EncDecAttention.k", f"{_CROSS}.EncDecAttention.v"),
        HALVES,
        parts=WEIGHT,
    ),
    Key("decoder.{layer}.cross.project", (f"{_CROSS}.EncDecAttention.o",), parts=WEIGHT),
    Key("head", ("lm_head",), parts=WEIGHT),
)
_T5_SKIPPED = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)
T5 = Table(keys=(*_T5_KEYS, *_t5_expand("wi")), skipped=_T5_SKIPPED)
T5_GATED = Table(keys=(*_T5_KEYS, *_t5_expand("wi_0", "wi_1")), skipped=_T5_SKIPPED)
