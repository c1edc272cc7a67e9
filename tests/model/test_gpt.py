"""Every option of the GPT: it runs, it is causal, it starts as it should, and its cache changes nothing."""

import itertools
import math
from typing import Any

import pytest
import torch

from model.gpt import GPT
from tests.model.small import LLAMA, SMALL, small_gpt

OPTIONS: dict[str, list[Any]] = {
    "position": ["learned", "rotary"],
    "norm": ["layernorm", "rmsnorm"],
    "activation": ["gelu", "swiglu"],
    "bias": [True, False],
    "kv_heads": [None, 2],
    "qk_norm": [False, True],
    "tied": [True, False],
}
VARIANTS: list[dict[str, Any]] = [
    {},
    LLAMA,
    {"position": "rotary", "kv_heads": 1, "qk_norm": True},
    {"activation": "swiglu", "kv_heads": 2, "bias": False},
    {"head_width": 10, "activation": "geglu_tanh", "norm_eps": 0.1},
    {**LLAMA, "head_width": 16, "rotary_scaling": {"kind": "yarn", "factor": 4, "original_length": 16}},
]


def tokens_and_labels(batch: int = 2, length: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(97, (batch, length)), torch.randint(97, (batch, length))


def gradients(model: GPT, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_every_combination_runs_and_reaches_every_parameter(dropout: float) -> None:
    for values in itertools.product(*OPTIONS.values()):
        options = dict(zip(OPTIONS, values, strict=True))
        model = small_gpt(**options, dropout=dropout)
        tokens, labels = tokens_and_labels(length=8)
        loss = model(tokens, labels)
        assert loss.item() / 16 == pytest.approx(math.log(97), rel=0.05), options
        for (name, _), gradient in zip(model.named_parameters(), gradients(model, loss), strict=True):
            if "qkv.bias" not in name:  # softmax ignores what is added to every key alike
                assert gradient.abs().sum() > 0, (options, name)


@pytest.mark.parametrize("options", VARIANTS)
def test_loss_is_the_cross_entropy_of_the_logits(options: dict[str, Any]) -> None:
    model, (tokens, labels) = small_gpt(**options), tokens_and_labels()
    labels[0, :5] = -100
    logits = model(tokens)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(model(tokens, labels), expected, atol=0, rtol=1e-5)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_tokens_do_not_reach_earlier_logits(options: dict[str, Any], dtype: torch.dtype) -> None:
    model, (tokens, _) = small_gpt(**options).to(dtype), tokens_and_labels()
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 97
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(before[:, 20:], after[:, 20:], atol=1e-3)


@pytest.mark.parametrize("options", VARIANTS)
def test_cached_logits_equal_uncached(options: dict[str, Any]) -> None:
    model, (tokens, _) = small_gpt(**options).eval(), tokens_and_labels()
    cache, parts, start = model.new_cache(2), [], 0
    for end in (7, 8, 9, 20, 32):
        parts.append(model(tokens[:, start:end], cache=cache))
        start = end
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"dropout": 0.3}, {**LLAMA, "dropout": 0.3}])
def test_activation_checkpointing_changes_no_gradient(options: dict[str, Any]) -> None:
    model, (tokens, labels) = small_gpt(**options), tokens_and_labels()
    results = []
    for model.activation_checkpointing in (False, True):
        torch.manual_seed(1)
        results.append(gradients(model, model(tokens, labels)))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_activation_checkpointing_keeps_fewer_activations() -> None:
    model, (tokens, labels) = small_gpt(), tokens_and_labels()
    kept = []
    for model.activation_checkpointing in (False, True):
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens, labels)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_initialisation_is_gpt2s() -> None:
    model = small_gpt(width=256, vocabulary_size=500, layers=8, sequence_length=200)
    spread = {
        name: parameter.std().item() for name, parameter in model.named_parameters() if parameter.dim() > 1
    }
    for name, std in spread.items():
        expected = 0.02
        if name == "positions.weight":
            expected = 0.01
        elif "project" in name:
            expected = 0.02 / math.sqrt(2 * 8)
        assert std == pytest.approx(expected, rel=0.03), name
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm.weight" in name))), name


@pytest.mark.parametrize("options", VARIANTS)
def test_meta_build_then_reset_is_the_plain_build(options: dict[str, Any]) -> None:
    with torch.device("meta"):
        late = small_gpt(**options)
    torch.manual_seed(3)
    late.to_empty(device="cpu").reset_parameters()  # type: ignore[operator]
    torch.manual_seed(3)
    direct = small_gpt(**options)
    tokens, _ = tokens_and_labels()
    assert torch.equal(late(tokens), direct(tokens))
    assert (late.head.weight is late.embedding.weight) == direct.head.tied
    assert sum(p.numel() for p in late.parameters()) == sum(p.numel() for p in direct.parameters())


def test_the_epsilon_is_in_every_norm() -> None:
    for options in ({}, {**LLAMA, "qk_norm": True}):
        model = small_gpt(**options, norm_eps=0.25)
        norms = [part for part in model.modules() if isinstance(part, torch.nn.LayerNorm | torch.nn.RMSNorm)]
        assert len(norms) == (2 + 2 * bool(options)) * 2 + 1
        assert all(norm.eps == 0.25 for norm in norms)


