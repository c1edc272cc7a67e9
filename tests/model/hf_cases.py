"""Small models of Hugging Face transformers, one for every option that both sides have."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from model.bert import BERT
from model.gpt import GPT
from model.hf_options import model_arguments
from model.t5 import T5

VOCABULARY, PAD = 97, 96
TARGETS = {"model.gpt.GPT": GPT, "model.bert.BERT": BERT, "model.t5.T5": T5}


@dataclass(frozen=True)
class Kind:
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    base: dict[str, Any]

    def __call__(self, **options: Any) -> PreTrainedConfig:
        config = self.config(**{**self.base, **options})
        config.architectures = [self.model.__name__]
        return config


NAMED = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = {**NAMED, "max_position_embeddings": 32, "intermediate_size": 80}
OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
gpt2 = Kind(
    GPT2Config,
    GPT2LMHeadModel,
    {
        **{"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 4},
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    },
)
llama = Kind(LlamaConfig, LlamaForCausalLM, SIZES)
neox = Kind(GPTNeoXConfig, GPTNeoXForCausalLM, {**SIZES, "use_parallel_residual": False, "rotary_pct": 1.0})
bert = Kind(BertConfig, BertForMaskedLM, {**SIZES, **OFF, "pad_token_id": PAD})
pairs = Kind(BertConfig, BertForPreTraining, {**SIZES, **OFF, "pad_token_id": PAD})
t5 = Kind(
    T5Config,
    T5ForConditionalGeneration,
    {
        **{"vocab_size": VOCABULARY, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4},
        **{"dropout_rate": 0.0, "pad_token_id": PAD, "decoder_start_token_id": PAD},
    },
)

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
CASES: dict[str, PreTrainedConfig] = {
    "gpt2": gpt2(),
    "gpt2-gelu": gpt2(activation_function="gelu"),
    "gpt2-relu": gpt2(activation_function="relu"),
    "gpt2-inner": gpt2(n_inner=100),
    "gpt2-eps": gpt2(layer_norm_epsilon=0.1),
    "gpt2-untied": gpt2(tie_word_embeddings=False),
    "llama": llama(),
    "llama-grouped": llama(num_key_value_heads=2),
    "llama-head": llama(head_dim=16, num_key_value_heads=1),
    "llama-bias": llama(attention_bias=True, mlp_bias=True, num_key_value_heads=2),
    "llama-eps": llama(rms_norm_eps=0.1),
    "llama-tied": llama(tie_word_embeddings=True),
    "llama-gelu": llama(hidden_act="gelu"),
    "llama-gelu-tanh": llama(hidden_act="gelu_pytorch_tanh"),
    "llama-base": llama(rope_parameters={"rope_type": "default", "rope_theta": 100.0}),
    "llama-linear": llama(rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}),
    "llama-llama3": llama(
        rope_parameters={**LLAMA3, "rope_theta": 500.0, "original_max_position_embeddings": 16}
    ),
    "llama-yarn": llama(rope_parameters={**YARN, "rope_theta": 100.0, "original_max_position_embeddings": 8}),
    "llama-yarn-all": llama(
        rope_parameters={
            **{**YARN, "rope_theta": 100.0, "original_max_position_embeddings": 20},
            **{"beta_fast": 4.0, "beta_slow": 2.0, "attention_factor": 1.3},
        }
    ),
    "neox": neox(),
    "neox-relu": neox(hidden_act="relu"),
    "neox-tied": neox(tie_word_embeddings=True),
    "neox-base": neox(rotary_emb_base=100.0),
    "neox-linear": neox(rope_scaling={"rope_type": "linear", "factor": 3.0}),
    "bert": bert(),
    "bert-relu": bert(hidden_act="relu"),
    "bert-tanh": bert(hidden_act="gelu_new"),
    "bert-eps": bert(layer_norm_eps=0.1),
    "bert-untied": bert(tie_word_embeddings=False),
    "bert-segments": bert(type_vocab_size=3),
    "bert-pairs": pairs(),
    "bert-pairs-untied": pairs(tie_word_embeddings=False),
    "t5": t5(),
    "t5-gated": t5(feed_forward_proj="gated-gelu"),
    "t5-silu": t5(feed_forward_proj="gated-silu"),
    "t5-untied": t5(tie_word_embeddings=False),
    "t5-head": t5(d_kv=8),
    "t5-buckets": t5(relative_attention_num_buckets=8, relative_attention_max_distance=20),
    "t5-decoder": t5(num_decoder_layers=3),
    "t5-eps": t5(layer_norm_epsilon=0.1),
}
TRAINED = ("gpt2", "llama-grouped", "bert", "bert-untied", "t5", "t5-untied")


def spread(model: nn.Module) -> nn.Module:
    """The model, whose every parameter first gets values that show in the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.2)
    return model.eval()


