import random
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document

from data.corpus import repeats
from data.corpus.dedup import Near, RepeatedLines, Sign
from data.corpus.grams import grams, hashes, words
from data.corpus.repeats import Find, Mark, repeated
from tests.data.corpus.made import card, corpus, files, kept, stage, write

EXACT = {"exact": stage("data.corpus.dedup.Exact")}
NEAR = {"near": stage("data.corpus.dedup.Near")}
SENTENCES = "we use cookies to make this site better\nyou may refuse them here"


def prose(seed: int, length: int = 400) -> list[str]:
    """Words of a text that no other seed gives."""
    random_ = random.Random(seed)
    return [f"w{min(int(random_.paretovariate(0.6)), 20_000)}" for _ in range(length)]


def changed(text: list[str], share: float, seed: int) -> list[str]:
    random_ = random.Random(seed)
    places = random_.sample(range(len(text)), round(share * len(text)))
    return [f"x{seed}" if place in places else word for place, word in enumerate(text)]


def test_of_equal_texts_the_first_stays(tmp_path: Path) -> None:
    texts = {
        "a": "One  text\nof two.",
        "b": "one text of two.\n",
        "c": "one text of three",
        "d": "ONE TEXT OF TWO.",
    }
    assert list(kept(texts, tmp_path, EXACT, tasks=1)) == ["a", "c"]
    # Dealt out in turn, the order is that of the tasks: 0, b and d, then a and c.
    assert list(kept({"0": "0"} | texts, tmp_path / "two", EXACT, tasks=2)) == ["0", "b", "c"]


def test_exact_duplicates_are_told_in_the_card(tmp_path: Path) -> None:
    texts = {f"{name}{n}": f"{name} text of some words" for name in "abc" for n in range(4)}
    texts["own"] = "a text of its own"
    made = corpus(write(tmp_path / "raw", texts), tmp_path, EXACT, tasks=3)
    made.build(progress=False)
    assert {document.text for document in made.documents()} == set(texts.values())
    exact = card(made)["stages"][-1]
    size = sum(map(len, texts.values()))
    dropped = {"documents": 9, "bytes": 9 * len(texts["a0"]), "tokens": 9 * 5}
    assert exact["dropped"] == {"exact duplicate": dropped}
    assert exact["in"] == {"documents": 13, "bytes": size, "tokens": 13 * 5}
    assert exact["out"] == {unit: exact["in"][unit] - dropped[unit] for unit in dropped}
    assert [example["reason"] for example in exact["examples"]] == ["exact duplicate"] * 5
    assert "<th>exact duplicate</th>" in (made.folder / "card.html").read_text()


def test_near_duplicates_are_found_and_others_stay(tmp_path: Path) -> None:
    originals = {f"o{n}": prose(n) for n in range(150)}
    near = {f"n{n}": changed(originals[f"o{n}"], 0.01, n) for n in range(100)}
    moved = {f"m{n}": originals[f"o{n}"][200:] + originals[f"o{n}"][:200] for n in range(100, 150)}
    texts = {name: " ".join(text) for name, text in (originals | near | moved).items()}
    left = kept(texts, tmp_path, NEAR, tasks=4)
    groups = [{name[1:] for name in left if name[1:] == str(n)} for n in range(150)]
    assert all(groups)  # of each group at least one stays
    found = len(texts) - len(left)
    assert found >= 0.95 * 150
    assert set(left.values()) <= set(texts.values())


def test_unlike_documents_are_not_taken_for_near_duplicates(tmp_path: Path) -> None:
    texts = {f"o{n}": " ".join(prose(n)) for n in range(100)}
    halves = {
        f"h{n}": " ".join(changed(prose(n), 0.3, n)) for n in range(100)
    }  # a fifth of the runs in common
    assert len(kept(texts | halves, tmp_path, NEAR)) >= 0.99 * 200


def test_near_duplicates_in_chinese(tmp_path: Path) -> None:
    random_ = random.Random(0)
    text = "".join(chr(0x4E00 + min(int(random_.paretovariate(0.5)), 5000)) for _ in range(600))
    texts = {"a": text, "b": text[:300] + "改" + text[301:], "c": text[::-1]}
    left = kept(texts, tmp_path, NEAR)
    assert len(left) == 2 and "c" in left


def test_signatures_do_not_depend_on_how_they_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign = Sign(str(tmp_path), Near().config)
    shingles = sign.get_shingles(" ".join(prose(1, 3000)))
    assert len(shingles) > 2000
    whole = super(Sign, sign).get_signature(shingles)
    assert sign.get_signature(shingles) == whole
    monkeypatch.setattr("data.corpus.dedup.SHINGLES", 7)
    assert sign.get_signature(shingles) == whole


