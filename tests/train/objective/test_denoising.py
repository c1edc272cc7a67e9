"""The denoising objectives on a tiny T5: loss, what they need of tokenizer and model, arguments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from data.cli import instantiate
from data.loader import IGNORED, evaluation_batches, pack
from data.shards import TokenStream
from data.tokenizer import PAD, Bytes, load_tokenizer, save_tokenizer, special_ids
from model.gpt import GPT
from model.t5 import T5
from tests.data.documents import numbered, write_documents
from tests.tiny import ROOT
from train.objective.denoising import Denoisers, Denoising, PrefixLM, SpanCorruption

LENGTH = 32
UL2: list[dict[str, Any]] = [
    {"mode": "R", "rate": 0.15, "mean_span": 3},
    {"mode": "S", "rate": 0.25, "weight": 2},
    {"mode": "X", "rate": 0.5, "mean_span": 8},
]
OBJECTIVES: dict[str, Callable[[], Denoising]] = {
    "spans": lambda: SpanCorruption(seed=3),
    "prefix": lambda: PrefixLM(seed=3),
    "mixture": lambda: Denoisers(3, UL2),
}


def prepared(folder: Path, *special: str) -> Path:
    """A prepared folder of some documents and a tokenizer with these sets of special tokens."""
    tokenizer = Bytes(special=list(special)).train([])
    size = tokenizer.get_vocab_size()
    texts = [np.asarray(text) % 200 + size - 256 for text in numbered([50, 3, 90, 0, 20] * 4)]
    write_documents(folder, texts, vocabulary_size=size, shard_tokens=10_000)
    save_tokenizer(tokenizer, folder / "tokenizer")
    return folder


def tiny(folder: Path, **changes: Any) -> T5:
    torch.manual_seed(0)
    vocabulary = TokenStream(folder, "train").vocabulary_size
    return T5(vocabulary_size=vocabulary, sequence_length=LENGTH, layers=1, width=16, heads=2, **changes)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_the_cross_entropy_of_the_targets(tmp_path: Path, name: str) -> None:
    folder = prepared(tmp_path, "masking", "sentinels", "denoisers")
    objective, model = OBJECTIVES[name](), tiny(folder)
    objective.check_model(model)
    collate = objective.collator(folder, LENGTH, isolate=False)
    packing = pack(TokenStream(folder, "train"), "chunk", collate, training=True)
    batch = collate([packing.sample(i, step=0) for i in range(4)] + [packing.sample(10**6)])
    loss_sum, count, metrics = objective(model, batch)
    logits = model(batch["inputs"], batch["decoder"], documents_BS=batch["documents"])
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    torch.testing.assert_close(loss_sum, expected)
    assert count == objective.count(batch) == (batch["labels"] != IGNORED).sum() > 0
    assert metrics == {"padding": batch["metric_padding"].sum()}
    loss_sum.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_batch_of_padding_weighs_nothing(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "sentinels")
    objective = SpanCorruption(seed=0)
    collate = objective.collator(folder, LENGTH, isolate=False)
    packing = pack(TokenStream(folder, "train"), "chunk", collate, training=False)
    loss_sum, count, _ = objective(tiny(folder), collate([packing.sample(10**6)] * 2))
    assert loss_sum == 0 and count == 0


def test_evaluation_is_the_same_every_time_and_at_any_world_size(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "sentinels", "denoisers")

    def labels(ranks: int) -> set[tuple[int, ...]]:
        collate = Denoisers(3, UL2).collator(folder, LENGTH, isolate=False)
        packing = pack(TokenStream(folder, "train"), "chunk", collate, training=False)
        each = [
            evaluation_batches(packing, collate, micro_batch=2, rank=rank, world_size=ranks)
            for rank in range(ranks)
        ]
        return {tuple(row.tolist()) for batches in each for batch in batches for row in batch["labels"]}

    ignored = (IGNORED,) * Denoisers(3, UL2).target_length(LENGTH)
    assert labels(1) | {ignored} == labels(2) | {ignored} == labels(3) | {ignored}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_predicted_share_is_what_long_samples_have(tmp_path: Path, name: str) -> None:
    folder = prepared(tmp_path, "sentinels", "denoisers")
    objective = OBJECTIVES[name]()
    collate = objective.collator(folder, 512, isolate=False)
    packing = pack(TokenStream(folder, "train"), "chunk", collate, training=True)
    first = packing.sample(0, step=0)
    samples = [type(first)(first.tokens, first.before, first.bounds, (0, i), 0) for i in range(600)]
    batch = collate(samples)
    assert objective.count(batch) / batch["inputs"].numel() == pytest.approx(
        objective.predicted_share, rel=0.08
    )


def test_special_tokens_are_where_they_belong(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "masking", "sentinels", "denoisers")
    tokenizer = load_tokenizer(folder / "tokenizer")
    collate = Denoisers(0, UL2).collator(folder, LENGTH, isolate=False)
    assert collate.pad == tokenizer.token_to_id(PAD)
    assert collate.sentinels.tolist() == special_ids(tokenizer, "sentinels")
    assert collate.modes == {mode: tokenizer.token_to_id(f"[{mode}]") for mode in "RSX"}
    plain = Denoisers(0, UL2, mode_tokens=False).collator(folder, LENGTH, isolate=False)
    assert not plain.modes and plain.window == collate.window + 1


def test_without_a_padding_token_end_of_text_pads(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    collate = PrefixLM(0).collator(folder, LENGTH, isolate=False)  # and it needs no sentinels
    assert collate.pad == collate.end_of_text == 0


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as raised:
        make()
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "masking", "denoisers")
    for objective in (SpanCorruption(0), Denoisers(0, UL2)):
        assert refusal(lambda o=objective: o.collator(folder, LENGTH, False)).startswith(
            "tokenizer.special: "
        )
    for make in OBJECTIVES.values():
        said = refusal(lambda m=make: m().collator(folder, LENGTH, isolate=True))
        assert said.startswith("packing.isolate: ")
    gpt = GPT(vocabulary_size=11, sequence_length=LENGTH, layers=1, width=8, heads=2)
    said = refusal(lambda: SpanCorruption(0).check_model(gpt))
    assert "SpanCorruption" in said and "GPT" in said
    needed = SpanCorruption(0).target_length(LENGTH)
    SpanCorruption(0).check_model(tiny(folder, target_length=needed))
    said = refusal(lambda: SpanCorruption(0).check_model(tiny(folder, target_length=needed - 1)))
    assert said.startswith(f"model.target_length: {needed - 1} is below the {needed} tokens")


@pytest.mark.parametrize(
    ("make", "begins"),
    [
        (lambda: SpanCorruption(0, rate=0), "objective.rate: 0 is not above 0 and below 1; "),
        (lambda: SpanCorruption(0, rate=1.0), "objective.rate: 1.0 "),
        (lambda: SpanCorruption(0, rate=float("nan")), "objective.rate: nan "),
        (lambda: SpanCorruption(0, mean_span=0.5), "objective.mean_span: 0.5 "),
        (lambda: SpanCorruption(0, mean_span=float("inf")), "objective.mean_span: inf "),
        (lambda: Denoisers(0, []), "objective.denoisers: is empty"),
        (lambda: Denoisers(0, ["R"]), "objective.denoisers.0.mode: None is not one of R, S, X"),
        (lambda: Denoisers(0, [UL2[0], {"mode": "Q"}]), "objective.denoisers.1.mode: 'Q' "),
        (lambda: Denoisers(0, [{"mode": "R", "rate": 0.2}]), "objective.denoisers.0.mean_span: None "),
        (lambda: Denoisers(0, [UL2[0] | {"rate": "a"}]), "objective.denoisers.0.rate: 'a' is not a number"),
        (lambda: Denoisers(0, [UL2[0] | {"rate": 1}]), "objective.denoisers.0.rate: 1 "),
        (lambda: Denoisers(0, [UL2[1] | {"rate": 0.6}]), "objective.denoisers.0.rate: 0.6 "),
        (lambda: Denoisers(0, [UL2[1] | {"mean_span": 3}]), "objective.denoisers.0.mean_span: unknown key"),
        (lambda: Denoisers(0, [UL2[1] | {"weight": 0}]), "objective.denoisers.0.weight: 0 "),
        (lambda: Denoisers(0, [UL2[1] | {"weight": True}]), "objective.denoisers.0.weight: True "),
    ],
)
def test_arguments_are_checked(make: Callable[[], object], begins: str) -> None:
    assert refusal(make).startswith(begins)


@pytest.mark.parametrize("choice", ["span-corruption", "prefix-lm", "denoisers"])
def test_the_choices_take_the_seed_of_the_run(choice: str) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        node = compose("config", overrides=[f"objective={choice}", "seed=17"]).objective
    objective = instantiate(node, "objective")
    assert isinstance(objective, Denoising) and objective.seed == 17


def test_the_mixture_of_the_choice_is_that_of_the_paper() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        node = compose("config", overrides=["objective=denoisers"]).objective
    parts = instantiate(node, "objective").parts
    assert [(part.mode, part.denoiser.rate, getattr(part.denoiser, "mean_span", None)) for part in parts] == [
        ("R", 0.15, 3),
        ("R", 0.15, 8),
        ("S", 0.25, None),
        ("X", 0.5, 3),
        ("X", 0.5, 8),
        ("X", 0.15, 64),
        ("X", 0.5, 64),
    ]
    assert parts[2].weight / sum(part.weight for part in parts) == 0.2
