"""What each family makes of a prompt, against the model's own logits."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from torch import nn

from data.tokenizer import BPE, END_OF_TEXT, MASK, special_ids
from model.bert import BERT
from model.denoise import generate_from
from model.gpt import GPT
from model.t5 import T5
from train.eval.sample import encoded_prompt, respond

TEXT = "the quick brown fox jumps over the lazy dog\n" * 20
SIZES = {"sequence_length": 32, "layers": 1, "width": 32, "heads": 2}
GREEDY = {"max_new_tokens": 8, "temperature": 0.0}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = BPE(420, special=["masking", "sentinels", "infilling"]).train([TEXT])
    made.encode_special_tokens = True
    return made


def with_favourites(kind: type[nn.Module], tokenizer: Tokenizer) -> nn.Module:
    torch.manual_seed(3)
    model = kind(vocabulary_size=tokenizer.get_vocab_size(), **SIZES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


def test_an_encoder_fills_each_mask_with_its_likeliest_token(tokenizer: Tokenizer) -> None:
    model = with_favourites(BERT, tokenizer)
    _, first, last, mask = special_ids(tokenizer, "masking")
    before, after = (tokenizer.encode(text).ids for text in ("the ", " brown"))
    ids = [first, *before, mask, *after, mask, last]
    logits_TV = model(torch.tensor([ids]))[0].detach()
    best = [int(logits_TV[place].argmax()) for place, token in enumerate(ids) if token == mask]
    whole, *candidates = "".join(respond(model, tokenizer, f"the {MASK} brown{MASK}")).strip("\n").split("\n")
    assert whole == tokenizer.decode([*before, best[0], *after, best[1]]).strip("\n")
    share = float(logits_TV[len(before) + 1].softmax(-1).max())
    assert candidates[0].startswith(f"{MASK}: {tokenizer.decode([best[0]])!r} {share:.1%}")
    assert len(candidates) == 2


def test_an_encoder_wants_a_mask_and_no_more_than_it_takes(tokenizer: Tokenizer) -> None:
    model = with_favourites(BERT, tokenizer)
    with pytest.raises(ValueError, match=r"^prompt: holds no \[MASK\]"):
        respond(model, tokenizer, "the quick fox")
    with pytest.raises(ValueError, match=r"^prompt: \d+ tokens .* the model takes 32"):
        respond(model, tokenizer, MASK * 31)


def test_an_encoder_decoder_says_what_its_sentinels_hide(tokenizer: Tokenizer) -> None:
    model = with_favourites(T5, tokenizer)
    pad = special_ids(tokenizer, "masking")[0]
    sentinel, end = tokenizer.token_to_id("<extra_id_0>"), tokenizer.token_to_id(END_OF_TEXT)
    inputs = [*tokenizer.encode("the ").ids, sentinel, *tokenizer.encode(" fox").ids, end]
    drawn = list(generate_from(model, inputs, start=pad, end=end, **GREEDY))  # type: ignore[arg-type]
    names = {i: t for t, i in tokenizer.get_vocab().items() if t.startswith("<extra_id_")}
    text = "".join("\n" + names[t] + " " if t in names else tokenizer.decode([t]) for t in drawn)
    assert "".join(respond(model, tokenizer, "the <extra_id_0> fox", **GREEDY)) == text


def test_a_hole_in_a_decoders_prompt_is_filled_from_both_sides(tokenizer: Tokenizer) -> None:
    model = with_favourites(GPT, tokenizer)
    prefix, middle, suffix = special_ids(tokenizer, "infilling")
    start = tokenizer.token_to_id(END_OF_TEXT)
    tokens = [start, prefix, *tokenizer.encode("the ").ids, suffix, *tokenizer.encode(" fox").ids, middle]
    expected: list[int] = []
    for _ in range(8):
        expected.append(int(model(torch.tensor([tokens + expected]))[0, -1].argmax()))
    end = tokenizer.token_to_id(END_OF_TEXT)
    expected = expected[: expected.index(end)] if end in expected else expected
    assert "".join(respond(model, tokenizer, "the <|fim_middle|> fox", **GREEDY)) == tokenizer.decode(
        expected
    )


def test_a_mode_means_itself_in_a_prompt() -> None:
    tokenizer = BPE(420, special=["masking", "sentinels", "denoisers"]).train([TEXT])
    tokenizer.encode_special_tokens = True
    ids = encoded_prompt(with_favourites(T5, tokenizer), tokenizer, "[S]the <extra_id_1> fox")
    assert tokenizer.token_to_id("[S]") == ids[0] and tokenizer.token_to_id("<extra_id_1>") in ids


@pytest.mark.parametrize("kind", [GPT, T5])
def test_ranks_that_draw_to_the_end_say_the_same(tokenizer: Tokenizer, kind: type[nn.Module]) -> None:
    model = with_favourites(kind, tokenizer)
    prompt = "the <extra_id_0> fox" if kind is T5 else "the "
    sampling = {"max_new_tokens": 24, "temperature": 1.0, "seed": 4}
    whole = "".join(respond(model, tokenizer, prompt, **sampling, to_the_end=True))  # type: ignore[arg-type]
    assert whole == "".join(respond(model, tokenizer, prompt, **sampling))


def test_a_tokenizer_without_infilling_tokens_is_named(tokenizer: Tokenizer) -> None:
    plain = BPE(300).train([TEXT])
    with pytest.raises(ValueError, match="^prompt: holds <[|]fim_middle[|]>, but tokenizer.special: "):
        respond(with_favourites(GPT, plain), plain, "the <|fim_middle|> fox", **GREEDY)
