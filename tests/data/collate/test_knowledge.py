"""Knowledge masking: units of three levels, each masked whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from data.collate.knowledge import Knowledge
from data.packing import Sample
from data.tokenizer import BPE, Bytes, WordPiece

TEXT = """\
The Red Cross of New York City met at the town hall. Doctors of the Red Cross from New York spoke first,
then the mayor of New York City answered in the old town hall; nothing else was said about it anywhere.
"""
ENTITIES = ("red cross", "new york city", "new york")
PHRASES = ("town hall", "of the red cross", "mayor of", "met at")
STAGES = {"word": 0, "phrase": 10, "entity": 20}
LENGTH = 96


def finder(*units: str) -> Callable[[str], list[tuple[int, int]]]:
    pattern = re.compile("|".join(units), re.IGNORECASE)
    return lambda text: [match.span() for match in pattern.finditer(text)]


FINDERS = {"phrase": finder(*PHRASES), "entity": finder(*ENTITIES)}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return WordPiece(vocabulary_size=400, special=["masking"]).train([TEXT] * 3)


def knowledge(tokenizer: Tokenizer, **changes: Any) -> Knowledge:
    settings = {"stages": STAGES, "finders": FINDERS, "seed": 3, "rate": 0.3}
    return Knowledge(tokenizer, LENGTH, **(settings | {"mask_share": 1.0, "random_share": 0.0} | changes))


def sample(tokenizer: Tokenizer, text: str = TEXT, index: int = 0, step: int | None = None) -> Sample:
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids[: LENGTH - 2], np.int64)
    end = np.array([tokenizer.token_to_id("<|endoftext|>")])
    return Sample(ids, end, np.array([0, len(ids)]), key=(0, index), step=step)


def hidden(batch: dict[str, torch.Tensor], row: int = 0) -> list[int]:
    """The positions with a label."""
    return torch.nonzero(batch["labels"][row] != -100)[:, 0].tolist()


def claimed(collate: Knowledge, ids: np.ndarray, step: int | None) -> list[tuple[str, tuple[int, ...]]]:
    """The units that may be drawn: level, and the tokens' positions."""
    units, levels = collate._claims(ids, np.ones(len(ids), bool), step)
    return [
        (collate.levels[level], tuple(range(*unit)))
        for unit, level in zip(units.tolist(), levels, strict=True)
    ]


def spelt(collate: Knowledge, ids: np.ndarray, step: int | None, level: str) -> list[str]:
    units = [unit for own, unit in claimed(collate, ids, step) if own == level]
    return [collate.surface.spell(ids[list(unit)])[0].strip() for unit in sorted(units)]


def test_entities_claim_their_tokens_then_phrases_then_words(tokenizer: Tokenizer) -> None:
    collate, ids = knowledge(tokenizer), sample(tokenizer).tokens
    assert spelt(collate, ids, None, "entity") == [
        *("red cross", "new york city", "red cross", "new york", "new york city")
    ]
    # "of the red cross" would overlap an entity and is not there.
    assert spelt(collate, ids, None, "phrase") == ["met at", "town hall", "mayor of", "town hall"]
    words = spelt(collate, ids, None, "word")
    assert words[:5] == ["the", "of", "the", ".", "doctors"] and "town" not in words
    tokens = [token for _, unit in claimed(collate, ids, None) for token in unit]
    assert sorted(tokens) == list(range(len(ids)))  # each once


@pytest.mark.parametrize(
    ("step", "levels"),
    [
        (0, {"word"}),
        (9, {"word"}),
        (10, {"word", "phrase"}),
        (19, {"word", "phrase"}),
        (20, {"word", "phrase", "entity"}),
        (None, {"word", "phrase", "entity"}),
    ],
)
def test_a_level_takes_part_from_its_step_on(tokenizer: Tokenizer, step: int | None, levels: set) -> None:
    collate = knowledge(tokenizer)
    assert {level for level, _ in claimed(collate, sample(tokenizer).tokens, step)} == levels
    batch = collate([sample(tokenizer, index=i, step=step) for i in range(20)])
    counts = {level: int(batch[f"metric_masked_{level}"].sum()) for level in STAGES}
    assert {level for level, count in counts.items() if count} == levels


@pytest.mark.parametrize("isolate", [False, True])
def test_a_unit_is_masked_whole_and_the_counts_add_up(tokenizer: Tokenizer, isolate: bool) -> None:
    collate = knowledge(tokenizer, isolate=isolate)
    samples = [sample(tokenizer, index=i) for i in range(30)]
    batch = collate(samples)
    for row, own in enumerate(samples):
        positions = set(hidden(batch, row))
        budget = round(0.3 * len(own.tokens))
        assert 0.8 * budget <= len(positions) <= budget
        counts = dict.fromkeys(STAGES, 0)
        for level, unit in claimed(collate, own.tokens, None):
            in_sequence = {position + 1 for position in unit}  # behind [CLS]
            assert positions >= in_sequence or not positions & in_sequence
            counts[level] += len(positions & in_sequence)
        assert counts == {level: int(batch[f"metric_masked_{level}"][row]) for level in STAGES}
        assert sum(counts.values()) == len(positions)
        assert [batch["labels"][row, p] for p in sorted(positions)] == [
            own.tokens[p - 1] for p in sorted(positions)
        ]
        assert set(batch["tokens"][row, sorted(positions)].tolist()) == {collate.mask}


