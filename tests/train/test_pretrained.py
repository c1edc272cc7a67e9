"""Starting from a Hugging Face directory: what is loaded equals it, what differs is refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, PreTrainedConfig

from model.hf_options import model_arguments
from tests.model.hf_cases import (
    CASES,
    TARGETS,
    bert,
    inputs,
    make_ours,
    make_theirs,
    our_logits,
    pairs,
    their_logits,
)
from train.pretrained import check_pretrained, load_pretrained

KINDS = ("gpt2", "llama-tied", "neox", "bert", "bert-untied", "t5", "t5-untied")


def saved(config: PreTrainedConfig, path: Path, **options: Any) -> Any:
    """Their random model, which `path` holds afterwards."""
    torch.manual_seed(1)
    model = make_theirs(config)
    model.save_pretrained(path, **options)
    return model


def arguments(name: str, **changes: Any) -> dict[str, Any]:
    return model_arguments(CASES[name].to_dict()) | changes


def on_meta(options: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return TARGETS[options["_target_"]](**{k: v for k, v in options.items() if k != "_target_"})


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shards", [1, 3])
def test_what_is_loaded_computes_what_they_compute(name: str, shards: int, tmp_path: Path) -> None:
    theirs = saved(CASES[name], tmp_path, max_shard_size="50KB" if shards > 1 else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards > 1)
    check_pretrained(on_meta(arguments(name)), tmp_path)
    ours = make_ours(arguments(name))
    load_pretrained(ours, tmp_path)
    batch = inputs(CASES[name].model_type)
    expected = their_logits(theirs, batch)
    assert (our_logits(ours, batch) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_half_precision_is_loaded_into_the_model_s_own(tmp_path: Path) -> None:
    theirs = make_theirs(CASES["gpt2"]).bfloat16()
    theirs.save_pretrained(tmp_path)
    ours = make_ours(arguments("gpt2"))
    load_pretrained(ours, tmp_path)
    assert ours.embedding.weight.dtype == torch.float32
    assert torch.equal(ours.embedding.weight, theirs.transformer.wte.weight.float())


def test_the_first_of_more_learned_positions_are_taken(tmp_path: Path) -> None:
    theirs = saved(CASES["gpt2"], tmp_path)
    ours = make_ours(arguments("gpt2", sequence_length=24))
    check_pretrained(ours, tmp_path)
    load_pretrained(ours, tmp_path)
    batch = inputs("gpt2")
    torch.testing.assert_close(our_logits(ours, batch), their_logits(theirs, batch), atol=1e-4, rtol=1e-5)


def test_rotary_positions_are_stretched_only_for_longer_texts(tmp_path: Path) -> None:
    saved(CASES["llama"], tmp_path)
    scaling = {"rotary_scaling": {"kind": "yarn", "factor": 2.0, "original_length": 32}}
    check_pretrained(on_meta(arguments("llama", sequence_length=16)), tmp_path)
    check_pretrained(on_meta(arguments("llama", sequence_length=64, **scaling)), tmp_path)
    with pytest.raises(
        ValueError, match=r"^model\.rotary_scaling: .* here, null in .*; set model\.rotary_scaling=null"
    ):
        check_pretrained(on_meta(arguments("llama", **scaling)), tmp_path)


def test_a_pair_head_that_their_architecture_does_not_read_is_left_out(tmp_path: Path) -> None:
    """As in the published BERT, whose files hold one though the config names the model without."""
    saved(pairs(), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"architectures": ["BertForMaskedLM"]}))
    for head in (False, True):
        load_pretrained(make_ours(arguments("bert", pair_head=head)), tmp_path)


@pytest.mark.parametrize(
    ("there", "here", "changes", "message"),
    [
        ("bert", "gpt2", {}, "model.init_from: {} holds a BertForMaskedLM, the model is a GPT"),
        ("gpt2", "t5", {}, "model.init_from: {} holds a GPT2LMHeadModel, the model is a T5"),
        (
            *("llama", "gpt2", {}),
            "model.activation: gelu_tanh here, swiglu in {}; set model.activation=swiglu"
            " model.feedforward_width=80 model.norm=rmsnorm model.norm_eps=1e-06 model.position=rotary",
        ),
        (
            *("gpt2", "gpt2", {"vocabulary_size": 98}),
            "model.vocabulary_size: 98 here, 97 in {}; set model.vocabulary_size=97, with a tokenizer",
        ),
        ("gpt2", "gpt2", {"width": 64}, "model.width: 64 here, 48 in {}; set model.width=48"),
        ("gpt2", "gpt2", {"layers": 3}, "model.layers: 3 here, 2 in {}; set model.layers=2"),
        ("gpt2", "gpt2", {"heads": 8}, "model.heads: 8 here, 4 in {}; set model.heads=4"),
        ("gpt2", "gpt2", {"tied": False}, "model.tied: false here, true in {}; set model.tied=true"),
        ("gpt2", "gpt2", {"norm_eps": 1e-6}, "model.norm_eps: 1e-06 here, 1e-05 in {}; set"),
        ("gpt2", "gpt2", {"activation": "gelu"}, "model.activation: gelu here, gelu_tanh in {}; set"),
        ("gpt2", "gpt2", {"qk_norm": True}, "model.qk_norm: True has no equal"),
        (
            *("gpt2", "gpt2", {"sequence_length": 33}),
            "model.sequence_length: 33 exceeds the 32 positions of {}; set at most 32",
        ),
        (
            *("llama", "llama", {"sequence_length": 33}),
            "model.sequence_length: 33 exceeds the 32 positions of {}; set at most 32, or stretch them by",
        ),
        ("bert-pairs", "bert", {}, "model.pair_head: false here, true in {}; set model.pair_head=true"),
        (
            *("bert", "bert", {"pair_head": True}),
            "model.init_from: {}: bert.pooler.dense.weight: is missing, and pooler.weight of this model",
        ),
    ],
)
def test_what_differs_is_refused_from_the_headers(
    there: str, here: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(CASES[there], tmp_path)
    model = on_meta(arguments(here, **changes))
    for refuse in (check_pretrained, load_pretrained):
        with pytest.raises(ValueError) as error:
            refuse(model, tmp_path)
        assert str(error.value).startswith(message.format(tmp_path)) and "\n" not in str(error.value)


def test_a_file_whose_tensors_are_not_what_its_config_says_is_refused(tmp_path: Path) -> None:
    saved(CASES["gpt2"], tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    key = "transformer.h.1.attn.c_attn.weight"
    save_file(state | {key: state[key].T.contiguous()}, path)
    with pytest.raises(ValueError) as error:
        check_pretrained(on_meta(arguments("gpt2")), tmp_path)
    assert str(error.value) == (
        f"model.init_from: {tmp_path}: {key}: has shape [144, 48], but blocks.1.attention.qkv.weight of this"
        " model, of shape [144, 48], needs [48, 144]"
    )


def test_what_is_no_directory_of_a_model_is_refused(tmp_path: Path) -> None:
    model = on_meta(arguments("gpt2"))

    def said(directory: Path) -> str:
        with pytest.raises(ValueError) as error:
            check_pretrained(model, directory)
        assert "\n" not in str(error.value)
        return str(error.value).replace(str(tmp_path), "DIR")

    assert said(tmp_path / "no").startswith("model.init_from: DIR/no/config.json is not a file; name a")
    config = tmp_path / "config.json"
    for content, message in (
        ("{", "cannot be read: "),
        ("[]", "holds no mapping"),
        ("{}", "model_type: None"),
    ):
        config.write_text(content)
        assert message in said(tmp_path)
    CASES["gpt2"].save_pretrained(tmp_path)
    assert said(tmp_path).startswith("model.init_from: DIR has neither model.safetensors nor model.safe")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    assert said(tmp_path) == "model.init_from: DIR/model.safetensors.index.json has no weight_map"
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert said(tmp_path).startswith("model.init_from: DIR/gone.safetensors cannot be read: ")
    (tmp_path / "model.safetensors").write_text("no tensors")
    assert said(tmp_path).startswith("model.init_from: DIR/model.safetensors cannot be read: ")


def test_an_architecture_without_equal_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(**{**CASES["llama"].to_dict(), "hidden_act": "relu"})
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: hidden_act: relu has no equal here"):
        check_pretrained(on_meta(arguments("llama")), tmp_path)


def test_dropout_is_for_the_run_to_choose(tmp_path: Path) -> None:
    saved(bert(hidden_dropout_prob=0.1), tmp_path)
    check_pretrained(on_meta(arguments("bert", dropout=0.3)), tmp_path)
