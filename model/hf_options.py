"""Options to and from Hugging Face transformers: what config.json holds there, constructor arguments here.

Both are plain dictionaries. What only one of the two can express is refused in one line that names it.
"""

from typing import Any

from torch import nn

from model.bert import BERT
from model.gpt import GPT
from model.hf_dialects import DIALECTS, ROTARY
from model.hf_rotary import read_rotary, write_rotary
from model.layers import ACTIVATIONS
from model.t5 import T5

Options = dict[str, Any]


def hf_config(
    model: nn.Module, bos: int | None = None, eos: int | None = None, pad: int | None = None
) -> Options:
    """What config.json holds for a model, and for the ids of the tokens that begin, end and pad a text.

    Raises ValueError in one line for an option that transformers has no equal for.
    """
    kind, arguments = model_type(model), arguments_of(model)
    dialect = DIALECTS[kind]
    config: Options = {"model_type": kind, "architectures": [dialect.architecture], "torch_dtype": "float32"}
    config |= {theirs: arguments[ours] for ours, theirs in dialect.same.items()} | dict(dialect.fixed)
    activations = {ours: theirs for theirs, ours in reversed(list(dialect.activations.items()))}
    config[dialect.activation] = activations[arguments["activation"]]
    config |= dict.fromkeys(dialect.dropouts, arguments["dropout"])
    if kind in ROTARY:
        rotary = (arguments["rotary_base"], arguments["rotary_scaling"], arguments["head_width"])
        config |= write_rotary(*rotary, base_key=ROTARY[kind][0])
    if kind == "llama":
        # Of dropout they have only a part, so it is left out.
        config |= {"mlp_bias": arguments["bias"], "attention_dropout": 0.0}
    if kind == "gpt_neox":
        config["rotary_pct"] = 1.0
    if kind == "bert":
        config["type_vocab_size"] = max(1, arguments["segments"])  # without them, as if all were of one kind
        if arguments["pair_head"]:
            config["architectures"] = ["BertForPreTraining"]
    if kind == "t5":
        config["decoder_start_token_id"] = pad
    return config | {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}


def model_arguments(config: Options) -> Options:
    """The `_target_` and the arguments that make the model of a config.json.

    Raises ValueError in one line that begins with their key for what has no equal here.
    """
    kind = config.get("model_type")
    if kind not in DIALECTS:
        raise ValueError(f"model_type: {kind} is none of {', '.join(DIALECTS)}")
    dialect = DIALECTS[kind]
    config = {**dialect.fixed, **dialect.defaults, **config}
    for key, value in dialect.fixed.items():
        if config[key] != value:
            raise ValueError(f"{key}: {config[key]} has no equal here, where it is {value} for {kind}")
    lacking = sorted(key for key in dialect.same.values() if key not in config)
    if lacking:
        raise ValueError(f"{lacking[0]}: is missing in the {kind} configuration")
    name = config[dialect.activation]
    if name not in dialect.activations:
        known = ", ".join(dialect.activations)
        raise ValueError(f"{dialect.activation}: {name} has no equal here; there are {known}")
    dropouts = {key: config[key] for key in dialect.dropouts}
    if len(set(dropouts.values())) > 1:
        said = ", ".join(f"{key} {value}" for key, value in dropouts.items())
        raise ValueError(f"{dialect.dropouts[0]}: {said} differ, but model.dropout is one number")
    arguments = {ours: config[theirs] for ours, theirs in dialect.same.items()}
    arguments |= {"activation": dialect.activations[name], "dropout": config[dialect.dropouts[0]]}
    arguments |= dialect.ours
    return {"_target_": dialect.target} | _rest(kind, config, arguments)


def _rest(kind: str, config: Options, arguments: Options) -> Options:
    """`arguments` with what they say in another way, and with what null stands for."""
    if kind == "llama":
        if config["mlp_bias"] != config["attention_bias"]:
            raise ValueError("mlp_bias: differs from attention_bias, but model.bias is for both")
        if config["attention_dropout"]:
            raise ValueError("attention_dropout: has no equal here by itself; set it to 0")
        arguments["kv_heads"] = arguments["kv_heads"] or arguments["heads"]
        arguments["head_width"] = arguments["head_width"] or arguments["width"] // arguments["heads"]
    if kind in ROTARY:
        arguments |= read_rotary(config, *ROTARY[kind])
    if kind == "bert":
        arguments["pair_head"] = config.get("architectures") == ["BertForPreTraining"]
    if kind == "t5":
        arguments["decoder_layers"] = arguments["decoder_layers"] or arguments["layers"]
        # Version 5 writes an untied model as a tied one whose output is not scaled.
        arguments["tied"] = arguments["tied"] and config.get("scale_decoder_outputs", True)
    if arguments["feedforward_width"] is None:
        arguments["feedforward_width"] = 4 * arguments["width"]
    return arguments


