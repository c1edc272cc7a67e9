"""Logits and training equal those of the Hugging Face model that holds the same weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from model.hf import export_state, import_state
from model.hf_options import hf_config, model_arguments
from tests.model.hf_cases import (
    CASES,
    PAD,
    TRAINED,
    inputs,
    make_ours,
    make_theirs,
    our_logits,
    ours_like,
    their_logits,
    theirs_like,
)

STEPS = 20

# Options of ours that transformers expresses in other words: there without biases means with zeros.
OURS: dict[str, tuple[PreTrainedConfig, dict[str, Any]]] = {
    "gpt2-unbiased": (CASES["gpt2"], {"bias": False}),
    "neox-unbiased": (CASES["neox"], {"bias": False}),
    "neox-ntk": (CASES["neox"], {"rotary_scaling": {"kind": "ntk", "factor": 4.0}}),
    "bert-unbiased": (CASES["bert"], {"bias": False}),
    "bert-unsegmented": (CASES["bert"], {"segments": 0}),
}


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-5 of the largest."""
    ours, theirs = ours.detach(), theirs.detach()
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_their_weights_give_the_same_logits_here(name: str) -> None:
    config = CASES[name]
    theirs, ours = make_theirs(config), ours_like(config)
    import_state(ours, theirs.state_dict())
    batch = inputs(config.model_type, getattr(config, "type_vocab_size", 0))
    assert_equal(our_logits(ours, batch), their_logits(theirs, batch))


@pytest.mark.parametrize("name", CASES)
def test_our_weights_give_the_same_logits_there(name: str) -> None:
    config = CASES[name]
    ours = ours_like(config)
    content = hf_config(ours, pad=PAD)
    theirs = theirs_like(content, export_state(ours))
    batch = inputs(config.model_type, getattr(config, "type_vocab_size", 0))
    assert_equal(our_logits(ours, batch), their_logits(theirs, batch))
    assert model_arguments(content) == model_arguments(theirs.config.to_dict())
    assert model_arguments(content) == model_arguments(config.to_dict())


@pytest.mark.parametrize("name", OURS)
def test_what_only_we_can_leave_out_gives_the_same_logits_there(name: str) -> None:
    config, options = OURS[name]
    ours = make_ours(model_arguments(config.to_dict()) | options)
    theirs = theirs_like(hf_config(ours, pad=PAD), export_state(ours))
    batch = inputs(config.model_type, segments=1)
    expected = our_logits(ours, batch)
    assert_equal(expected, their_logits(theirs, batch))
    for parameter in ours.parameters():
        nn.init.zeros_(parameter)
    import_state(ours, theirs.state_dict())
    torch.testing.assert_close(our_logits(ours, batch), expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_a_state_that_goes_there_and_back_is_the_same(name: str) -> None:
    ours, other = ours_like(CASES[name]), ours_like(CASES[name])
    import_state(other, export_state(ours))
    for (key, parameter), copy in zip(ours.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, copy), key


@pytest.mark.parametrize("name", TRAINED)
def test_training_gives_the_same_losses(name: str) -> None:
    """Forward, backward and AdamW, on the same batches from the same weights."""
    config = CASES[name]
    ours = ours_like(config)
    for parameter in ours.parameters():  # small weights, as at the start of training
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.05)
    theirs = theirs_like(hf_config(ours, pad=PAD), export_state(ours))
    batches = [inputs(config.model_type) for _ in range(4)]
    labels = [labelled(batch) for batch in batches]

    def our_loss(step: int) -> Tensor:
        batch, label = batches[step % 4], labels[step % 4]
        return our_logits(ours, batch, labels_BT=label) / (label != -100).sum()

    def their_loss(step: int) -> Tensor:
        logits = their_logits(theirs, batches[step % 4])
        return F.cross_entropy(logits.flatten(0, 1), labels[step % 4].flatten())

    expected = losses(theirs, their_loss)
    assert expected[-1] < expected[0] - 0.1
    torch.testing.assert_close(losses(ours, our_loss), expected, atol=1e-4, rtol=0)


def labelled(batch: dict[str, Tensor]) -> Tensor:
    """The next token for a decoder; for an encoder a few of its tokens."""
    if "segments" in batch:
        chosen = (torch.rand(batch["tokens"].shape) < 0.3) & (batch["tokens"] != PAD)
        return torch.where(chosen, batch["tokens"], -100)
    tokens = batch.get("decoder", batch["tokens"])
    return F.pad(tokens[:, 1:], (0, 1), value=-100)


