"""Configurations of transformers and ours: both ways, and refused where one of the two has no equal."""

from typing import Any

import pytest
import torch
from torch import nn

from model.bert import BERT
from model.gpt import GPT
from model.hf_options import hf_config, model_arguments
from model.t5 import T5
from tests.model.hf_cases import CASES, make_ours
from tests.model.small import LLAMA, SMALL

ROTARY = {"position": "rotary"}
GPT2 = "in transformers' GPT2LMHeadModel, where it is"
NEOX = "in transformers' GPTNeoXForCausalLM, where it is"
BERTS = "in transformers' BertForMaskedLM, where it is"
T5S = "in transformers' T5ForConditionalGeneration, where it is"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (GPT, {"qk_norm": True}, f"model.qk_norm: True has no equal {GPT2} False"),
        (GPT, {**LLAMA, "qk_norm": True}, "model.qk_norm: True has no equal in transformers' Llama"),
        (GPT, {"norm": "rmsnorm"}, f"model.norm: rmsnorm has no equal {GPT2} layernorm"),
        (GPT, {"activation": "swiglu"}, "model.activation: swiglu has no equal in transformers' GPT2LMHead"),
        (GPT, {"kv_heads": 2}, f"model.kv_heads: 2 has no equal {GPT2} 4"),
        (GPT, {**ROTARY, "kv_heads": 2}, f"model.kv_heads: 2 has no equal {NEOX} 4"),
        (GPT, {**ROTARY, "head_width": 16}, f"model.head_width: 16 has no equal {NEOX} 12"),
        (GPT, {**LLAMA, "heads": 5, "head_width": 16}, "model.heads: 5 do not divide width 48"),
        (GPT, {**LLAMA, "activation": "gelu"}, "model.activation: gelu has no equal in transformers' Llama"),
        (BERT, {"norm_first": True}, f"model.norm_first: True has no equal {BERTS} False"),
        (BERT, {"position": "sinusoidal"}, f"model.position: sinusoidal has no equal {BERTS} learned"),
        (BERT, {"position": "rotary"}, f"model.position: rotary has no equal {BERTS} learned"),
        (BERT, {"transform": False}, f"model.transform: False has no equal {BERTS} True"),
        (BERT, {"activation": "geglu"}, "model.activation: geglu has no equal in transformers' BertFor"),
        (T5, {"position": "sinusoidal"}, f"model.position: sinusoidal has no equal {T5S} relative"),
        (T5, {"norm_first": False}, f"model.norm_first: False has no equal {T5S} True"),
        (T5, {"norm": "layernorm"}, f"model.norm: layernorm has no equal {T5S} rmsnorm"),
        (T5, {"bias": True}, f"model.bias: True has no equal {T5S} False"),
        (T5, {"scaled_attention": True}, f"model.scaled_attention: True has no equal {T5S} False"),
        (T5, {"scaled_embedding": True}, f"model.scaled_embedding: True has no equal {T5S} False"),
    ],
)
def test_what_transformers_has_no_equal_for_is_named(
    kind: type[nn.Module], options: dict[str, Any], message: str
) -> None:
    with torch.device("meta"):
        model = kind(**{**SMALL, **options})
    with pytest.raises(ValueError) as error:
        hf_config(model)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gpt2", {"model_type": "mamba"}, "model_type: mamba is none of gpt2, llama"),
        ("gpt2", {"activation_function": "silu"}, "activation_function: silu has no equal here; there are"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True has no"),
        ("gpt2", {"attn_pdrop": 0.5}, "resid_pdrop: resid_pdrop 0.0, embd_pdrop 0.0, attn_pdrop 0.5 differ"),
        ("gpt2", {"n_layer": ...}, "n_layer: is missing in the gpt2 configuration"),
        ("llama", {"mlp_bias": True}, "mlp_bias: differs from attention_bias"),
        ("llama", {"attention_dropout": 0.5}, "attention_dropout: has no equal here"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type: dynamic has no"),
        ("llama-yarn", {"mscale": 2.0}, "mscale: 2.0 has no equal here with rope_type yarn"),
        ("llama-yarn", {"truncate": False}, "truncate: false has no equal here"),
        ("neox", {"use_parallel_residual": True}, "use_parallel_residual: True has no equal here"),
        ("neox", {"use_parallel_residual": ...}, "use_parallel_residual: True has no equal here"),
        ("neox", {"attention_bias": False}, "attention_bias: False has no equal here"),
        ("neox", {"rope_parameters": ...}, "partial_rotary_factor: 0.25 has no equal here"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type: relative_key has no"),
        ("bert", {"is_decoder": True}, "is_decoder: True has no equal here"),
        ("t5", {"feed_forward_proj": "gelu"}, "feed_forward_proj: gelu has no equal here"),
    ],
)
def test_what_we_have_no_equal_for_is_named(name: str, options: dict[str, Any], message: str) -> None:
    config = CASES[name].to_dict()
    for key, value in options.items():
        place = config["rope_parameters"] if key in ("mscale", "truncate") else config
        if value is ...:
            del place[key]
        else:
            place[key] = value
    with pytest.raises(ValueError) as error:
        model_arguments(config)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_the_configurations_of_published_models_are_read() -> None:
    """As they are in the files, where much is left to defaults and to older names."""
    gpt2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12}
    assert model_arguments({**gpt2, "n_head": 12, "activation_function": "gelu_new", "n_ctx": 1024}) == {
        **{"_target_": "model.gpt.GPT", "vocabulary_size": 50257, "sequence_length": 1024, "layers": 12},
        **{"width": 768, "heads": 12, "feedforward_width": 3072, "tied": True, "norm_eps": 1e-5},
        **{"position": "learned", "norm": "layernorm", "qk_norm": False, "activation": "gelu_tanh"},
        "dropout": 0.1,
    }
    sizes = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    scaling = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
    llama = model_arguments(
        {
            **{"model_type": "llama", **sizes, "num_attention_heads": 32, "num_key_value_heads": 8},
            **{"rope_scaling": {**scaling, "original_max_position_embeddings": 8192}, "rope_theta": 5e5},
            **{"tie_word_embeddings": True, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5},
        }
    )
    stretched = {"kind": "llama3", "factor": 32.0, "original_length": 8192}
    assert llama["rotary_scaling"] == {**stretched, "low_frequency": 1.0, "high_frequency": 4.0}
    assert (llama["head_width"], llama["kv_heads"], llama["rotary_base"]) == (64, 8, 5e5)
    t5 = {"model_type": "t5", "vocab_size": 32128, "d_model": 512, "d_ff": 1024, "d_kv": 64, "num_heads": 6}
    t5 |= {"num_layers": 8, "num_decoder_layers": 8, "feed_forward_proj": "gated-gelu"}
    small = model_arguments({**t5, "tie_word_embeddings": False})
    assert (small["tied"], small["activation"], small["sequence_length"]) == (False, "geglu_tanh", 512)


@pytest.mark.parametrize("name", CASES)
def test_dropout_and_ids_reach_the_other_side(name: str) -> None:
    arguments = model_arguments(CASES[name].to_dict()) | {"dropout": 0.2}
    config = hf_config(make_ours(arguments), bos=1, eos=2, pad=3)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 3)
    assert config.get("decoder_start_token_id") == (3 if name.startswith("t5") else None)
    assert model_arguments(config)["dropout"] == (0 if name.startswith("llama") else 0.2)