def model_type(model: nn.Module) -> str:
    """The model type that equals `model`. Raises ValueError in one line for an option without equal."""
    arguments = arguments_of(model)
    kind = "bert" if isinstance(model, BERT) else "t5"
    if isinstance(model, GPT):
        rotary = "llama" if arguments["norm"] == "rmsnorm" else "gpt_neox"
        kind = rotary if arguments["position"] == "rotary" else "gpt2"
    dialect = DIALECTS[kind]
    needed = dict(dialect.ours)
    if isinstance(model, GPT):
        width, heads = arguments["width"], arguments["heads"]
        if width % heads:
            raise ValueError(
                f"model.heads: {heads} do not divide width {width}, as in transformers they must"
            )
        if kind != "llama":
            needed |= {"kv_heads": heads, "head_width": width // heads}
    for key, value in needed.items():
        if arguments[key] != value:
            raise ValueError(
                f"model.{key}: {arguments[key]} has no equal in transformers' {dialect.architecture}, where"
                f" it is {value}"
            )
    known = sorted(set(dialect.activations.values()))
    if arguments["activation"] not in known:
        raise ValueError(
            f"model.activation: {arguments['activation']} has no equal in transformers'"
            f" {dialect.architecture}, which has {', '.join(known)}"
        )
    return kind


def arguments_of(model: Any) -> Options:
    """The arguments that a model was made with, as far as transformers has to do with them."""
    sizes = {key: getattr(model, key) for key in ("vocabulary_size", "sequence_length", "layers", "width")}
    shared = {**sizes, "tied": model.head.tied, "dropout": model.dropout.p}
    block: Any = model.encoder[0] if isinstance(model, T5) else model.blocks[0]
    expand, gated = block.feedforward.expand, block.feedforward.gated
    shared |= {
        "activation": _activation(block.feedforward),
        "bias": expand.bias is not None,
        "feedforward_width": expand.out_features // (2 if gated else 1),
        "norm_eps": block.attention_norm.eps,
    }
    norm = "rmsnorm" if isinstance(block.attention_norm, nn.RMSNorm) else "layernorm"
    if isinstance(model, GPT):
        return shared | {
            "heads": model.heads,
            "kv_heads": model.kv_heads,
            "head_width": block.attention.head_width,
            "position": "rotary" if model.positions is None else "learned",
            "norm": norm,
            "qk_norm": not isinstance(block.attention.query_norm, nn.Identity),
            "rotary_base": model.rotary_base,
            "rotary_scaling": model.rotary_scaling,
        }
    if isinstance(model, BERT):
        return shared | {
            "heads": model.heads,
            "position": _position(model.positions, "rotary"),
            "norm_first": model.norm is not None,
            "segments": 0 if model.segments is None else model.segments.num_embeddings,
            "transform": model.transform is not None,
            "pair_head": model.pair_head is not None,
        }
    assert isinstance(model, T5), f"{type(model).__name__} is no model of this project"
    bias = model.encoder_bias
    return shared | {
        "decoder_layers": model.decoder_layers,
        "heads": model.shape.heads,
        "head_width": model.shape.head_width,
        "position": _position(model.positions, "relative"),
        "buckets": None if bias is None else bias.num_embeddings,
        "max_distance": None if bias is None else bias.max_distance,
        "norm": norm,
        "norm_first": model.shape.norm_first,
        "scaled_attention": model.shape.scaled_attention,
        "scaled_embedding": model.embedding_factor != 1.0,
    }


def _position(positions: nn.Module | None, none: str) -> str:
    if positions is None:
        return none
    return "learned" if isinstance(positions, nn.Embedding) else "sinusoidal"


def _activation(feedforward: Any) -> str:
    """The name of a feed-forward's activation."""
    for name, build in ACTIVATIONS.items():
        options = getattr(build, "keywords", {})
        if options["function"] is feedforward.function and options.get("gated", False) == feedforward.gated:
            return name
    raise AssertionError("a feed-forward whose function is in no table")
