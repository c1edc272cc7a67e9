"""Logits equal those of the Hugging Face model that holds the same weights."""

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from model.gpt import GPT


def spread(model: torch.nn.Module) -> dict[str, Tensor]:
    """The state of `model`, whose every parameter first gets values that show in the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.2)
    return model.eval().state_dict()


def from_gpt2(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Hugging Face keeps GPT-2's matrices as [inputs, outputs]."""
    names = {
        "ln_1": "attention_norm",
        "attn.c_attn": "attention.qkv",
        "attn.c_proj": "attention.project",
        "ln_2": "feedforward_norm",
        "mlp.c_fc": "feedforward.expand",
        "mlp.c_proj": "feedforward.project",
    }
    ours = {
        "embedding.weight": state["transformer.wte.weight"],
        "positions.weight": state["transformer.wpe.weight"],
    }
    ours |= {f"norm.{kind}": state[f"transformer.ln_f.{kind}"] for kind in ("weight", "bias")}
    ours["head.weight"] = ours["embedding.weight"]
    for layer in range(layers):
        for theirs, name in names.items():
            weight = state[f"transformer.h.{layer}.{theirs}.weight"]
            ours[f"blocks.{layer}.{name}.weight"] = weight.T if weight.dim() == 2 else weight
            ours[f"blocks.{layer}.{name}.bias"] = state[f"transformer.h.{layer}.{theirs}.bias"]
    return ours


def from_llama(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Here queries, keys and values are one matrix, and so are SwiGLU's two inner ones."""
    ours = {"embedding.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"]}
    ours["head.weight"] = state["lm_head.weight"]
    for layer in range(layers):
        theirs, block = f"model.layers.{layer}", f"blocks.{layer}"
        parts = [state[f"{theirs}.self_attn.{part}_proj.weight"] for part in "qkv"]
        ours[f"{block}.attention.qkv.weight"] = torch.cat(parts)
        ours[f"{block}.attention.project.weight"] = state[f"{theirs}.self_attn.o_proj.weight"]
        ours[f"{block}.attention_norm.weight"] = state[f"{theirs}.input_layernorm.weight"]
        ours[f"{block}.feedforward_norm.weight"] = state[f"{theirs}.post_attention_layernorm.weight"]
        inner = [state[f"{theirs}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        ours[f"{block}.feedforward.expand.weight"] = torch.cat(inner)
        ours[f"{block}.feedforward.project.weight"] = state[f"{theirs}.mlp.down_proj.weight"]
    return ours


def test_gpt2() -> None:
    config = GPT2Config(vocab_size=97, n_positions=32, n_embd=48, n_layer=3, n_head=4)
    theirs = GPT2LMHeadModel(config)
    state = spread(theirs)
    ours = GPT(vocabulary_size=97, sequence_length=32, layers=3, width=48, heads=4, activation="gelu_tanh")
    ours.load_state_dict(from_gpt2(state, 3))
    tokens = torch.randint(97, (2, 32))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_llama(kv_heads: int) -> None:
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    theirs = LlamaForCausalLM(config)
    state = spread(theirs)
    ours = GPT(
        vocabulary_size=97,
        sequence_length=32,
        layers=3,
        width=48,
        heads=4,
        kv_heads=kv_heads,
        feedforward_width=80,
        position="rotary",
        norm="rmsnorm",
        activation="swiglu",
        bias=False,
        tied=False,
    )
    ours.load_state_dict(from_llama(state, 3))
    tokens = torch.randint(97, (2, 32))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)