def test_rotary_scaling_lets_positions_further_apart_look_nearer() -> None:
    tokens, _ = tokens_and_labels()
    plain = small_gpt(**LLAMA)
    stretched = small_gpt(**LLAMA, rotary_scaling={"kind": "linear", "factor": 2.0})
    for block in plain.blocks:
        torch.nn.init.normal_(block.attention.qkv.weight)  # type: ignore[union-attr,arg-type]
    stretched.load_state_dict(plain.state_dict())
    torch.testing.assert_close(stretched(tokens[:, :1]), plain(tokens[:, :1]))
    assert not torch.allclose(stretched(tokens), plain(tokens), atol=1e-3)


def test_seed_fixes_the_weights() -> None:
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(small_gpt())
    first, same, other = (model.blocks[1].attention.qkv.weight for model in models)  # type: ignore[union-attr]
    assert torch.equal(first, same)  # type: ignore[arg-type]
    assert not torch.equal(first, other)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", VARIANTS)
def test_bfloat16_follows_float32(options: dict[str, Any]) -> None:
    model, (tokens, labels) = small_gpt(**options), tokens_and_labels()
    exact = model(tokens, labels).item()
    assert model.bfloat16()(tokens, labels).item() == pytest.approx(exact, rel=2e-3)


def test_blocks_compile_without_graph_breaks() -> None:
    for options, dtype in ((VARIANTS[2], torch.float32), ({}, torch.bfloat16)):
        model, (tokens, labels) = small_gpt(**options).to(dtype), tokens_and_labels()
        expected = model(tokens, labels)
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        loss = model(tokens, labels)
        torch.testing.assert_close(loss, expected, atol=0, rtol=1e-3)
        assert all(gradient.isfinite().all() for gradient in gradients(model, loss))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 50}, "model.width: 50 is not divisible by heads 4"),
        ({"kv_heads": 3}, "model.heads: 4 is not divisible by kv_heads 3"),
        ({"width": 36, "position": "rotary"}, "model.width: 36 is not divisible by 2 x heads"),
        ({"vocabulary_size": None}, "model.vocabulary_size: None is not a positive integer"),
        ({"layers": 0}, "model.layers: 0 is not"),
        ({"width": "wide"}, "model.width: 'wide' is not"),
        ({"heads": 4.0}, "model.heads: 4.0 is not"),
        ({"sequence_length": True}, "model.sequence_length: True is not"),
        ({"kv_heads": -1}, "model.kv_heads: -1 is not"),
        ({"feedforward_width": "big"}, "model.feedforward_width: 'big' is not"),
        ({"position": "alibi"}, "model.position: 'alibi' is not known; choose one of learned, rotary"),
        ({"norm": "batchnorm"}, "model.norm: 'batchnorm' is not known"),
        ({"activation": "elu"}, "model.activation: 'elu' is not known"),
        ({"activation": ["gelu"]}, r"model.activation: \['gelu'\] is not known"),
        ({"bias": "no"}, "model.bias: 'no' is not true or false"),
        ({"qk_norm": 1}, "model.qk_norm: 1 is not true or false"),
        ({"tied": None}, "model.tied: None is not true or false"),
        ({"dropout": 1.0}, "model.dropout: 1.0 is not a number at least 0 and below 1"),
        ({"dropout": -0.1}, "model.dropout: -0.1 is not"),
        ({"dropout": "0.1"}, "model.dropout: '0.1' is not"),
        ({"rotary_base": 0}, "model.rotary_base: 0 is not a number above 0"),
        ({"norm_eps": 0}, "model.norm_eps: 0 is not a number above 0"),
        ({"head_width": 0}, "model.head_width: 0 is not a positive integer"),
        ({"head_width": 9, "position": "rotary"}, "model.head_width: 9 is not divisible by"),
        ({**LLAMA, "rotary_scaling": {"kind": "yarn"}}, "model.rotary_scaling.factor: is missing"),
        ({"rotary_scaling": {"kind": "ntk", "factor": 2}}, "model.rotary_scaling: is of no use with"),
    ],
)
def test_bad_arguments_are_one_line_that_names_the_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as error:
        small_gpt(**options)
    assert "\n" not in str(error.value)


def test_too_many_tokens_are_refused() -> None:
    model = small_gpt(**LLAMA)
    with pytest.raises(ValueError, match="^tokens: 33 exceed model.sequence_length 32"):
        model(torch.zeros(1, 33, dtype=torch.int64))
    cache = model.new_cache(1)
    model(torch.zeros(1, 30, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="^tokens: 33 exceed"):
        model(torch.zeros(1, 3, dtype=torch.int64), cache=cache)


def test_default_feedforward_widths_hold_about_as_much() -> None:
    for width in (48, 384, 4096):
        sizes = []
        for activation in ("gelu", "swiglu"):
            with torch.device("meta"):
                model = GPT(**{**SMALL, "width": width, "layers": 1, "activation": activation, "bias": False})
            sizes.append(sum(parameter.numel() for parameter in model.blocks[0].feedforward.parameters()))  # type: ignore[union-attr]
        assert sizes[0] == 8 * width**2
        assert sizes[0] <= sizes[1] <= sizes[0] + 3 * 64 * width
