"""Every option of T5: it runs, padding is not seen, the decoder is causal, and its cache changes nothing."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import t5_block
from model.t5_block import attend_plainly
from tests.model.small_encoders import ORIGINAL, gradients, small_t5, spread

OPTIONS: dict[str, list[Any]] = {
    "position": ["relative", "sinusoidal"],
    "norm": ["rmsnorm", "layernorm"],
    "norm_first": [True, False],
    "activation": ["relu", "geglu_tanh", "swiglu"],
    "bias": [False, True],
    "scaled_attention": [False, True],
    "scaled_embedding": [False, True],
    "tied": [True, False],
}
VARIANTS: list[dict[str, Any]] = [
    {},
    ORIGINAL,
    {"activation": "geglu_tanh", "tied": False, "feedforward_width": 40, "decoder_layers": 1},
]


def batch(inputs: int = 32, targets: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Encoder inputs, decoder inputs, labels."""
    return torch.randint(97, (2, inputs)), torch.randint(97, (2, targets)), torch.randint(97, (2, targets))


def padding(length: int = 32, kept: int = 20) -> Tensor:
    """The second sample is padded."""
    documents = torch.zeros(2, length, dtype=torch.int32)
    documents[1, kept:] = -1
    return documents


def test_every_combination_runs_and_reaches_every_parameter() -> None:
    for values in itertools.product(*OPTIONS.values()):
        options = dict(zip(OPTIONS, values, strict=True))
        model, (inputs, decoder, labels) = small_t5(**options, layers=1, decoder_layers=1), batch(12, 12)
        loss = model(inputs, decoder, labels)
        assert loss.item() / 24 < 2.5 * math.log(97), options
        for name, gradient in gradients(model, loss).items():
            if not name.endswith(("qkv.bias", "key_value.bias")):  # a bias of all keys changes no softmax
                assert gradient is not None and gradient.abs().sum() > 0, (options, name)


@pytest.mark.parametrize("options", VARIANTS)
def test_loss_is_the_cross_entropy_of_the_logits(options: dict[str, Any]) -> None:
    model, (inputs, decoder, labels) = small_t5(**options), batch()
    labels[0, :5] = -100
    logits = model(inputs, decoder, documents_BS=padding())
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss = model(inputs, decoder, labels, documents_BS=padding())
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-5)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoder_is_causal_and_sees_every_input(options: dict[str, Any], dtype: torch.dtype) -> None:
    model, (inputs, decoder, _) = small_t5(**options).to(dtype), batch()
    spread(model)
    changed = decoder.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 97
    before, after = model(inputs, decoder), model(inputs, changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], atol=1e-5, rtol=1e-5)
    assert ((before - after)[:, 12:].abs().amax(-1) > 0).all()
    for place in (0, 31):
        changed = inputs.clone()
        changed[:, place] = (changed[:, place] + 1) % 97
        assert ((before - model(changed, decoder)).abs().amax(-1) > 0).float().mean() > 0.8


