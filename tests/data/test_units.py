"""Units found on text: lexicons, mined phrases, names of Python's library, Chinese words and names."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from data.prepare import prepare
from data.units import Jieba, JiebaEntities, Lexicon, MinedPhrases, PythonNames
from data.units.base import leftmost_longest, training_text
from data.units.lexicon import Entries
from data.units.phrases import PhraseFinder

ROOT = Path(__file__).resolve().parents[2]
BPE = {"_target_": "data.tokenizer.BPE", "vocabulary_size": 400}
WORDPIECE = {"_target_": "data.tokenizer.WordPiece", "vocabulary_size": 300}
KEY = "objective.entities"

Prepared = Callable[..., Path]


@pytest.fixture
def prepared_of(tmp_path: Path, text_config: Callable[..., DictConfig]) -> Prepared:
    """prepared_of(text, tokenizer): the prepared folder of one document of training text."""

    def make(text: str, tokenizer: dict = BPE) -> Path:
        (tmp_path / "0.txt").write_text(text, encoding="utf-8")
        (tmp_path / "1.txt").write_text("held out\n", encoding="utf-8")
        config = text_config([str(tmp_path / "?.txt")], validation={"_target_": "tests.data.test_units.Last"})
        return prepare(config, OmegaConf.create(tokenizer), progress=False)

    return make


class Last:
    """Holds out the file 1.txt."""

    def split(self, source):
        for document in source.documents():
            yield ("validation" if document.id.endswith("1.txt") else "train"), document

    def inputs(self) -> dict:
        return {}


def found(find: Callable, text: str) -> list[str]:
    return [text[start:stop] for start, stop in find(text)]


def test_of_spans_that_overlap_the_first_and_then_the_longest_stays() -> None:
    assert leftmost_longest([(3, 9), (0, 2), (0, 4), (4, 5), (9, 9 + 1)]) == [(0, 4), (4, 5), (9, 10)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("New York City, New York; York", ["New York City", "New York"]),
        ("New York Cityscape", ["New York"]),  # the longest one that ends where a word ends
        ("a NewYork newNew York", []),
        ("(New York)_New York", ["New York"]),
        ("C++, C+++ and xC++", ["C++", "C++"]),
        ("他去北京大学。北京人", ["北京大学", "北京"]),
        ("A北京B", ["北京"]),
        ("サンNew Yorkは", ["New York"]),
    ],
)
def test_entries_match_longest_at_word_borders_and_anywhere_in_scripts_without_spaces(
    text: str, expected: list[str]
) -> None:
    assert found(Entries(["New York", "New York City", "C++", "北京", "北京大学"]), text) == expected


def test_a_lexicon_matches_what_the_tokenizer_spells(tmp_path: Path, prepared_of: Prepared) -> None:
    path = tmp_path / "lexicon.txt"
    path.write_text("\ufeffU.S. Navy\r\n\n  São Paulo  \n", encoding="utf-8")
    text = "The U.S. Navy is not in São Paulo.\n" * 5
    cased, folded = prepared_of(text), prepared_of(text, WORDPIECE)
    assert found(Lexicon(str(path)).in_use(cased, KEY), text[:35]) == ["U.S. Navy", "São Paulo"]
    (spelt,) = training_text(folded, 10**6)
    assert spelt.startswith("the u . s . navy is not in sao paulo .")
    assert found(Lexicon(str(path)).in_use(folded, KEY), spelt)[:2] == ["u . s . navy", "sao paulo"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a file; name"),
        (b" \n\n", "is empty; write"),
        (b"Paris\nM\xfcnchen\n", "is not UTF-8 at byte 7; convert"),
    ],
)
def test_a_lexicon_that_cannot_be_read_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "lexicon.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        Lexicon(str(path)).check(KEY)
    assert str(error.value).startswith(f"{KEY}.path: {path} {message}")
    assert "\n" not in str(error.value)


def test_units_that_match_nothing_are_refused_by_name(tmp_path: Path, prepared_of: Prepared) -> None:
    prepared = prepared_of("There is nothing of that here.\n" * 9)
    path = tmp_path / "lexicon.txt"
    path.write_text("Paris\n")
    with pytest.raises(ValueError) as error:
        Lexicon(str(path)).in_use(prepared, KEY)
    wanted = f"{KEY}.path: {path} matches nothing in the first 10 MB of {prepared.name}; "
    assert str(error.value).startswith(wanted)
    for units in (PythonNames(), Jieba(), JiebaEntities()):
        with pytest.raises(ValueError, match=f"^{KEY}: {type(units).__name__} matches nothing"):
            units.in_use(prepared, KEY)


def test_names_of_the_python_library(prepared_of: Prepared) -> None:
    code = (
        "from collections import OrderedDict\nimport os.path, nothing\n"
        "class MyOwn(Exception):\n    def time(self): raise ValueError(os.getcwd(), self.os.x)\n"
        "# Set the time. Text of IncompleteReadError.\n"
    )
    names = ["collections", "OrderedDict", "os.path", "ValueError", "os", "IncompleteReadError"]
    prepared = prepared_of(code * 9)
    assert found(PythonNames().in_use(prepared, KEY), code) == names
    folded = prepared_of(code * 9, WORDPIECE)
    spelt = next(training_text(folded, 100))
    wanted = ["collections", "ordereddict", "os", "valueerror", "incompletereaderror"]
    assert found(PythonNames().in_use(folded, KEY), spelt)[:5] == wanted


def planted(seed: int = 0) -> str:
    """Words by chance, out of 60, and in one sentence of five "north sea oil"."""
    chance = random.Random(seed)
    vocabulary = [f"word{chance.choice('xyz')}{i}" for i in range(60)]
    sentences = []
    for number in range(2000):
        words = chance.choices(vocabulary, k=8)
        if number % 5 == 0:
            words[3:3] = ["north", "sea", "oil"]
        sentences.append(" ".join(words))
    return ".\n".join(sentences)


def test_mining_finds_a_planted_phrase_and_no_chance_pair(prepared_of: Prepared) -> None:
    text = planted()
    find = MinedPhrases(min_count=5).in_use(prepared_of(text), KEY)
    assert set(found(find, text)) == {"north sea oil"}
    assert len(find(text)) == 400
    assert found(find, "north sea, oil; north\nsea oil; north sea oils; north  sea\toil") == [
        *("north sea", "sea oil", "north sea", "north  sea\toil")
    ]


def test_one_round_finds_pairs_only(prepared_of: Prepared) -> None:
    text = planted()
    find = MinedPhrases(min_count=5, rounds=1).finder(prepared_of(text), KEY)
    assert set(found(find, text)) <= {"north sea", "sea oil"} and find(text)


def test_characters_of_a_script_without_spaces_are_mined_as_words(prepared_of: Prepared) -> None:
    chance = random.Random(1)
    characters = [chr(0x4E00 + 7 * i) for i in range(60)]
    text = "。".join("".join(chance.choices(characters, k=6)) + "机器" for _ in range(400))
    find = MinedPhrases(min_count=5).in_use(prepared_of(text), KEY)
    assert set(found(find, text)) == {"机器"}


def test_the_longest_phrase_wins() -> None:
    find = PhraseFinder([("new", "york"), ("new", "york", "city"), ("york", "city"), ("city", "hall")])
    assert found(find, "new york city hall, new york hall, york city") == [
        "new york city",
        "new york",
        "york city",
    ]


MINER = """
import sys, time
from pathlib import Path
from data.units import MinedPhrases