def test_repeated_lines_go_after_the_first_time(tmp_path: Path) -> None:
    stages = {"lines": stage("data.corpus.dedup.RepeatedLines", documents=4)}
    texts = {
        f"{n}": f"Home\nAbout\nContact and more\n\nStory {n} of its own.\n\nAll  rights RESERVED.\n"
        for n in range(8)
    }
    texts["8"] = "A line\nAll rights reserved.\nof another\n"
    texts["9"] = "Home\nAbout\n\nthe end, and no more"
    left = kept(texts, tmp_path, stages, tasks=1)
    assert left["0"] == texts["0"]
    assert [left[f"{n}"] for n in range(1, 8)] == [f"Story {n} of its own." for n in range(1, 8)]
    assert left["8"] == "A line\nof another"
    assert left["9"] == texts["9"]  # short lines go as parts of paragraphs only


def test_lines_of_few_documents_stay(tmp_path: Path) -> None:
    stages = {"lines": stage("data.corpus.dedup.RepeatedLines", documents=4, kept=2)}
    texts = {f"{n}": f"own text {n}\n" + f"{SENTENCES}\n" * 5 for n in range(3)}
    assert kept(texts, tmp_path, stages, tasks=1) == texts
    texts["3"] = SENTENCES
    left = kept(texts, tmp_path / "more", stages, tasks=1)
    assert left == {"0": texts["0"], "1": texts["1"], "2": "own text 2"}


def test_a_document_of_nothing_but_repeated_lines_is_dropped(tmp_path: Path) -> None:
    stages = {"lines": stage("data.corpus.dedup.RepeatedLines", documents=3)}
    made = corpus(write(tmp_path / "raw", {f"{n}": SENTENCES for n in range(5)}), tmp_path, stages)
    made.build(progress=False)
    assert card(made)["stages"][-1]["dropped"]["only repeated lines"]["documents"] == 4


def test_kept_must_be_less_than_documents() -> None:
    with pytest.raises(ValueError, match=r"^kept: 3 is not at least 0 and less than documents \(3\)"):
        RepeatedLines(documents=3, kept=3)


def test_many_runs_find_the_same_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_ = random.Random(0)
    texts = [[random_.randrange(40) for _ in range(random_.randrange(9))] for _ in range(120)]

    def found(folder: Path, tasks: int) -> dict[int, dict[int, list[int]]]:
        marks, out = str(folder / "marks"), str(folder / "found")
        for task in range(3):
            step = Mark(marks, lambda text: [(i, int(n) * 2**58) for i, n in enumerate(text.split())])
            share = [Document(" ".join(map(str, text)), "") for text in texts[task::3]]
            assert list(step.run(iter(share), task)) == share
        for task in range(tasks):
            Find(marks, out, documents=15, kept=2).run(rank=task, world_size=tasks)
        return {task: dict(repeated(out, task)) for task in range(3)}

    expected: dict[int, dict[int, list[int]]] = {0: {}, 1: {}, 2: {}}
    holders: dict[int, list[tuple[int, int]]] = {}
    for task in range(3):
        for place, text in enumerate(texts[task::3]):
            for number in set(text):
                holders.setdefault(number, []).append((task, place))
    for number, places in holders.items():
        for task, place in places[2:] if len(places) >= 15 else []:
            units = [i for i, n in enumerate(texts[task::3][place]) if n == number]
            expected[task][place] = sorted(expected[task].get(place, []) + units)
    assert sum(map(len, expected.values())) > 50
    assert found(tmp_path / "one", 1) == expected
    monkeypatch.setattr(repeats, "RUN", 10)
    monkeypatch.setattr(repeats, "CHUNK", 3)
    assert found(tmp_path / "many", 5) == expected


def test_the_files_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    texts = {f"{n:03}": " ".join(changed(prose(n % 60), 0.01, n)) + "\n" + SENTENCES for n in range(120)}
    paths = write(tmp_path / "raw", texts)
    stages = EXACT | NEAR | {"lines": stage("data.corpus.dedup.RepeatedLines")}
    found = []
    for workers in (1, 2):
        executor = stage("data.corpus.executors.Local", workers=workers)
        found.append(
            files(corpus(paths, tmp_path / f"{workers}", stages, executor=executor).build(progress=False))
        )
    assert found[0] == found[1]


def test_words_of_any_language() -> None:
    assert words("Don't PANIC: 42_times!") == ["don", "t", "panic", "42", "times"]
    assert words("Ünï, 中文abc、かな") == ["ünï", "中", "文", "abc", "か", "な"]
    assert len(words("สวัสดีชาวโลก")) > 1


def test_long_texts_are_cut_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(prose(0, 500)) + "中文" * 100
    whole = hashes(text)
    monkeypatch.setattr("data.corpus.grams.PIECE", 50)
    assert np.array_equal(hashes(text), whole)


def test_grams_are_runs_of_words() -> None:
    numbers = hashes("a b c d a b c")
    runs = grams(numbers, 3)
    assert len(runs) == 5 and runs[0] == runs[4] and len(np.unique(runs)) == 4
    assert grams(hashes("c b a"), 3)[0] != runs[0]
    assert len(grams(numbers[:2], 3)) == len(grams(numbers[:0], 3)) == 0
    assert grams(hashes("A, b; C"), 3)[0] == runs[0]
    assert runs[0] == 906971811904906323  # the same on every machine
