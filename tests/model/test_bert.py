"""Every option of BERT: it runs, documents and padding stay apart, and only labelled places are predicted."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import heads
from tests.model.small_encoders import CRAMMING, gradients, small_bert, spread

OPTIONS: dict[str, list[Any]] = {
    "position": ["learned", "rotary", "sinusoidal"],
    "norm_first": [False, True],
    "activation": ["gelu", "gelu_tanh", "relu", "geglu"],
    "bias": [True, False],
    "transform": [True, False],
    "tied": [True, False],
}
VARIANTS: list[dict[str, Any]] = [
    {},
    CRAMMING,
    {"position": "rotary", "norm_first": True, "activation": "relu"},
    {"pair_head": True, "tied": False, "bias": False, "feedforward_width": 40},
]


def batch(length: int = 32, share: float = 0.3) -> tuple[Tensor, Tensor]:
    """Tokens, and labels for that share of them."""
    tokens, labels = torch.randint(97, (2, 2, length))
    labels[torch.rand(2, length) >= share] = -100
    labels[0, 1] = 5
    return tokens, labels


def test_every_combination_runs_and_reaches_every_parameter() -> None:
    for values in itertools.product(*OPTIONS.values()):
        options = dict(zip(OPTIONS, values, strict=True))
        model, (tokens, labels) = small_bert(**options), batch(8)
        loss = model(tokens, labels, segments_BT=torch.randint(2, (2, 8)))
        assert loss.item() / (labels >= 0).sum().item() == pytest.approx(math.log(97), rel=0.2), options
        for name, gradient in gradients(model, loss).items():
            if "qkv.bias" not in name:  # softmax ignores what is added to every key alike
                assert gradient is not None and gradient.abs().sum() > 0, (options, name)


@pytest.mark.parametrize("options", VARIANTS)
def test_loss_is_the_cross_entropy_of_the_logits_with_its_gradients(options: dict[str, Any]) -> None:
    model, (tokens, labels) = small_bert(**options), batch()
    spread(model)
    expected = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="sum")
    loss = model(tokens, labels)
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-5)
    ours, theirs = gradients(model, loss), gradients(model, expected)
    for name, gradient in ours.items():
        other = theirs[name]
        if gradient is None or other is None:
            assert gradient is other is None and name.startswith(("pooler", "pair_head"))
        else:
            torch.testing.assert_close(gradient, other, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_labels_loss_and_gradients_are_zero(options: dict[str, Any], dtype: torch.dtype) -> None:
    model, (tokens, labels) = small_bert(**options).to(dtype), batch()
    pairs = options.get("pair_head", False)
    result = model(tokens, torch.full_like(labels, -100), pairs=pairs)
    loss = result[0] + 0 * result[1].float().sum() if pairs else result
    loss.backward()
    assert loss.item() == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_only_labelled_places_go_through_the_head() -> None:
    model, (tokens, labels) = small_bert(), batch()
    sizes: list[int] = []
    for part in (model.transform, model.head):
        assert part is not None
        part.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape[0]))
    model(tokens, labels)
    assert sizes == [(labels >= 0).sum().item()] * 2


@pytest.mark.parametrize("options", VARIANTS)
def test_every_token_reaches_every_logit(options: dict[str, Any]) -> None:
    model, (tokens, _) = small_bert(**options), batch()
    spread(model)
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 97
    assert ((model(tokens) - model(changed)).abs().amax(-1) > 1e-5).all()


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_are_as_if_alone(options: dict[str, Any], dtype: torch.dtype) -> None:
    model, (tokens, _) = small_bert(**options).to(dtype), batch()
    bounds = [0, 5, 6, 20, 32]
    documents = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(itertools.pairwise(bounds))])
    packed = model(tokens, documents_BT=documents.int().expand(2, -1))
    alone = torch.cat([model(tokens[:, a:b]) for a, b in itertools.pairwise(bounds)], dim=1)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(packed, alone, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("options", VARIANTS)
def test_padding_changes_nothing_for_the_others(options: dict[str, Any]) -> None:
    model, (tokens, labels) = small_bert(**options), batch()
    documents = torch.zeros(2, 32, dtype=torch.int32)
    documents[1, 20:] = -1
    labels[1, 20:] = -100
    changed = tokens.clone()
    changed[1, 20:] = 3
    before, after = (model(t, documents_BT=documents)[1, :20] for t in (tokens, changed))
    torch.testing.assert_close(before, after, atol=0, rtol=0)
    torch.testing.assert_close(before, model(tokens[1:, :20])[0], atol=1e-5, rtol=1e-5)
    documents[0] = -1  # a sample that is all padding
    labels[0] = -100
    loss = model(tokens, labels, documents_BT=documents)
    assert loss.isfinite()
    assert all(g is None or g.isfinite().all() for g in gradients(model, loss).values())


def test_no_segments_given_are_all_the_first() -> None:
    model, (tokens, _) = small_bert(), batch()
    torch.testing.assert_close(model(tokens), model(tokens, segments_BT=torch.zeros_like(tokens)))
    assert not torch.allclose(model(tokens), model(tokens, segments_BT=torch.ones_like(tokens)))


def test_pair_head_sees_the_first_place_through_the_pooler() -> None:
    model, (tokens, labels) = small_bert(pair_head=True), batch()
    logits, pair_logits = model(tokens, pairs=True)
    assert pair_logits.shape == (2, 2)
    assert model.pooler is not None and model.pair_head is not None
    expected = model.pair_head(torch.tanh(model.pooler(model.encode(tokens)[:, 0])))
    torch.testing.assert_close(pair_logits, expected)
    torch.testing.assert_close(logits, model(tokens))
    loss, again = model(tokens, labels, pairs=True)
    torch.testing.assert_close(again, expected)
    torch.testing.assert_close(loss, model(tokens, labels))


@pytest.mark.parametrize("options", VARIANTS)
def test_activation_checkpointing_changes_no_gradient(options: dict[str, Any]) -> None:
    model, (tokens, labels) = small_bert(**{**options, "pair_head": False}, dropout=0.3), batch()
    documents, results = (torch.arange(32) // 10).int().expand(2, -1), []
    for model.activation_checkpointing in (False, True):
        torch.manual_seed(1)
        results.append(gradients(model, model(tokens, labels, documents_BT=documents)))
    for name, plain in results[0].items():
        assert plain is not None and torch.equal(plain, results[1][name]), name  # type: ignore[arg-type]


def test_initialisation_is_berts() -> None:
    model = small_bert(width=256, vocabulary_size=500, layers=4, sequence_length=200, pair_head=True)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            assert parameter.std().item() == pytest.approx(
                0.02, rel=0.2 if parameter.numel() < 1000 else 0.03
            )
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm.weight" in name))), name
    assert small_bert(position="sinusoidal").positions.scale.item() == pytest.approx(48**-0.5)  # type: ignore[union-attr]


@pytest.mark.parametrize("options", VARIANTS)
def test_meta_build_then_reset_is_the_plain_build(options: dict[str, Any]) -> None:
    with torch.device("meta"):
        late = small_bert(**options)
    torch.manual_seed(3)
    late.to_empty(device="cpu").reset_parameters()  # type: ignore[operator]
    torch.manual_seed(3)
    direct = small_bert(**options)
    tokens, _ = batch()
    assert torch.equal(late(tokens), direct(tokens))
    assert (late.head.weight is late.embedding.weight) == direct.head.tied
    assert all(torch.equal(a, b) for a, b in zip(late.parameters(), direct.parameters(), strict=True))


@pytest.mark.parametrize("options", VARIANTS)
def test_bfloat16_follows_float32(options: dict[str, Any]) -> None:
    model, (tokens, labels) = small_bert(**options), batch()
    exact = model(tokens, labels).item()
    assert model.bfloat16()(tokens, labels).item() == pytest.approx(exact, rel=5e-3)


@pytest.mark.parametrize("isolate", [False, True])
def test_blocks_compile(isolate: bool) -> None:
    """Without graph breaks, but that documents are attended to by code that is not compiled."""
    for options, dtype in (({}, torch.float32), (VARIANTS[2], torch.bfloat16)):
        model, (tokens, labels) = small_bert(**options).to(dtype), batch()
        documents = (torch.arange(32) // 10).int().expand(2, -1) if isolate else None
        expected = model(tokens, labels, documents_BT=documents)
        for block in model.blocks:
            block.compile(fullgraph=not isolate, backend="aot_eager")
        loss = model(tokens, labels, documents_BT=documents)
        torch.testing.assert_close(loss, expected, atol=0, rtol=1e-3)
        assert all(g is not None and g.isfinite().all() for g in gradients(model, loss).values())


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("length", [32, 8])
def test_flops_are_what_the_counter_counts(options: dict[str, Any], length: int) -> None:
    model, pairs = small_bert(**options), options.get("pair_head", False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(3, length, dtype=torch.int64), pairs=pairs)
    assert counter.get_total_flops() == 3 * model.forward_flops(length)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("chunk", [5, 1000])
def test_training_flops_are_three_times_the_forwards(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], chunk: int
) -> None:
    monkeypatch.setattr(heads, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(heads, "CHUNK_TOKENS", chunk)
    model, tokens = small_bert(**options), torch.zeros(3, 32, dtype=torch.int64)
    labels = torch.where(torch.arange(32) < 8, tokens, -100)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = model(tokens, labels, pairs=options.get("pair_head", False))
        sum(part.sum() for part in (result if isinstance(result, tuple) else (result,))).backward()  # type: ignore[union-attr]
    assert counter.get_total_flops() == 3 * 3 * model.forward_flops(32, predicted_share=0.25)


def test_tables_are_what_is_looked_up() -> None:
    for options, tables in (({}, 3), ({"segments": 0}, 2), (CRAMMING, 1), ({"position": "rotary"}, 2)):
        assert len(small_bert(**options).tables) == tables


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 50}, "model.width: 50 is not divisible by heads 4"),
        ({"width": 36, "position": "rotary"}, "model.width: 36 is not divisible by 2 x heads"),
        ({"width": 49, "heads": 7, "position": "sinusoidal"}, "model.width: 49 is not divisible by 2"),
        ({"vocabulary_size": None}, "model.vocabulary_size: None is not a positive integer"),
        ({"layers": 0}, "model.layers: 0 is not"),
        ({"feedforward_width": 0}, "model.feedforward_width: 0 is not"),
        ({"position": "alibi"}, "model.position: 'alibi' is not known; choose one of learned, rotary, sin"),
        ({"activation": "tanh"}, "model.activation: 'tanh' is not known"),
        ({"norm_first": "no"}, "model.norm_first: 'no' is not true or false"),
        ({"bias": 1}, "model.bias: 1 is not true or false"),
        ({"transform": 1}, "model.transform: 1 is not true or false"),
        ({"tied": None}, "model.tied: None is not true or false"),
        ({"pair_head": 2}, "model.pair_head: 2 is not true or false"),
        ({"segments": -1}, "model.segments: -1 is not"),
        ({"segments": None}, "model.segments: None is not"),
        ({"dropout": 1.0}, "model.dropout: 1.0 is not a number at least 0 and below 1"),
        ({"norm_eps": 0}, "model.norm_eps: 0 is not a number above 0"),
    ],
)
def test_bad_arguments_are_one_line_that_names_the_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as error:
        small_bert(**options)
    assert "\n" not in str(error.value)


def test_batches_that_do_not_fit_the_model_are_refused() -> None:
    tokens = torch.zeros(1, 33, dtype=torch.int64)
    with pytest.raises(ValueError, match="^tokens: 33 exceed model.sequence_length 32"):
        small_bert()(tokens)
    with pytest.raises(ValueError, match="^model.pair_head: is false"):
        small_bert()(tokens[:, :5], pairs=True)
    with pytest.raises(ValueError, match="^model.segments: is 0"):
        small_bert(segments=0)(tokens[:, :5], segments_BT=tokens[:, :5])