class Slow(MinedPhrases):
    def _mine(self, texts):
        Path(sys.argv[2]).open("a").write("mined\\n")
        time.sleep(1)
        return super()._mine(texts)

print(Slow(min_count=5).finder(Path(sys.argv[1]), "objective.phrases")("of north sea oil"))
"""


def test_two_processes_mine_once_and_see_the_same(tmp_path: Path, prepared_of: Prepared) -> None:
    prepared, log = prepared_of(planted()), tmp_path / "log"
    command = [sys.executable, "-c", MINER, str(prepared), str(log)]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert outputs == ["[(3, 16)]\n"] * 2
    assert log.read_text() == "mined\n"
    folders = {path.name for path in prepared.parent.iterdir()} - {prepared.name}
    (name,) = folders
    assert name.startswith(f"{prepared.name}-phrases-") and os.listdir(prepared.parent / name) == [
        "phrases.txt"
    ]


def test_the_cache_is_keyed_by_settings_and_text(prepared_of: Prepared) -> None:
    prepared = prepared_of(planted())
    other = prepared_of(planted(seed=1))
    targets = {
        MinedPhrases(**settings)._target(folder).name.removeprefix(folder.name)
        for folder in (prepared, other)
        for settings in ({}, {"min_count": 5}, {"threshold": 0.5}, {"rounds": 1}, {"mining_bytes": 10**6})
    }
    assert len(targets) == 10
    assert MinedPhrases()._target(prepared) == MinedPhrases()._target(prepared)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mining_bytes": 0}, "^objective.entities.mining_bytes: 0 is not positive"),
        ({"min_count": 0}, "^objective.entities.min_count: 0 is not positive"),
        ({"threshold": 1.0}, "^objective.entities.threshold: 1.0 is not at least 0"),
        ({"rounds": 5}, "^objective.entities.rounds: 5 is not from 1 to 4"),
    ],
)
def test_settings_of_mining_that_cannot_work_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MinedPhrases(**settings).check(KEY)


def test_text_without_phrases_is_refused(prepared_of: Prepared) -> None:
    prepared = prepared_of("one two three.\n" * 3)
    with pytest.raises(ValueError, match="^objective.phrases: nothing in the first 10000000 bytes of test-"):
        MinedPhrases().finder(prepared, "objective.phrases")


def test_jieba_finds_words_and_names_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], prepared_of: Prepared
) -> None:
    text = "李明在北京大学学习。He met 张伟 in 上海 (IBM)。\n"
    prepared = prepared_of(text * 9)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    words = Jieba().in_use(prepared, KEY)
    assert found(words, text) == ["李明", "北京大学", "学习", "张伟", "上海"]
    names = JiebaEntities().in_use(prepared, KEY)
    assert found(names, text) == ["李明", "北京大学", "张伟", "上海"]
    assert os.listdir(tmp_path / "temporary") == []
    assert capfd.readouterr() == ("", "")
