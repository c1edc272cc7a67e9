"""The masked objective against PyTorch's cross-entropy, and its choices of YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.nn import functional as F

from data.cli import instantiate
from data.loader import evaluation_batches, pack
from data.prepare import prepare
from data.shards import TokenStream
from model.bert import BERT
from tests.tiny import ROOT
from train.objective.masked import MaskedLM

CHOICES = sorted(path.stem for path in (ROOT / "conf" / "objective").glob("masked*.yaml"))


def model(**options: Any) -> BERT:
    torch.manual_seed(0)
    return BERT(vocabulary_size=300, sequence_length=32, layers=1, width=16, heads=2, **options).double()


def batch(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    tokens, labels = torch.randint(300, (2, 3, 32))
    labels[0, 2:] = -100
    labels[2] = -100
    return {"tokens": tokens, "labels": labels, "metric_masked_token": torch.tensor([2, 32, 0]), **more}


def prepared(folder: Path, special: list[str], documents: int = 30) -> Path:
    for i in range(documents):
        (folder / f"{i:02}.txt").write_text(
            f"Text {i} says that a fox jumps, and then that a dog sleeps. " * 4
        )
    data = {
        "name": "test",
        "source": {"_target_": "data.sources.TextFiles", "paths": [str(folder / "*.txt")]},
        "validation": {"_target_": "data.split.ByPosition", "share": 0.2},
        "directory": str(folder / "prepared"),
    }
    tokenizer = {"_target_": "data.tokenizer.BPE", "vocabulary_size": 300, "special": special}
    return prepare(OmegaConf.create(data), OmegaConf.create(tokenizer), progress=False)


def test_loss_and_count_are_of_the_masked_tokens() -> None:
    bert, inputs = model(), batch()
    loss_sum, count, metrics = MaskedLM(seed=0)(bert, inputs)
    logits = bert(inputs["tokens"])
    expected = F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), reduction="sum")
    torch.testing.assert_close(loss_sum.double(), expected, rtol=1e-5, atol=0)
    assert count == MaskedLM(seed=0).count(inputs) == 2 + 32
    assert metrics == {"masked_token": torch.tensor(34)}


def test_a_pair_weighs_as_many_tokens_as_are_masked_in_a_sequence() -> None:
    """The mean over labels is then BERT's sum of the two means, where each sequence has rate * T labels."""
    segments = (torch.arange(32) > 15).long().expand(3, 32)
    bert, inputs = model(pair_head=True), batch(segments=segments, pairs=torch.tensor([0, 1, -100]))
    loss_sum, count, metrics = MaskedLM(seed=0, rate=0.25, pairs="sentence_order")(bert, inputs)
    logits, pair_logits = bert(inputs["tokens"], segments_BT=segments, pairs=True)
    tokens = F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), reduction="sum")
    pairs = F.cross_entropy(pair_logits[:2], torch.tensor([0, 1]), reduction="sum")
    torch.testing.assert_close(loss_sum.double(), tokens + 0.25 * 32 * pairs, rtol=1e-5, atol=0)
    assert count == 34
    torch.testing.assert_close(metrics["pair_loss"].double(), pairs, rtol=1e-5, atol=0)
    assert not metrics["pair_loss"].requires_grad
    assert metrics["pairs"] == 2
    assert metrics["pair_correct"] == (pair_logits[:2].argmax(1) == torch.tensor([0, 1])).sum()
    assert metrics["masked_token"] == 34


def test_documents_reach_the_model() -> None:
    bert = model()
    inputs = batch(documents=(torch.arange(32) > 9).int().expand(3, 32))
    together, _, _ = MaskedLM(seed=0)(bert, inputs)
    parts = [
        {k: v[:, part] for k, v in inputs.items() if v.dim() == 2} for part in (slice(10), slice(10, 32))
    ]
    apart = sum(MaskedLM(seed=0)(bert, {**part, "documents": None})[0] for part in parts)  # type: ignore[dict-item]
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_trains_on_a_prepared_folder(choice: str, tmp_path: Path) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=[f"objective={choice}", "seed=3"])
    objective = instantiate(config.objective, "objective")
    assert objective.seed == 3 and objective.predicted_share == 0.15
    collate = objective.collator(prepared(tmp_path, ["masking"]), 32, False)
    packing = pack(TokenStream(next((tmp_path / "prepared").iterdir()), "train"), "chunk", collate, True)
    bert = model(pair_head=objective.pairs is not None)
    optimizer = torch.optim.Adam(bert.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        batches = list(evaluation_batches(packing, collate, micro_batch=16, rank=0, world_size=1))[:3]
        total = sum(objective.count(one) for one in batches)
        loss = sum(objective(bert, one)[0] for one in batches) / total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0] < 10


def test_a_tokenizer_without_mask_is_refused(tmp_path: Path) -> None:
    folder = prepared(tmp_path, ["denoisers"])
    with pytest.raises(
        ValueError, match=r"^tokenizer.special: .* add masking to tokenizer.special$"
    ) as error:
        MaskedLM(seed=0).collator(folder, 32, False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0}, r"objective.rate: 0 is not above 0 and at most 1; "),
        ({"rate": 1.01}, r"objective.rate: 1.01 is not above 0 and at most 1; "),
        ({"rate": float("nan")}, r"objective.rate: nan is not above 0"),
        ({"mask_share": 1.2}, r"objective.mask_share: 1.2 is not between 0 and 1"),
        ({"random_share": -0.1}, r"objective.random_share: -0.1 is not between 0 and 1"),
        ({"random_share": 0.3}, r"objective.random_share: 0.3 and mask_share 0.8 are more than 1 together"),
        ({"unit": "phrase"}, r"objective.unit: 'phrase' is not one of token, word"),
        ({"ngram": 0}, r"objective.ngram: 0 is below 1"),
        ({"pairs": "both"}, r"objective.pairs: 'both' is not null or one of next_sentence, sentence_order"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        MaskedLM(seed=0, **options)
    with pytest.raises(ValueError, match=f"^{message}"):
        instantiate({"_target_": "train.objective.masked.MaskedLM", "seed": 0, **options}, "objective")