def test_what_is_masked_depends_on_the_seed_and_the_key_alone(tokenizer: Tokenizer) -> None:
    collate, other = knowledge(tokenizer), knowledge(tokenizer, seed=4)
    samples = [sample(tokenizer, index=i, step=25) for i in range(6)]
    batch = collate(samples)
    again = knowledge(tokenizer)(samples[::-1])
    assert all(torch.equal(batch[key], again[key].flip(0)) for key in batch)
    moved = collate([replace(s, step=900) for s in samples])  # of the same stage
    assert all(torch.equal(batch[key], moved[key]) for key in batch)
    assert not torch.equal(batch["labels"], other(samples)["labels"])
    assert not torch.equal(batch["labels"][0], batch["labels"][1])


def test_each_level_is_preferred_to_the_one_before_it(tokenizer: Tokenizer) -> None:
    ids = sample(tokenizer, "the red old town").tokens
    assert len(ids) == 4
    finders = {"phrase": finder("town"), "entity": finder("red")}
    for stages, weights in ((STAGES, (4, 2, 1 + 1)), (dict.fromkeys(STAGES, 0), (1, 1, 1 + 1))):
        collate = knowledge(tokenizer, stages=stages, finders=finders, rate=0.25)
        drawn = sum(collate._choose(ids, None, np.random.default_rng(i))[1] for i in range(4000))
        expected = 4000 * np.array(weights) / sum(weights)
        assert np.abs(drawn - expected).max() < 150  # five standard deviations


def test_only_entities_are_masked_where_there_is_no_other_level(tokenizer: Tokenizer) -> None:
    collate = knowledge(tokenizer, stages={"entity": 0}, finders={"entity": FINDERS["entity"]}, rate=0.9)
    nothing = sample(tokenizer, "nothing else was said", index=1)
    batch = collate([sample(tokenizer), nothing])
    units = [set(unit) for _, unit in claimed(collate, sample(tokenizer).tokens, None)]
    assert {position - 1 for position in hidden(batch)} == set().union(*units)
    assert hidden(batch, 1) == []
    assert batch["metric_masked_entity"].tolist() == [len(hidden(batch)), 0]
    assert {key for key in batch if key.startswith("metric_masked")} == {"metric_masked_entity"}


def test_a_unit_longer_than_the_budget_is_masked_alone(tokenizer: Tokenizer) -> None:
    find = {"entity": finder("new york city")}
    collate = knowledge(tokenizer, stages={"entity": 0}, finders=find, rate=0.01)
    batch = collate([sample(tokenizer)])
    assert batch["metric_masked_entity"].tolist() == [len(hidden(batch))]
    assert len(hidden(batch)) == hidden(batch)[-1] - hidden(batch)[0] + 1 >= 3


def test_words_of_their_own_finder_come_before_those_of_the_text(tokenizer: Tokenizer) -> None:
    collate = knowledge(tokenizer, stages={"word": 0}, finders={"word": finder("old town")})
    ids = sample(tokenizer, "the old town hall").tokens
    assert spelt(collate, ids, 0, "word") == ["the", "old town", "hall"]


@pytest.mark.parametrize("recipe", [Bytes, lambda **more: BPE(vocabulary_size=300, **more)])
def test_a_unit_has_all_bytes_of_its_last_character(recipe: Callable) -> None:
    tokenizer = recipe(special=["masking"]).train(["in 北京, in Malmö and in Åre"] * 2)
    collate = knowledge(tokenizer, finders={"entity": finder("北京", "Malmö", "Åre")}, stages={"entity": 0})
    text = "in 北京, in Malmö and in Åre"
    ids = np.array(tokenizer.encode(text).ids)
    assert spelt(collate, ids, None, "entity") == ["北京", "Malmö", "Åre"]


def test_an_empty_sample_has_no_labels(tokenizer: Tokenizer) -> None:
    empty = Sample(np.empty(0, np.int64), np.empty(0, np.int64), np.zeros(1, np.int64), key=(0, 9))
    batch = knowledge(tokenizer)([sample(tokenizer), empty])
    assert hidden(batch) and not hidden(batch, 1)
    assert [int(batch[f"metric_masked_{level}"][1]) for level in STAGES] == [0, 0, 0]
