"""The causal objective against PyTorch's cross-entropy."""

from __future__ import annotations

import torch

from model.gpt import GPT
from train.objective.causal import Causal


def test_loss_and_count() -> None:
    torch.manual_seed(0)
    model = GPT(vocabulary_size=11, sequence_length=6, layers=1, width=8, heads=2)
    tokens = torch.randint(11, (3, 6))
    labels = torch.randint(11, (3, 6))
    labels[0, 2:] = -100
    labels[2] = -100
    batch = {"tokens": tokens, "labels": labels}
    objective = Causal()
    loss_sum, count, metrics = objective(model, batch)
    expected = torch.nn.functional.cross_entropy(
        model(tokens).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    torch.testing.assert_close(loss_sum, expected)
    assert loss_sum.dtype == torch.float32 and loss_sum.dim() == 0
    assert count == objective.count(batch) == 2 + 6
    assert metrics == {}


def test_a_batch_without_labels_weighs_nothing() -> None:
    model = GPT(vocabulary_size=11, sequence_length=4, layers=1, width=8, heads=2)
    batch = {"tokens": torch.zeros(2, 4, dtype=torch.int64), "labels": torch.full((2, 4), -100)}
    loss_sum, count, _ = Causal()(model, batch)
    assert loss_sum == 0 and count == 0


def test_documents_of_a_batch_reach_the_model() -> None:
    torch.manual_seed(0)
    model = GPT(vocabulary_size=11, sequence_length=6, layers=1, width=8, heads=2)
    batch = {"tokens": torch.randint(11, (1, 6)), "labels": torch.randint(11, (1, 6))}
    batch["documents"] = torch.tensor([[0, 0, 1, 1, 1, 1]], dtype=torch.int32)
    whole, _, _ = Causal()(model, batch)
    parts = [
        Causal()(model, {key: batch[key][:, part] for key in ("tokens", "labels")})[0]
        for part in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(whole, parts[0] + parts[1])
