"""What Hugging Face transformers calls the options of our models, one dialect per model type; only data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The activation of theirs that ours is; the first of several is the one written.
PLAIN = {
    **{"gelu": "gelu", "gelu_python": "gelu", "relu": "relu"},
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast"), "gelu_tanh"),
}
GATED = {
    **{"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"},
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_python_tanh", "gelu_fast"), "geglu_tanh"),
}


@dataclass(frozen=True)
class Dialect:
    """What one model type of transformers calls our arguments.

    same: our argument, their key. ours: what our other arguments have to be. fixed: what their further keys
    have to be. defaults: what transformers takes where config.json says nothing.
    """

    architecture: str
    target: str
    same: Mapping[str, str]
    ours: Mapping[str, Any]
    activation: str
    activations: Mapping[str, str]
    dropouts: tuple[str, ...]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any] = field(default_factory=dict)


DIALECTS = {
    "gpt2": Dialect(
        "GPT2LMHeadModel",
        "model.gpt.GPT",
        same={
            "vocabulary_size": "vocab_size",
            "sequence_length": "n_positions",
            "layers": "n_layer",
            "width": "n_embd",
            "heads": "n_head",
            "feedforward_width": "n_inner",
            "tied": "tie_word_embeddings",
            "norm_eps": "layer_norm_epsilon",
        },
        ours={"position": "learned", "norm": "layernorm", "qk_norm": False},
        activation="activation_function",
        activations=PLAIN,
        dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        defaults={
            **{"n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5},
            **{"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "tie_word_embeddings": True},
        },
        fixed={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    ),
    "llama": Dialect(
        "LlamaForCausalLM",
        "model.gpt.GPT",
        same={
            "vocabulary_size": "vocab_size",
            "sequence_length": "max_position_embeddings",
            "layers": "num_hidden_layers",
            "width": "hidden_size",
            "heads": "num_attention_heads",
            "kv_heads": "num_key_value_heads",
            "head_width": "head_dim",
            "feedforward_width": "intermediate_size",
            "bias": "attention_bias",
            "tied": "tie_word_embeddings",
            "norm_eps": "rms_norm_eps",
        },
        ours={"position": "rotary", "norm": "rmsnorm", "qk_norm": False},
        activation="hidden_act",
        activations=GATED,
        dropouts=("attention_dropout",),
        defaults={
            **{"num_key_value_heads": None, "head_dim": None, "hidden_act": "silu", "rms_norm_eps": 1e-6},
            **{"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
            **{"attention_dropout": 0.0, "tie_word_embeddings": False},
        },
    ),
    "gpt_neox": Dialect(
        "GPTNeoXForCausalLM",
        "model.gpt.GPT",
        same={
            "vocabulary_size": "vocab_size",
            "sequence_length": "max_position_embeddings",
            "layers": "num_hidden_layers",
            "width": "hidden_size",
            "heads": "num_attention_heads",
            "feedforward_width": "intermediate_size",
            "tied": "tie_word_embeddings",
            "norm_eps": "layer_norm_eps",
        },
        ours={"position": "rotary", "norm": "layernorm", "qk_norm": False},
        activation="hidden_act",
        activations=PLAIN,
        dropouts=("attention_dropout", "hidden_dropout"),
        defaults={
            **{"hidden_act": "gelu", "layer_norm_eps": 1e-5, "use_parallel_residual": True},
            **{"attention_dropout": 0.0, "hidden_dropout": 0.0, "tie_word_embeddings": False},
            **{"attention_bias": True, "max_position_embeddings": 2048},
        },
        fixed={"use_parallel_residual": False, "attention_bias": True},
    ),
    "bert": Dialect(
        "BertForMaskedLM",
        "model.bert.BERT",
        same={
            "vocabulary_size": "vocab_size",
            "sequence_length": "max_position_embeddings",
            "layers": "num_hidden_layers",
            "width": "hidden_size",
            "heads": "num_attention_heads",
            "feedforward_width": "intermediate_size",
            "segments": "type_vocab_size",
            "tied": "tie_word_embeddings",
            "norm_eps": "layer_norm_eps",
        },
        ours={"position": "learned", "norm_first": False, "transform": True},
        activation="hidden_act",
        activations=PLAIN,
        dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
        defaults={
            **{"hidden_act": "gelu", "layer_norm_eps": 1e-12, "tie_word_embeddings": True},
            **{"type_vocab_size": 2, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
        },
        fixed={"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False},
    ),
    "t5": Dialect(
        "T5ForConditionalGeneration",
        "model.t5.T5",
        same={
            "vocabulary_size": "vocab_size",
            "sequence_length": "n_positions",
            "layers": "num_layers",
            "decoder_layers": "num_decoder_layers",
            "width": "d_model",
            "heads": "num_heads",
            "head_width": "d_kv",
            "feedforward_width": "d_ff",
            "buckets": "relative_attention_num_buckets",
            "max_distance": "relative_attention_max_distance",
            "tied": "tie_word_embeddings",
            "norm_eps": "layer_norm_epsilon",
        },
        ours={
            **{"position": "relative", "norm": "rmsnorm", "norm_first": True, "bias": False},
            **{"scaled_attention": False, "scaled_embedding": False},
        },
        activation="feed_forward_proj",
        activations={"relu": "relu", "gated-gelu": "geglu_tanh", "gated-silu": "swiglu"},
        dropouts=("dropout_rate",),
        defaults={
            **{"n_positions": 512, "num_decoder_layers": None, "relative_attention_num_buckets": 32},
            **{"relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6, "dropout_rate": 0.1},
            **{"feed_forward_proj": "relu", "tie_word_embeddings": True},
        },
        fixed={"is_encoder_decoder": True},
    ),
}
# With rotary positions: the key of the base, and the share of a head that is turned where nothing is said.
ROTARY = {"llama": ("rope_theta", 1.0), "gpt_neox": ("rotary_emb_base", 0.25)}
