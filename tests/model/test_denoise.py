"""What a T5 writes is what it would write without a cache, and a BERT fills the masked places."""

from typing import Any

import pytest
import torch

from model.denoise import fill, generate_from
from model.t5 import T5
from tests.model.small_encoders import CRAMMING, ORIGINAL, small_bert, small_t5, spread

START = 3


def greedy_without_cache(model: T5, inputs: list[int], count: int) -> list[int]:
    """Greedy decoding that computes every position anew."""
    text = [START]
    for _ in range(count):
        with torch.no_grad():
            text.append(int(model(torch.tensor([inputs]), torch.tensor([text]))[0, -1].argmax()))
    return text[1:]


@pytest.fixture(params=[{}, ORIGINAL, {"activation": "swiglu"}], ids=["t5", "2017", "gated"])
def model(request: pytest.FixtureRequest) -> T5:
    """One whose next token depends on the text: fresh or tied weights mostly repeat the last one."""
    model = small_t5(**{**request.param, "tied": False, "dropout": 0.3})
    for name, parameter in model.named_parameters():
        if "project" in name:
            parameter.data *= 0.5
        elif "qkv" in name or "query" in name:
            parameter.data *= 4
    return model


def test_cached_greedy_is_uncached_greedy_up_to_the_target_length(model: T5) -> None:
    written = []
    for length in (1, 10, 32):
        inputs = torch.randint(97, (length,)).tolist()
        written += list(generate_from(model.train(), inputs, start=START, max_new_tokens=40, temperature=0))
        assert model.training
        assert written[-32:] == greedy_without_cache(model.eval(), inputs, 32)
    assert len(written) == 3 * 32
    assert len(set(written)) > 4
    assert (
        list(generate_from(model, inputs, start=START, max_new_tokens=7, temperature=0)) == written[-32:-25]
    )


def test_inputs_and_seed_fix_the_text(model: T5) -> None:
    def written(inputs: list[int], **options: Any) -> list[int]:
        return list(generate_from(model, inputs, start=START, max_new_tokens=20, **options))

    greedy = written([1, 2, 3], temperature=0)
    assert written([1, 2, 3], temperature=2.0, top_k=1) == greedy
    assert written([1, 2, 3], temperature=2.0, top_p=1e-6) == greedy
    assert written([1, 2, 3], temperature=5.0, seed=1) == written([1, 2, 3], temperature=5.0, seed=1)
    assert written([1, 2, 3], temperature=5.0, seed=1) != written([1, 2, 3], temperature=5.0, seed=2)
    assert written([4, 5], temperature=0) != greedy


def test_end_stops_and_is_not_yielded(model: T5) -> None:
    greedy = list(generate_from(model, [1, 2], start=START, max_new_tokens=20, temperature=0))
    end = greedy[-1]
    stopped = generate_from(model, [1, 2], start=START, max_new_tokens=20, temperature=0, end=end)
    assert list(stopped) == greedy[: greedy.index(end)]


def test_the_encoder_runs_once_and_tokens_arrive_one_by_one(model: T5) -> None:
    calls: list[str] = []
    model.encoder[0].register_forward_hook(lambda *_: calls.append("encoder"))
    model.decoder[0].register_forward_hook(lambda *_: calls.append("decoder"))
    stream = generate_from(model, [1, 2], start=START, max_new_tokens=20)
    assert not calls
    next(stream)
    assert calls == ["encoder", "decoder"]
    next(stream)
    assert calls == ["encoder", "decoder", "decoder"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": []}, "tokens: the prompt is empty"),
        ({"inputs": [97]}, "tokens: 97 is not below model.vocabulary_size 97"),
        ({"inputs": [1] * 33}, "tokens: 33 exceed model.sequence_length 32"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 is not a positive integer"),
        ({"temperature": -1.0}, "temperature: -1.0 is negative"),
        ({"top_p": 1.5}, "top_p: 1.5 is not"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_token(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        generate_from(small_t5(), **{"inputs": [1], "start": START, "max_new_tokens": 1, **arguments})


@pytest.mark.parametrize("options", [{}, CRAMMING])
def test_fill_gives_the_probabilities_of_masked_places(options: dict[str, Any]) -> None:
    bert = small_bert(**options, dropout=0.3)
    spread(bert)
    tokens = [5, 96, 7, 8, 96, 9]
    ours = fill(bert, tokens, mask_id=96)
    assert bert.training
    logits = bert.eval()(torch.tensor([tokens]))[0]
    torch.testing.assert_close(ours, logits[[1, 4]].softmax(-1))
    torch.testing.assert_close(ours.sum(-1), torch.ones(2))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "tokens: the prompt is empty"),
        ([1, 2], "tokens: none is the mask, 96"),
        ([96, 97], "tokens: 97 is not below model.vocabulary_size 97"),
        ([96] * 33, "tokens: 33 exceed model.sequence_length 32"),
    ],
)
def test_what_cannot_be_filled_is_refused(tokens: list[int], message: str) -> None:
    bert = small_bert()
    with pytest.raises(ValueError, match=f"^{message}"):
        fill(bert, tokens, mask_id=96)
    assert bert.training