def make_theirs(config: PreTrainedConfig) -> Any:
    kinds = (GPT2LMHeadModel, LlamaForCausalLM, GPTNeoXForCausalLM, BertForMaskedLM, BertForPreTraining)
    classes = {kind.__name__: kind for kind in (*kinds, T5ForConditionalGeneration)}
    model = classes[config.architectures[0]](config)
    if isinstance(config, T5Config) and not config.scale_decoder_outputs:  # untied, but only a file says so
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    return spread(model)


def make_ours(arguments: dict[str, Any]) -> Any:
    return spread(TARGETS[arguments["_target_"]](**{k: v for k, v in arguments.items() if k != "_target_"}))


def ours_like(config: PreTrainedConfig) -> Any:
    return make_ours(model_arguments(config.to_dict()))


def theirs_like(content: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """Their model of a config.json and a state, which has to hold just what it needs."""
    content = dict(content)
    config = AutoConfig.for_model(content.pop("model_type"), **content)
    empty = make_theirs(config)
    model, report = type(empty).from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True
    )
    assert not any(report[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def inputs(kind: str, segments: int = 2) -> dict[str, Tensor]:
    """A batch of tokens, of which the second row of an encoder is padded."""
    tokens = torch.randint(PAD, (2, 24))
    if kind in ("gpt2", "llama", "gpt_neox"):
        return {"tokens": tokens}
    tokens[1, 17:] = PAD
    if kind == "t5":
        return {"tokens": tokens, "decoder": torch.randint(PAD, (2, 20))}
    return {"tokens": tokens, "segments": torch.randint(segments, (2, 24))}


def our_logits(model: Any, batch: dict[str, Tensor], **labels: Tensor) -> Tensor:
    """Logits, or with labels the loss sum; a pair head's logits follow in the same tensor."""
    documents = -(batch["tokens"] == PAD).int()
    if isinstance(model, GPT):
        return model(batch["tokens"], **labels)
    if isinstance(model, T5):
        return model(batch["tokens"], batch["decoder"], documents_BS=documents, **labels)
    segments = None if model.segments is None else batch["segments"]
    options: dict[str, Any] = {"documents_BT": documents, "segments_BT": segments, **labels}
    if model.pair_head is None:
        return compared(model(batch["tokens"], **options), batch, labels)
    logits, pair_logits = model(batch["tokens"], pairs=True, **options)
    return compared(logits, batch, labels, pair_logits)


def their_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    mask = (batch["tokens"] != PAD).int()
    if "decoder" in batch:
        return model(batch["tokens"], attention_mask=mask, decoder_input_ids=batch["decoder"]).logits
    if "segments" not in batch:
        return model(batch["tokens"]).logits
    out = model(batch["tokens"], attention_mask=mask, token_type_ids=batch["segments"])
    if isinstance(model, BertForPreTraining):
        return compared(out.prediction_logits, batch, {}, out.seq_relationship_logits)
    return compared(out.logits, batch, {})


def compared(
    logits: Tensor, batch: dict[str, Tensor], labels: dict[str, Tensor], pair_logits: Tensor | None = None
) -> Tensor:
    """Without the logits of padding, which mean nothing; with those of pairs."""
    if labels:
        return logits
    logits = logits * (batch["tokens"] != PAD)[..., None]
    return logits if pair_logits is None else torch.cat((logits.flatten(), pair_logits.flatten()))