def losses(model: nn.Module, loss_of: Callable[[int], Tensor]) -> Tensor:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    found = []
    for step in range(STEPS):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


ONE_OF_EACH = ("gpt2", "llama", "neox", "bert-pairs", "t5-gated")


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_tensor_that_is_missing_there_is_named(name: str) -> None:
    ours = ours_like(CASES[name])
    state = export_state(ours)
    for key in state:
        with pytest.raises(ValueError, match=rf"^{key}: is missing, and .* of this model is made of it$"):
            import_state(ours, {other: state[other] for other in state if other != key})


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_tensor_that_has_no_place_here_is_named(name: str) -> None:
    ours = ours_like(CASES[name])
    state = export_state(ours)
    layer = next(key for key in state if ".1." in key)
    for extra in (layer.replace(".1.", ".2."), f"{layer}s", "more.weight"):
        if name == "gpt2" or extra != "more.weight":
            with pytest.raises(ValueError, match=f"{extra}: has no place in this") as error:
                import_state(ours, state | {extra: state[layer]})
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_shape_that_differs_is_named_on_both_sides(name: str) -> None:
    ours = ours_like(CASES[name])
    state = export_state(ours)
    for key in state:
        longer = torch.cat((state[key], state[key][:1]))
        with pytest.raises(ValueError) as error:
            import_state(ours, state | {key: longer})
        said = str(error.value)
        assert said.startswith(f"{key}: has shape {list(longer.shape)}, but "), said
        assert f" of this model, of shape {'['}" in said and said.endswith(f"needs {list(state[key].shape)}")


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_parameter_of_ours_without_equal_is_named(name: str) -> None:
    ours = ours_like(CASES[name])
    ours.register_parameter("extra", nn.Parameter(torch.zeros(3)))
    with pytest.raises(ValueError, match="^extra: this parameter has no equal in transformers"):
        export_state(ours)


def test_biases_must_be_zero_where_we_have_none() -> None:
    unbiased = make_ours(model_arguments(CASES["gpt2"].to_dict()) | {"bias": False})
    with pytest.raises(ValueError, match=r"bias: is not zero, and this model has no blocks\.0\."):
        import_state(unbiased, make_theirs(CASES["gpt2"]).state_dict())


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "neox-tied", "bert", "t5"])
def test_a_tied_tensor_may_be_there_twice_but_not_differ(name: str) -> None:
    theirs, ours = make_theirs(CASES[name]), ours_like(CASES[name])
    state = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    import_state(ours, state)
    twice = sorted(state.keys() - export_state(ours).keys())
    assert twice
    for key in twice:
        with pytest.raises(ValueError, match=f"{key}.*: differ, but are one here"):
            import_state(ours, state | {key: state[key] + 1})
        import_state(ours, {other: tensor for other, tensor in state.items() if other != key})


def test_what_older_files_hold_besides_parameters_is_passed_over() -> None:
    buffers = {
        "gpt2": ("transformer.h.1.attn.bias", "transformer.h.1.attn.masked_bias"),
        "llama": ("model.layers.1.self_attn.rotary_emb.inv_freq",),
        "neox": ("gpt_neox.layers.1.attention.bias", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"),
        "bert": ("bert.embeddings.position_ids",),
        "t5": ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    }
    for name, keys in buffers.items():
        ours = ours_like(CASES[name])
        import_state(ours, export_state(ours) | {key: torch.ones(3) for key in keys})


def test_names_of_older_files_are_known() -> None:
    renamings: dict[str, Callable[[str], str]] = {
        "gpt2": lambda key: key.removeprefix("transformer."),
        "neox": lambda key: key.replace("embed_out.", "lm_head."),
        "bert": lambda key: key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ),
    }
    for name, renamed in renamings.items():
        ours, other = ours_like(CASES[name]), ours_like(CASES[name])
        import_state(other, {renamed(key): tensor for key, tensor in export_state(ours).items()})
        batch = inputs(CASES[name].model_type)
        torch.testing.assert_close(our_logits(other, batch), our_logits(ours, batch), atol=0, rtol=0)