@pytest.mark.parametrize("options", VARIANTS)
def test_padding_is_as_if_it_were_not_there(options: dict[str, Any]) -> None:
    model, (inputs, decoder, labels) = small_t5(**options), batch()
    spread(model)
    changed = inputs.clone()
    changed[1, 20:] = 3
    before, after = (model(x, decoder, documents_BS=padding()) for x in (inputs, changed))
    torch.testing.assert_close(before, after, atol=0, rtol=0)
    torch.testing.assert_close(before[1:], model(inputs[1:, :20], decoder[1:]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(before[:1], model(inputs[:1], decoder[:1]), atol=1e-4, rtol=1e-4)
    bare = small_t5(**options)  # a sample that is all padding
    loss = bare(inputs, decoder, labels, documents_BS=padding(kept=0))
    assert loss.isfinite()
    assert all(g is not None and g.isfinite().all() for g in gradients(bare, loss).values())


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("padded", [False, True])
def test_cached_states_equal_uncached(options: dict[str, Any], padded: bool) -> None:
    model, (inputs, decoder, _) = small_t5(**options).eval(), batch(targets=32)
    spread(model)
    documents = padding() if padded else None
    encoded, cache, parts, start = model.encode(inputs, documents), model.new_cache(2), [], 0
    for end in (7, 8, 9, 20, 32):
        parts.append(model.head(model.decode(decoder[:, start:end], encoded, documents, cache)))
        start = end
    whole = model(inputs, decoder, documents_BS=documents)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_relative_positions_see_distances_only() -> None:
    """The encoder has no absolute positions: inputs that are moved have the states that they had."""
    model = small_t5(max_distance=8)
    spread(model)
    tokens = torch.randint(97, (1, 20))
    moved = F.pad(tokens, (5, 0))
    documents = (torch.arange(25) < 5).int().neg()[None]
    torch.testing.assert_close(
        model.encode(moved, documents)[:, 5:], model.encode(tokens), atol=1e-4, rtol=1e-4
    )
    sinusoidal = small_t5(position="sinusoidal")
    assert not torch.allclose(
        sinusoidal.encode(moved, documents)[:, 5:], sinusoidal.encode(tokens), atol=1e-2
    )


def test_biases_are_one_table_for_all_layers_of_a_stack() -> None:
    names = [name for name, _ in small_t5(layers=3).named_parameters() if "bias" in name]
    assert names == ["encoder_bias.weight", "decoder_bias.weight"]


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_plain_products_equal_attend_with_gradients(scale: float) -> None:
    q, k, v, bias = (
        torch.randn(shape, requires_grad=True)
        for shape in ((2, 9, 4, 8), (2, 12, 4, 8), (2, 12, 4, 8), (1, 4, 9, 12))
    )
    ours = attend_plainly(q, k, v, bias, scale)
    theirs = t5_block.attend(q, k, v, causal=False, bias=bias, scale=scale)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    upstream = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, (q, k, v, bias), upstream),
        torch.autograd.grad(theirs, (q, k, v, bias), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_bfloat16_on_a_cpu_takes_plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (inputs, decoder, labels) = small_t5().bfloat16(), batch()
    monkeypatch.setattr(t5_block, "attend", None)
    assert model(inputs, decoder, labels).isfinite()
    monkeypatch.setattr(t5_block, "CPU_SCORES", 2 * 4 * 20 * 20)
    with pytest.raises(TypeError):
        model(inputs, decoder, labels)


@pytest.mark.parametrize("options", VARIANTS)
def test_activation_checkpointing_changes_no_gradient(options: dict[str, Any]) -> None:
    model, (inputs, decoder, labels) = small_t5(**options, dropout=0.3), batch()
    results = []
    for model.activation_checkpointing in (False, True):
        torch.manual_seed(1)
        results.append(gradients(model, model(inputs, decoder, labels, documents_BS=padding())))
    for name, plain in results[0].items():
        assert plain is not None and torch.equal(plain, results[1][name]), name  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, ORIGINAL, {"tied": False, "activation": "geglu_tanh"}])
def test_initialisation_is_t5s(options: dict[str, Any]) -> None:
    """As transformers' `_init_weights`, but for an untied head, which starts as small as T5X's."""
    model = small_t5(**{**options, "width": 256, "head_width": 32, "vocabulary_size": 500, "heads": 8})
    width, inner, hidden = 256, 256, 1024
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm.weight" in name))), name
            continue
        expected = width**-0.5
        if name == "embedding.weight" and not options.get("scaled_embedding"):
            expected = 1.0
        elif "feedforward.project" in name:
            expected = hidden**-0.5
        elif "project" in name:
            expected = inner**-0.5
        if "qkv" in name or "cross.query" in name:
            queries = expected if options.get("scaled_attention") else (width * 32) ** -0.5
            assert parameter[:inner].std().item() == pytest.approx(queries, rel=0.03), name
            parameter = parameter[inner:]
        if parameter.numel():
            tolerance = 0.03 if parameter.numel() > 10_000 else 0.2
            assert parameter.std().item() == pytest.approx(expected, rel=tolerance), name


@pytest.mark.parametrize("options", VARIANTS)
def test_first_logits_are_of_order_one(options: dict[str, Any]) -> None:
    model, (inputs, decoder, _) = small_t5(**{**options, "width": 256}), batch()
    assert 0.3 < model(inputs, decoder).std().item() < 3


