"""The knowledge objectives as their YAML describes them, from raw text to batches, in English and Chinese."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from data.cli import instantiate
from data.collate.knowledge import LEVELS, Knowledge
from data.loader import pack
from data.prepare import prepare
from data.shards import TokenStream
from data.tokenizer import load_tokenizer
from model.bert import BERT
from tests.tiny import ROOT
from train.objective.knowledge import KnowledgeMaskedLM

LENGTH = 64
PEOPLE = ("李明", "王小红", "张伟", "刘洋")
PLACES = ("北京", "上海", "广州", "杭州", "成都")
SCHOOLS = ("北京大学", "清华大学", "复旦大学", "浙江大学")
SUBJECTS = ("计算机科学", "数学", "物理学", "历史", "经济学", "人工智能")
TEMPLATES = (
    "{person}在{school}学习{subject}。",
    "去年{person}从{place}搬到了{other}，因为他喜欢那里的天气。",
    "{school}的教授{person}昨天发表了一篇关于{subject}的论文。",
    "从{place}坐火车到{other}大约需要五个小时。",
    "我们的老师{person}觉得{subject}非常有意思！",
    "你去过{place}吗？{person}每年夏天都去旅游。",
    "{place}的经济发展很快，许多公司在那里研究{subject}。",
    "{person}和朋友一起在{place}的图书馆里看书。",
)


def chinese() -> list[str]:
    """Fifty documents of six sentences."""
    chance = random.Random(0)

    def sentence() -> str:
        place, other = chance.sample(PLACES, 2)
        names = {"person": chance.choice(PEOPLE), "place": place, "other": other}
        names |= {"school": chance.choice(SCHOOLS), "subject": chance.choice(SUBJECTS)}
        return chance.choice(TEMPLATES).format(**names)

    return ["".join(sentence() for _ in range(6)) for _ in range(50)]


def english() -> list[str]:
    lines = ["import os, time", "raise ValueError of a broken pipe", "the broken pipe is not in os.path"]
    return ["\n".join(f"{line} {i * j}" for j, line in enumerate(lines * 5)) for i in range(30)]


def prepared(folder: Path, documents: list[str], tokenizer: dict[str, Any]) -> Path:
    for number, document in enumerate(documents):
        (folder / f"{number:02}.txt").write_text(document, encoding="utf-8")
    data = {
        "name": "test",
        "source": {"_target_": "data.sources.TextFiles", "paths": f"{folder}/*.txt"},
        "validation": {"_target_": "data.split.ByDocument", "share": 0.2},
        "directory": f"{folder}/prepared",
    }
    recipe = {"special": ["masking"]} | tokenizer
    return prepare(OmegaConf.create(data), OmegaConf.create(recipe), progress=False)


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=list(overrides)).objective


def objective(*overrides: str) -> KnowledgeMaskedLM:
    return instantiate(config(*overrides), "objective")


@pytest.fixture(scope="module")
def in_chinese(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wordpiece = {"_target_": "data.tokenizer.WordPiece", "vocabulary_size": 600}
    return prepared(tmp_path_factory.mktemp("chinese"), chinese(), wordpiece)


@pytest.fixture(scope="module")
def in_english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bpe = {"_target_": "data.tokenizer.BPE", "vocabulary_size": 400}
    return prepared(tmp_path_factory.mktemp("english"), english(), bpe)


def batch_of(
    collate: Knowledge, folder: Path, step: int | None, split: str = "train"
) -> dict[str, torch.Tensor]:
    packing = pack(TokenStream(folder, split), "chunk", collate, training=split == "train")
    return collate([packing.sample(index, step=step) for index in range(packing.samples)])


def masked_stretches(collate: Knowledge, batch: dict[str, torch.Tensor]) -> list[tuple[str, bool]]:
    """What the batch holds, cut wherever masking begins or ends: the text, and whether it is masked."""
    stretches = []
    for tokens, labels in zip(batch["tokens"].numpy(), batch["labels"].numpy(), strict=True):
        hidden = labels != -100
        original = np.where(hidden, labels, tokens)
        edges = [0, *(np.flatnonzero(np.diff(hidden)) + 1).tolist(), len(hidden)]
        for start, stop in zip(edges, edges[1:], strict=False):
            stretches.append((collate.surface.spell(original[start:stop])[0], bool(hidden[start])))
    return stretches


def test_chinese_words_and_names_are_masked_whole(in_chinese: Path) -> None:
    tokenizer = load_tokenizer(in_chinese / "tokenizer")
    assert tokenizer.encode("北京大学学习").tokens == list("北京大学学习")  # as BERT has it
    collate = objective("objective=knowledge-chinese").collator(in_chinese, LENGTH, isolate=False)
    names = {*PEOPLE, *PLACES, *SCHOOLS}
    for step in (500, None):
        batch = batch_of(collate, in_chinese, step)
        for tokens, labels in zip(batch["tokens"].numpy(), batch["labels"].numpy(), strict=True):
            hidden = labels != -100
            text, owner = collate.surface.spell(np.where(hidden, labels, tokens))
            for word in [*names, "学习", "计算机", "图书馆", "火车", "因为"]:
                start = text.find(word)
                while start >= 0:
                    inside = hidden[owner[start : start + len(word)]]
                    assert inside.all() or not inside.any(), (word, text[max(start - 5, 0) : start + 9])
                    start = text.find(word, start + 1)
        counts = {level: int(batch[f"metric_masked_{level}"].sum()) for level in LEVELS}
        assert sum(counts.values()) == int((batch["labels"] != -100).sum())
        assert min(counts.values()) > 0.1 * sum(counts.values())


def test_chinese_begins_with_characters_and_words_and_names_join(in_chinese: Path) -> None:
    collate = objective("objective=knowledge-chinese").collator(in_chinese, LENGTH, isolate=True)
    for step, levels in ((0, {"word"}), (200, {"word", "phrase"}), (400, {"word", "phrase", "entity"})):
        batch = batch_of(collate, in_chinese, step)
        assert levels == {level for level in LEVELS if batch[f"metric_masked_{level}"].any()}


def test_only_chinese_names_are_masked_to_score_them(in_chinese: Path) -> None:
    names = "objective.entities._target_=data.units.JiebaEntities"
    collate = objective("objective=knowledge-entities", names).collator(in_chinese, LENGTH, isolate=False)
    batch = batch_of(collate, in_chinese, None, "validation")
    pieces = "".join(text if hidden else "|" for text, hidden in masked_stretches(collate, batch)).split("|")
    found = {piece.strip() for piece in pieces} - {""}
    assert found >= {*PLACES} and found & {*SCHOOLS}
    parts = {name[:stop] for name in (*PEOPLE, *SCHOOLS) for stop in range(1, len(name))} - {*PLACES}
    assert not found & parts


def test_knowledge_masking_of_code(in_english: Path) -> None:
    changes = ("objective.phrases.min_count=5", "objective.stages.entity=30", "objective.stages.phrase=20")
    trained = objective("objective=knowledge", *changes)
    collate = trained.collator(in_english, LENGTH, isolate=False)
    model = BERT(vocabulary_size=400, sequence_length=LENGTH, layers=1, width=32, heads=2)
    for step, levels in ((0, {"word"}), (20, {"word", "phrase"}), (30, {"word", "phrase", "entity"})):
        batch = batch_of(collate, in_english, step)
        loss, count, metrics = trained(model, batch)
        assert count == trained.count(batch) == sum(int(metrics[f"masked_{level}"]) for level in LEVELS)
        assert {level for level in LEVELS if metrics[f"masked_{level}"]} == levels
        assert loss.isfinite() and loss > 0


def test_entities_can_be_scored_alone(in_english: Path) -> None:
    collate = objective("objective=knowledge-entities").collator(in_english, LENGTH, isolate=False)
    batch = batch_of(collate, in_english, None, "validation")
    pieces = {text.strip() for text, hidden in masked_stretches(collate, batch) if hidden}
    assert pieces <= {"os", "ValueError", "os.path"} and "ValueError" in pieces


def test_the_units_of_a_lexicon(in_english: Path, tmp_path: Path) -> None:
    path = tmp_path / "lexicon.txt"
    path.write_text("broken pipe\n")
    changes = ("objective.entities._target_=data.units.Lexicon", f"+objective.entities.path={path}")
    collate = objective("objective=knowledge-entities", *changes).collator(in_english, LENGTH, isolate=False)
    batch = batch_of(collate, in_english, None)
    pieces = {text.strip() for text, hidden in masked_stretches(collate, batch) if hidden}
    assert "broken pipe" in pieces
    path.write_text("Eiffel Tower\n")
    with pytest.raises(ValueError) as error:
        objective("objective=knowledge-entities", *changes).collator(in_english, LENGTH, isolate=False)
    wanted = f"objective.entities.path: {path} matches nothing in the first 10 MB of {in_english.name}; "
    assert str(error.value).startswith(wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["+objective.stages.topic=3"],
            "objective.stages.topic: no such level; there are entity, phrase, word",
        ),
        (["objective.stages.phrase=-1"], "objective.stages.phrase: -1 is not a training step"),
        (["objective.stages.phrase=2.5"], "objective.stages.phrase: 2.5 is not a training step"),
        (
            ["objective.phrases=null"],
            "objective.stages.phrase: nothing finds its units; set objective.phrases",
        ),
        (["objective.stages.phrase=null"], "objective.phrases: is never used; give objective.stages.phrase"),
        (["objective.stages.word=5"], "objective.stages: nothing is masked at step 0"),
        (["objective.entities=names.txt"], "objective.entities: 'names.txt' finds no units; set"),
        (["objective.rate=0"], "objective.rate: 0 is not above 0"),
        (["+objective.ngram=2"], "objective.ngram: unknown key"),
        (
            ["objective.entities._target_=data.units.Lexicon", "+objective.entities.path=none.txt"],
            "objective.entities.path: none.txt is not a file",
        ),
        (["objective.phrases.min_count=0"], "objective.phrases.min_count: 0 is not positive"),
    ],
)
def test_what_cannot_be_is_refused_before_any_data_is_made(changes: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        objective("objective=knowledge", *changes)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
