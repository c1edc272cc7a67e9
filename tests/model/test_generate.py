"""Generation: what is drawn, when it stops, and that the cache changes nothing."""

from typing import Any

import pytest
import torch

from model.generate import generate, sample, truncated_probabilities
from model.gpt import GPT
from tests.model.small import LLAMA, small_gpt


def spread_gpt(**options: Any) -> GPT:
    """A model whose next token depends on the text: fresh or tied weights mostly repeat the last one."""
    model = small_gpt(**{"tied": False, **options})
    for parameter in model.parameters():
        parameter.data *= 8 if parameter.dim() > 1 else 1
    return model


def greedy_without_cache(model: GPT, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding that computes every position anew, with the window `generate` documents."""
    text, window = list(prompt), list(prompt[-model.sequence_length :])
    for _ in range(count):
        if len(window) > model.sequence_length:
            window = text[-(model.sequence_length // 2) :]
        with torch.no_grad():
            token = int(model(torch.tensor([window]))[0, -1].argmax())
        text.append(token)
        window.append(token)
    return text[len(prompt) :]


@pytest.mark.parametrize("options", [{}, LLAMA, {"kv_heads": 2, "qk_norm": True}])
@pytest.mark.parametrize("prompt_length", [1, 10, 32, 50])
def test_cached_greedy_is_uncached_greedy_past_the_context(
    options: dict[str, Any], prompt_length: int
) -> None:
    model = spread_gpt(**options).eval()
    prompt = torch.randint(97, (prompt_length,)).tolist()
    ours = list(generate(model, prompt, max_new_tokens=60, temperature=0))
    assert ours == greedy_without_cache(model, prompt, 60)
    assert len(set(ours)) > 1


def test_top_k_of_one_and_tiny_top_p_are_greedy() -> None:
    model = spread_gpt()
    greedy = list(generate(model, [1, 2], max_new_tokens=20, temperature=0))
    assert list(generate(model, [1, 2], max_new_tokens=20, temperature=2.0, top_k=1)) == greedy
    assert list(generate(model, [1, 2], max_new_tokens=20, temperature=2.0, top_p=1e-6)) == greedy


def test_seed_fixes_the_text() -> None:
    model = spread_gpt()
    first, same, other = (list(generate(model, [1], max_new_tokens=20, seed=seed)) for seed in (1, 1, 2))
    assert first == same
    assert first != other


def test_draws_do_not_touch_the_global_random_state() -> None:
    model, before = spread_gpt(), torch.get_rng_state()
    list(generate(model, [1], max_new_tokens=5))
    assert torch.equal(torch.get_rng_state(), before)


def test_end_of_text_stops_and_is_not_yielded() -> None:
    model = spread_gpt()
    greedy = list(generate(model, [1, 2], max_new_tokens=20, temperature=0))
    stop = greedy[5]
    stopped = list(generate(model, [1, 2], max_new_tokens=20, temperature=0, end_of_text=stop))
    assert stopped == greedy[: greedy.index(stop)]


def test_tokens_arrive_one_by_one() -> None:
    model = spread_gpt()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    stream = generate(model, [1, 2], max_new_tokens=20)
    assert not calls
    next(stream)
    assert len(calls) == 1
    next(stream)
    assert len(calls) == 2


def test_dropout_is_off_while_generating_and_training_goes_on_after() -> None:
    model = spread_gpt(dropout=0.5)
    ours = list(generate(model, [1, 2], max_new_tokens=20, temperature=0))
    assert model.training
    assert ours == greedy_without_cache(model.eval(), [1, 2], 20)


def test_frequencies_follow_the_probabilities_and_the_temperature() -> None:
    logits, generator = torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.Generator().manual_seed(0)
    for temperature in (0.5, 1.0, 2.0):
        drawn = torch.tensor([sample(logits, temperature, None, None, generator) for _ in range(4000)])
        share = drawn.bincount(minlength=4) / 4000
        torch.testing.assert_close(share, (logits / temperature).softmax(0), atol=0.03, rtol=0)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99, 1.0])
def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass(top_p: float) -> None:
    logits = torch.randn(50) * 2
    full, cut = logits.softmax(0), truncated_probabilities(logits, None, top_p)
    kept = cut > 0
    assert cut.sum().item() == pytest.approx(1)
    assert full[kept].sum() >= top_p - 1e-6
    assert full[kept].sum() - full[kept].min() < top_p
    assert full[kept].min() >= (full[~kept].max() if (~kept).any() else 0)
    torch.testing.assert_close(cut[kept], full[kept] / full[kept].sum())


def test_top_k_keeps_k_and_joins_top_p() -> None:
    logits = torch.log(torch.tensor([0.1, 0.4, 0.3, 0.2]))
    torch.testing.assert_close(truncated_probabilities(logits, 2, None), torch.tensor([0, 4 / 7, 3 / 7, 0]))
    torch.testing.assert_close(truncated_probabilities(logits, 9, None), logits.exp())
    torch.testing.assert_close(truncated_probabilities(logits, 2, 0.5), torch.tensor([0, 1.0, 0, 0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": []}, "tokens: the prompt is empty"),
        ({"tokens": [97]}, "tokens: 97 is not below model.vocabulary_size 97"),
        ({"tokens": [-1]}, "tokens: -1 is not"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 is not a positive integer"),
        ({"temperature": -1.0}, "temperature: -1.0 is negative"),
        ({"top_k": 0}, "top_k: 0 is not"),
        ({"top_p": 0.0}, "top_p: 0.0 is not"),
        ({"top_p": 1.5}, "top_p: 1.5 is not"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_token(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        generate(small_gpt(), **{"tokens": [1], "max_new_tokens": 1, **arguments})