@pytest.mark.parametrize("options", VARIANTS)
def test_meta_build_then_reset_is_the_plain_build(options: dict[str, Any]) -> None:
    with torch.device("meta"):
        late = small_t5(**options)
    torch.manual_seed(3)
    late.to_empty(device="cpu").reset_parameters()  # type: ignore[operator]
    torch.manual_seed(3)
    direct = small_t5(**options)
    inputs, decoder, _ = batch()
    assert torch.equal(late(inputs, decoder), direct(inputs, decoder))
    assert (late.head.weight is late.embedding.weight) == direct.head.tied
    assert all(torch.equal(a, b) for a, b in zip(late.parameters(), direct.parameters(), strict=True))


@pytest.mark.parametrize("options", VARIANTS)
def test_bfloat16_follows_float32(options: dict[str, Any]) -> None:
    model, (inputs, decoder, labels) = small_t5(**options), batch()
    exact = model(inputs, decoder, labels, documents_BS=padding()).item()
    rounded = model.bfloat16()(inputs, decoder, labels, documents_BS=padding()).item()
    assert rounded == pytest.approx(exact, rel=2e-2)


def test_blocks_compile_without_graph_breaks() -> None:
    for options, dtype in (({}, torch.float32), (ORIGINAL, torch.bfloat16)):
        model, (inputs, decoder, labels) = small_t5(**options, layers=1, decoder_layers=1).to(dtype), batch()
        expected = model(inputs, decoder, labels, documents_BS=padding())
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        loss = model(inputs, decoder, labels, documents_BS=padding())
        torch.testing.assert_close(loss, expected, atol=0, rtol=1e-3)
        assert all(g is not None and g.isfinite().all() for g in gradients(model, loss).values())


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("targets", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flops_are_what_the_counter_counts(options: dict[str, Any], targets: int, dtype: torch.dtype) -> None:
    model, tokens = small_t5(**options).to(dtype), torch.zeros(3, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, tokens[:, :targets])
    assert counter.get_total_flops() == 3 * model.forward_flops(32, predicted_share=targets / 32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, tokens[:, :targets], tokens[:, :targets]).backward()
    assert counter.get_total_flops() == 3 * 3 * model.forward_flops(32, predicted_share=targets / 32)


def test_tables_are_what_is_looked_up() -> None:
    assert len(small_t5().tables) == 3
    assert len(small_t5(**ORIGINAL).tables) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 50, "head_width": None}, "model.width: 50 is not divisible by heads"),
        ({"vocabulary_size": None}, "model.vocabulary_size: None is not a positive integer"),
        ({"layers": 0}, "model.layers: 0 is not"),
        ({"decoder_layers": 0}, "model.decoder_layers: 0 is not"),
        ({"target_length": 0}, "model.target_length: 0 is not"),
        ({"head_width": 0}, "model.head_width: 0 is not"),
        ({"feedforward_width": "big"}, "model.feedforward_width: 'big' is not"),
        (
            {"position": "learned"},
            "model.position: 'learned' is not known; choose one of relative, sinusoidal",
        ),
        ({"width": 49, "position": "sinusoidal"}, "model.width: 49 is not divisible by 2"),
        ({"buckets": 6}, "model.buckets: 6 is not divisible by 4"),
        ({"buckets": 32}, "model.max_distance: 16 is not a number above 16"),
        ({"norm": "batchnorm"}, "model.norm: 'batchnorm' is not known"),
        ({"activation": "gelu"}, "model.activation: 'gelu' is not known"),
        ({"norm_first": 1}, "model.norm_first: 1 is not true or false"),
        ({"bias": 1}, "model.bias: 1 is not"),
        ({"scaled_attention": 1}, "model.scaled_attention: 1 is not"),
        ({"scaled_embedding": 1}, "model.scaled_embedding: 1 is not"),
        ({"tied": None}, "model.tied: None is not"),
        ({"dropout": 1.0}, "model.dropout: 1.0 is not a number at least 0 and below 1"),
        ({"norm_eps": 0}, "model.norm_eps: 0 is not a number above 0"),
    ],
)
def test_bad_arguments_are_one_line_that_names_the_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as error:
        small_t5(**options)
    assert "\n" not in str(error.value)


def test_too_many_tokens_are_refused() -> None:
    model, long = small_t5(target_length=8), torch.zeros(1, 33, dtype=torch.int64)
    with pytest.raises(ValueError, match="^inputs: 33 exceed model.sequence_length 32"):
        model(long, long[:, :4])
    with pytest.raises(ValueError, match="^decoder: 9 exceed model.target_length 8"):
        model(long[:, :4], long[:, :9])
