import json
import random
from pathlib import Path

import pytest
from datatrove.data import Document

from data.corpus.decontaminate import Decontaminate
from data.sources import Rows, TextFiles
from tests.data.corpus.made import card, corpus, stage, write

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
SHORT = "Which of these birds cannot fly at all?"  # eight words
ANSWER = "He paid 72 dollars."
CHINESE = "小明有十二个苹果，他给了小红三个，请问他还剩下多少个苹果？"


@pytest.fixture
def against(tmp_path: Path) -> Decontaminate:
    rows = tmp_path / "maths.jsonl"
    rows.write_text("".join(json.dumps({"body": text}) + "\n" for text in (QUESTION, ANSWER, CHINESE)))
    birds = write(tmp_path / "birds", {"a": SHORT})
    return Decontaminate({"maths": Rows("json", str(rows), "body"), "birds": TextFiles(birds)})


def reason(stage: Decontaminate, text: str) -> str | None:
    return stage(Document(text, "0"))


def test_a_run_of_words_of_a_set_drops_the_document(against: Decontaminate) -> None:
    words = QUESTION.split()
    run = " ".join(words[3:16])
    assert reason(against, f"Before it. {run} after it.") == "maths"
    assert reason(against, f"Before it. {run.upper().replace(' ', ' - ')}!") == "maths"
    assert reason(against, " ".join(words[3:15])) is None  # twelve words
    assert reason(against, " ".join([*words[:10], "not", *words[10:]])) is None
    assert reason(against, "") is None


def test_a_short_text_is_looked_for_whole(against: Decontaminate) -> None:
    assert reason(against, "The test asks: which of these birds cannot fly at all? And more.") == "birds"
    assert reason(against, "which of these birds cannot fly at home?") is None
    assert reason(against, "he paid 72 DOLLARS") == "maths"
    assert (
        reason(against, "I know that he paid 72 dollars for it.") is None
    )  # too short to be more than chance


def test_characters_are_words_in_chinese(against: Decontaminate) -> None:
    assert reason(against, "题目：" + CHINESE[3:19]) == "maths"
    assert reason(against, "题目：" + CHINESE[3:12]) is None


def test_the_first_of_two_sets_is_the_reason(against: Decontaminate) -> None:
    assert reason(against, f"{SHORT} {QUESTION}") == "maths"


def test_no_document_is_dropped_by_chance(against: Decontaminate) -> None:
    vocabulary = sorted(set(f"{QUESTION} {SHORT}".lower().split()))
    random_ = random.Random(0)
    assert not any(reason(against, " ".join(random_.choices(vocabulary, k=100))) for _ in range(200))


def test_it_is_a_stage_and_its_sets_count_as_inputs(tmp_path: Path) -> None:
    sets = write(tmp_path / "sets", {"a": QUESTION})
    against = {"quiz": {"_target_": "data.sources.TextFiles", "paths": sets}}
    stages = {"clean": stage("data.corpus.decontaminate.Decontaminate", against=against)}
    paths = write(tmp_path / "raw", {"a": "a text", "b": f"so {QUESTION}"})
    made = corpus(paths, tmp_path, stages)
    assert [document.text for document in made.documents()] == ["a text"]
    assert card(made)["stages"][-1]["dropped"]["quiz"]["documents"] == 1
    before = made.fingerprint
    write(tmp_path / "sets", {"a": "another"})
    assert corpus(paths, tmp_path, stages).fingerprint != before


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^against: names no evaluation set"):
        Decontaminate({})
    empty = TextFiles(write(tmp_path, {"a": "..."}))
    with pytest.raises(ValueError, match="^n: 5 is less than 8 words"):
        Decontaminate({"a": empty}, n=5)
    with pytest.raises(ValueError, match="^against.quiz: holds no words"):
        reason(Decontaminate({"quiz": empty}), "text")


@pytest.mark.parametrize(
    ("quiz", "message"),
    [
        ("raw/empty.txt", ": holds no words; name another evaluation set"),
        ("none.txt", r"\.paths: .*/none\.txt matches no file"),
        (None, ": None is no node with a _target_"),
    ],
)
def test_a_mistake_in_a_set_names_its_key(tmp_path: Path, quiz: str | None, message: str) -> None:
    paths = write(tmp_path / "raw", {"empty.txt": "...", "a.txt": "text"})
    source = quiz and {"_target_": "data.sources.TextFiles", "paths": f"{tmp_path}/{quiz}"}
    stages = {"quiz": stage("data.corpus.decontaminate.Decontaminate", against={"quiz": source})}
    with pytest.raises(ValueError, match=rf"^data\.source\.stages\.quiz\.against\.quiz{message}"):
        corpus(paths, tmp_path, stages).build(progress=False)
