"""Fill-in-the-middle as an objective: what training reads, what evaluation reads, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from data.cli import instantiate
from data.collate.causal import Causal as CausalCollate
from data.collate.infill import InfillPieces
from data.infill import InfilledStream
from data.loader import evaluation_batches, pack
from data.packing import Packing
from data.shards import TokenStream
from data.tokenizer import load_tokenizer, special_ids
from model.gpt import GPT
from tests.tiny import ROOT
from tests.train.objective.test_denoising import prepared
from train.objective.infilling import Infilling

LENGTH = 32


def packed(
    objective: Infilling, folder: Path, stream: TokenStream, training: bool
) -> tuple[Packing, CausalCollate]:
    collate = objective.collator(folder, LENGTH, isolate=False)
    return pack(stream, "chunk", collate, training), collate


@pytest.mark.parametrize("level", ["document", "context"])
def test_training_sees_marks_and_evaluation_plain_text(tmp_path: Path, level: str) -> None:
    folder = prepared(tmp_path, "infilling")
    marks = torch.tensor(special_ids(load_tokenizer(folder / "tokenizer"), "infilling"))
    objective = Infilling(seed=1, rate=1.0, level=level)  # type: ignore[arg-type]
    packing, collate = packed(objective, folder, objective.training_stream(folder), training=True)
    batch = collate([packing.sample(i, step=0) for i in range(packing.samples)])
    assert all(torch.isin(batch["labels"], mark).any() for mark in marks)
    plain = TokenStream(folder, "train")
    packing, collate = packed(objective, folder, plain, training=False)
    batches = evaluation_batches(packing, collate, micro_batch=2, rank=0, world_size=1)
    labels = torch.cat([batch["labels"].flatten() for batch in batches])
    assert labels[labels >= 0].tolist() == plain.read(0, plain.tokens).tolist()


@pytest.mark.parametrize("level", ["document", "context"])
def test_the_loss_is_that_of_the_next_token(tmp_path: Path, level: str) -> None:
    folder = prepared(tmp_path, "infilling")
    objective = Infilling(seed=1, level=level)  # type: ignore[arg-type]
    stream = objective.training_stream(folder)
    packing, collate = packed(objective, folder, stream, training=True)
    model = GPT(vocabulary_size=stream.vocabulary_size, sequence_length=LENGTH, layers=1, width=8, heads=2)
    objective.check_model(model)
    batch = collate([packing.sample(i, step=0) for i in range(4)])
    loss_sum, count, metrics = objective(model, batch)
    expected = torch.nn.functional.cross_entropy(
        model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten(), reduction="sum"
    )
    torch.testing.assert_close(loss_sum, expected)
    assert count == 4 * LENGTH
    assert set(metrics) == ({"cut_tokens"} if level == "context" else set())


def test_levels_choose_stream_and_collator(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "infilling")
    document, context = Infilling(0), Infilling(0, level="context")
    assert isinstance(document.training_stream(folder), InfilledStream)
    assert not isinstance(context.training_stream(folder), InfilledStream)
    assert not isinstance(document.collator(folder, LENGTH, False), InfillPieces)
    pieces = context.collator(folder, LENGTH, True)
    assert isinstance(pieces, InfillPieces) and pieces.isolate and pieces.window == LENGTH


@pytest.mark.parametrize(
    ("make", "begins"),
    [
        (lambda: Infilling(0, rate=0), "objective.rate: 0 is not above 0"),
        (lambda: Infilling(0, rate=1.5), "objective.rate: 1.5 "),
        (lambda: Infilling(0, spm_share=-0.1), "objective.spm_share: -0.1 "),
        (lambda: Infilling(0, level="line"), "objective.level: 'line' is not one of document, context"),  # type: ignore[arg-type]
    ],
)
def test_arguments_are_checked(make: Callable[[], object], begins: str) -> None:
    with pytest.raises(ValueError) as raised:
        make()
    assert str(raised.value).startswith(begins) and "\n" not in str(raised.value)


@pytest.mark.parametrize("level", ["document", "context"])
def test_a_tokenizer_without_the_tokens_is_refused(tmp_path: Path, level: str) -> None:
    folder = prepared(tmp_path)
    with pytest.raises(ValueError, match=r"^tokenizer\.special: .* add infilling"):
        Infilling(0, level=level).collator(folder, LENGTH, False)  # type: ignore[arg-type]


def test_the_choice_takes_the_seed_of_the_run() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        node = compose("config", overrides=["objective=infilling", "seed=17"]).objective
    objective = instantiate(node, "objective")
    assert (objective.seed, objective.rate, objective.spm_share, objective.level) == (
        17,
        0.5,
        0.5,
        "document",
    )
