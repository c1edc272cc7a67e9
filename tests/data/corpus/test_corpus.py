import inspect
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from datatrove.data import Document as Datatrove
from tokenizers.pre_tokenizers import ByteLevel

from data.corpus import card as page
from data.corpus import files as corpus_files
from data.corpus.counts import tokens
from data.corpus.dedup import PARAGRAPH
from data.corpus.files import Input, Read
from data.corpus.repeats import MARK
from data.corpus.stage import Step, Tally, counted
from data.sources import PIECE, Document, TextFiles
from tests.data.corpus.made import Without, card, corpus, files, kept, node, stage, write

ROOT = Path(__file__).resolve().parents[3]
TEXTS = {f"{n:02}.txt": f"text {n} about {'cats' if n % 3 else 'dogs'}.\n" * (n + 1) for n in range(20)}
DEDUP = {
    "exact": stage("data.corpus.dedup.Exact"),
    "near": stage("data.corpus.dedup.Near"),
    "lines": stage("data.corpus.dedup.RepeatedLines", documents=3),
}
BUILD = """
import json, sys
from data.cli import instantiate, one_line_errors
one_line_errors(lambda: print(instantiate(json.loads(sys.argv[1]), "data.source").build()))()
"""


def start(settings: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD, json.dumps(settings)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_documents_go_through_the_stages(tmp_path: Path) -> None:
    stages = {
        "language": stage("Language"),
        "own": stage("Without", word="dogs", replace="about "),
        "none": None,
    }
    made = corpus(write(tmp_path / "raw", TEXTS), tmp_path, stages, name="pets")
    assert made.size() is None
    documents = list(made.documents())
    expected = {f"mine/{name}": text.replace("about ", "") for name, text in TEXTS.items() if "cats" in text}
    assert {document.id: document.text for document in documents} == expected
    about = {"source": "mine", "licence": "CC0", "retrieved": "2024-05-06", "language": "en"}
    assert documents[0].about == about | {"language_score": "0.5"}
    assert made.size() == sum(len(text.encode()) for text in expected.values())
    assert made.folder.name == f"pets-{made.fingerprint[:12]}"
    assert sorted(path.name for path in made.folder.iterdir()) == ["card.html", "card.json", "documents"]


def test_the_card_counts_what_happened(tmp_path: Path) -> None:
    stages = {"language": stage("Language"), "own": stage("Without", word="dogs", replace="about ")}
    made = corpus(write(tmp_path / "raw", TEXTS), tmp_path, stages)
    made.build(progress=False)
    found = card(made)
    assert page.contradictions(found) == []
    pieces = ByteLevel(add_prefix_space=False)
    raw = {
        "documents": 20,
        "bytes": sum(map(len, TEXTS.values())),
        "tokens": sum(len(pieces.pre_tokenize_str(text)) for text in TEXTS.values()),
    }
    assert found["raw"] == raw
    dogs = [text for text in TEXTS.values() if "dogs" in text]
    read, language, own = found["stages"]
    assert (read["name"], language["out"], language["edited"]) == ("read", raw, 0)
    assert own["target"] == "tests.data.corpus.made.Without"
    assert own["dropped"]["holds dogs"]["documents"] == len(dogs) == 7
    assert own["dropped"]["holds dogs"]["bytes"] == sum(map(len, dogs))
    assert own["edited"] == 13
    assert own["by_source"]["mine"]["out"] == own["out"]
    assert [len(own["examples"]), {e["text"] in dogs for e in own["examples"]}] == [5, {True}]
    final = found["final"]
    assert final["languages"] == {"en": 13}
    assert (
        final["sources"]["mine"] | {"licence": "CC0", "retrieved": "2024-05-06"} == final["sources"]["mine"]
    )
    lengths: dict[str, int] = {}
    for document in made.documents():
        power = str(2 ** (len(document.text).bit_length() - 1))
        lengths[power] = lengths.get(power, 0) + 1
    assert final["lengths"] == lengths


def test_the_files_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    paths = write(tmp_path / "raw", TEXTS)
    folders = []
    for workers in (1, 2):
        executor = stage("data.corpus.executors.Local", workers=workers)
        made = corpus(
            paths, tmp_path / str(workers), DEDUP | {"first": stage("Remembers")}, executor=executor
        )
        folders.append(made.build(progress=False))
    one, two = folders
    assert one.name == two.name
    assert files(one) == files(two)
    first, second = (json.loads((folder / "card.json").read_text()) for folder in folders)
    for content in (first, second):
        del content["made"]
        for entry in content["stages"]:
            del entry["seconds"]
    assert first == second
    assert first["final"]["documents"] <= 3  # one of each task: a stage knows nothing of other tasks


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_build_goes_on_and_gives_the_same_files(tmp_path: Path, seed: int) -> None:
    paths = write(
        tmp_path / "raw", {f"{n:03}": f"{n} " * 500 + "same line of text\n" * 2 for n in range(200)}
    )
    expected = files(corpus(paths, tmp_path / "whole", DEDUP).build(progress=False))
    made = corpus(paths, tmp_path / "killed", DEDUP)
    done = random.Random(seed).randrange(1, 25)
    process = start(node(paths, tmp_path / "killed", DEDUP))
    wait_for(
        lambda: len(list(made.folder.glob("work/*/completions/*"))) >= done or process.poll() is not None
    )
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    made.build(progress=False)
    assert files(made.folder) == expected
    assert page.contradictions(card(made)) == []


def test_finished_tasks_are_not_done_again(tmp_path: Path) -> None:
    paths = write(tmp_path / "raw", TEXTS)
    stages = {"gate": stage("Gate", word="text 10 ", folder=str(tmp_path)), **DEDUP}
    made = corpus(paths, tmp_path, stages)
    process = start(node(paths, tmp_path, stages))
    wait_for(lambda: len(list(made.folder.glob("work/00/completions/*"))) == 2)
    process.kill()
    process.communicate()
    before = (tmp_path / "seen").read_text().splitlines()
    assert len(set(before)) == len(before)
    (tmp_path / "open").touch()
    made.build(progress=False)
    after = (tmp_path / "seen").read_text().splitlines()[len(before) :]
    share = [f"mine/{name}" for number, name in enumerate(TEXTS) if number % 3 == 10 % 3]
    assert after == share


def test_one_process_builds_while_another_waits(tmp_path: Path) -> None:
    paths = write(tmp_path / "raw", TEXTS)
    settings = node(paths, tmp_path, {"gate": stage("Gate", word="text 7 ", folder=str(tmp_path))})
    first = start(settings)
    wait_for((tmp_path / "seen").exists)
    second = start(settings)
    (tmp_path / "open").touch()
    answers = [process.communicate() for process in (first, second)]
    assert answers[0] == answers[1] and answers[0][1] == ""
    assert sorted((tmp_path / "seen").read_text().split()) == sorted(f"mine/{name}" for name in TEXTS)


def test_a_worker_that_is_killed_ends_in_a_line_and_the_next_build_goes_on(tmp_path: Path) -> None:
    made = corpus(
        write(tmp_path / "raw", TEXTS), tmp_path, {"own": stage("Deadly", path=f"{tmp_path}/spare")}
    )
    with pytest.raises(ValueError, match=r"^data\.source\.executor: . of 3 tasks of read, own did not end"):
        made.build(progress=False)
    (tmp_path / "spare").touch()
    assert len(list(made.documents())) == len(TEXTS)


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    paths = write(tmp_path / "raw", TEXTS)
    (tmp_path / "raw" / "bad.txt").write_bytes(b"a\xff")
    process = start(node(paths, tmp_path, {}))
    out, errors = process.communicate()
    assert process.returncode == 1 and out == ""
    line = f"error: {tmp_path}/raw/bad.txt: not UTF-8 at byte 1 (0xff); convert the file, for example with "
    assert errors == line + "iconv -t UTF-8, or leave it out\n"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            {"own": stage("Without", word="text")},
            r"stages\.own: drops every document \(holds text 20\); change it",
        ),
        (
            {"own": stage("Without", word="\0", replace="text"), "b": stage("Returns", value="no")},
            "b: drops every",
        ),
        ({"own": stage("Returns", value=True)}, r"stages\.own: returned True, not a reason to drop or None"),
        ({"own": stage("Unpicklable")}, "stages: cannot go to the workers: .*lambda"),
        ({"own": stage("Without")}, r"stages\.own\.word: missing"),
        ({"own": stage("Without", word="a", words="b")}, r"stages\.own\.words: unknown key"),
        ({"own": "Without"}, r"stages\.own: 'Without' is no node with a _target_; write 'data\.source\.st"),
        (
            {"own": {"word": "a"}},
            r"stages\.own: has no _target_ that names a class; set data\.source\.stages",
        ),
        ({"a/b": stage("Language")}, "a/b cannot be a name"),
        ({"read": stage("Language")}, "read cannot be a name"),
    ],
)
def test_mistakes_in_stages_are_one_line(tmp_path: Path, stages: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^data\.source.*{message}") as caught:
        corpus(write(tmp_path / "raw", TEXTS), tmp_path, stages).build(progress=False)
    assert "\n" not in str(caught.value)


def test_reasons_must_be_few(tmp_path: Path) -> None:
    texts = {str(number): "text" for number in range(400)}
    with pytest.raises(ValueError, match=r"^data\.source\.stages\.own: gives more than 100 reasons"):
        kept(texts, tmp_path, {"own": stage("Returns", value="id")})


def test_an_error_in_a_stage_of_ones_own_is_one_line_and_the_next_build_goes_on(tmp_path: Path) -> None:
    paths = write(tmp_path / "raw", TEXTS)
    stages = {"own": stage("Fails", word="text 13 ", path=f"{tmp_path}/mended")}
    process = start(node(paths, tmp_path, stages, executor=stage("data.corpus.executors.Local", workers=1)))
    out, errors = process.communicate()
    made = corpus(paths, tmp_path, stages)
    log = made.folder / "work" / "00" / "logs" / "task_00001.log"
    where = "at document mine/13.txt of source mine"
    assert (process.returncode, out) == (1, "")
    assert errors == (
        f"error: data.source.stages.own: KeyError: 'of\\n a bug', {where}; its trace is in {log}\n"
    )
    assert "made.py" in log.read_text() and "raise KeyError" in log.read_text()
    assert [path.name for path in made.folder.glob("work/00/completions/*")] == ["00000"]
    finished = made.folder / "documents" / "00000.jsonl.zst"
    before = finished.stat().st_mtime_ns
    (tmp_path / "mended").touch()
    assert len(list(made.documents())) == len(TEXTS)
    assert finished.stat().st_mtime_ns == before


def test_a_bug_in_a_stage_of_ours_keeps_its_trace(tmp_path: Path) -> None:
    marks = np.zeros(1, MARK)  # names a paragraph that the first document does not have
    marks["unit"] = PARAGRAPH + 5
    (tmp_path / "found").mkdir()
    np.save(tmp_path / "found" / "00000-00000.npy", marks)
    stages = {"lines": stage("data.corpus.dedup.RemoveLines", found=f"{tmp_path}/found")}
    said = r"read, lines: data\.source\.stages\.lines: KeyError: 5, at document mine/00\.txt of source mine\n"
    with pytest.raises(RuntimeError, match=rf"(?s)^{said}.*dedup\.py.*KeyError: 5"):
        kept(TEXTS, tmp_path, stages)


def test_mistakes_in_inputs_are_one_line(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty", {"a": ""})
    with pytest.raises(ValueError, match=r"^data\.source\.inputs\.mine: holds no documents; leave it out"):
        corpus(empty, tmp_path, {}).build(progress=False)
    for inputs, message in [
        ({}, "inputs: is empty"),
        (
            {"a": {"source": {"_target_": "data.sources.TextFiles", "paths": "???"}}},
            r"inputs\.a\.source\.paths: must",
        ),
        (
            {"a": {"source": {"_target_": "data.sources.TextFiles", "paths": "x"}, "date": 1}},
            r"inputs\.a\.date: unk",
        ),
        ({"a": {"paths": "x"}}, r"inputs\.a: must name its source"),
    ]:
        with pytest.raises(ValueError, match=rf"^data\.source\.{message}"):
            corpus("", tmp_path, {}, inputs=inputs)
    with pytest.raises(ValueError, match=r"^data\.source\.inputs\.mine\.source\.paths: .*no\.txt matches no"):
        corpus(f"{tmp_path}/no.txt", tmp_path, {}).inputs()
    with pytest.raises(ValueError, match=r"^data\.source\._recursive_: must be false"):
        corpus(empty, tmp_path, {}, _recursive_=True)


def test_what_a_worker_cannot_read_names_the_key_of_its_input(tmp_path: Path) -> None:
    write(tmp_path / "raw", {"a.jsonl": '{"body": "text"}\n'})
    source = {"_target_": "data.sources.Rows", "format": "json", "paths": f"{tmp_path}/raw/a.jsonl"}
    process = start(node("", tmp_path, {}, inputs={"rows": {"source": source}}))
    out, errors = process.communicate()
    key = "data.source.inputs.rows.source"
    wrong = f"no column 'text', only body; set {key}.column"
    assert (process.returncode, out) == (1, "")
    assert errors == f"error: {key}: {tmp_path}/raw/a.jsonl, read as json: {wrong}\n"


def test_what_changes_the_documents_changes_the_folder(tmp_path: Path) -> None:
    paths = write(tmp_path / "raw", TEXTS)
    plain = corpus(paths, tmp_path, {})
    other = {"_target_": "data.corpus.executors.Local", "workers": 1}
    assert corpus(paths, tmp_path / "b", {}, executor=other).inputs() == plain.inputs()
    assert corpus(paths, tmp_path, {"own": None}).inputs() == plain.inputs()
    assert corpus(paths, tmp_path, {}, tasks=4).inputs() != plain.inputs()
    assert corpus(paths, tmp_path, {"own": stage("Language")}).inputs() != plain.inputs()
    (tmp_path / "raw" / "00.txt").write_text("another")
    assert corpus(paths, tmp_path, {}).inputs() != plain.inputs()


@pytest.mark.parametrize("harm", ["cut", "cut between rows", "flip", "remove"])
def test_a_damaged_corpus_is_named(tmp_path: Path, harm: str) -> None:
    made = corpus(write(tmp_path / "raw", TEXTS), tmp_path, {})
    file = made.build(progress=False) / "documents" / "00001.jsonl.zst"
    content = file.read_bytes()
    file.unlink()
    if harm == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif harm == "cut between rows":
        rows = zstandard.ZstdDecompressor().stream_reader(content).read().splitlines(keepends=True)
        file.write_bytes(zstandard.compress(b"".join(rows[:-1])))
    elif harm == "flip":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(ValueError, match=r"00001\.jsonl\.zst: .*; delete its corpus and build it again"):
        list(made.documents())


class Several:
    """Documents in pieces, in files that can be read one by one."""

    def __init__(self, count: int) -> None:
        self.names = [Path(f"{n}") for n in range(count)]

    def files(self) -> list[Path]:
        return self.names

    def documents(self, files: list[Path] | None = None) -> Iterator[Document]:
        for name in files or self.names:
            for text in ("a", "b"):
                about = {"url": f"http://{name}", "licence": "MIT"}
                yield Document(f"{name}{text}", f"{name}", ends=False, about=about)
                yield Document(f"{name}{text}", text, about=about)


def read(source: Any, tasks: int, folder: Path) -> list[list[Datatrove]]:
    step = Read({"in": Input(source, licence="CC0")}, folder / "tallies", folder / "progress")
    return [list(step.run(None, task, tasks)) for task in range(tasks)]


@pytest.mark.parametrize("count", [2, 5, 9])
def test_every_document_is_read_once_by_files_or_in_turn(tmp_path: Path, count: int) -> None:
    dealt = read(Several(count), 4, tmp_path)
    found = sorted((document.id, document.text) for share in dealt for document in share)
    assert found == sorted((f"in/{n}{text}", f"{n}{text}") for n in range(count) for text in "ab")
    names = [{document.text[0] for document in share} for share in dealt]
    if count >= 4:
        assert sum(map(len, names)) == count  # a file is read by one task
    assert dealt[0][0].metadata["licence"] == "MIT"  # what a document knows of itself comes first
    assert dealt[0][0].metadata["url"] == "http://0"


def test_a_document_that_is_too_long_is_dropped_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_files, "LONGEST", 5 * PIECE)
    long = "a line of text\n" * (5 * PIECE // 15)
    paths = write(
        tmp_path / "raw", {"a": "short", "b": long, "c": long + "more than that", "d": "short, too"}
    )
    (share,) = read(TextFiles(paths), 1, tmp_path)
    assert [document.id for document in share] == ["in/a", "in/b", "in/d"]
    assert share[1].text == long
    entry = Tally.load((tmp_path / "tallies").iterdir()).card()
    size = len(long) + len("more than that")
    assert entry["dropped"] == {
        "too long": {"documents": 1, "bytes": size, "tokens": tokens(long + "more than that")}
    }


def test_tokens_are_pieces_of_the_pre_tokenizer() -> None:
    pieces = ByteLevel(add_prefix_space=False)
    letters = random.Random(0)
    for alphabet in ("abst'dlrev  \n\t_.1", "abst'dlre1²  \n\t_.é中\u0301\xa0’"):
        for _ in range(3000):
            text = "".join(letters.choices(alphabet, k=letters.randrange(15)))
            assert tokens(text) == len(pieces.pre_tokenize_str(text)), repr(text)


def test_tokens_are_counted_again_when_the_text_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr("data.corpus.stage.tokens", lambda text: calls.append(text) or len(text))
    document = Datatrove("a cat", "0", metadata={"source": "s"})
    for word in ("cat", "cat", " "):
        step = Step("own", Without("dog", replace=word), tmp_path)
        assert list(step.run(iter([document]))) == [document]
    assert calls == ["a cat", "a ", "a"]
    assert counted(document)["tokens"] == 1


def test_nothing_but_the_result_is_printed(tmp_path: Path) -> None:
    process = start(node(write(tmp_path / "raw", TEXTS), tmp_path, DEDUP))
    out, errors = process.communicate()
    assert errors == "" and out.count("\n") == 1
    assert Path(out.strip(), "card.json").is_file()


def test_a_corpus_of_one_document_that_is_too_long_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("a line of text\n" * (corpus_files.LONGEST // 15 + 1))
    made = corpus(f"{tmp_path}/long.txt", tmp_path, {})
    with pytest.raises(ValueError, match=r"^data\.source\.inputs: all are dropped \(too long 1\)"):
        made.build(progress=False)


def test_another_code_of_a_stage_of_ones_own_makes_another_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, stages = write(tmp_path / "raw", TEXTS), {"own": stage("Without", word="nothing")}
    before = corpus(paths, tmp_path, stages).fingerprint
    assert corpus(paths, tmp_path, stages).fingerprint == before
    monkeypatch.setattr(inspect, "getsource", lambda module: f"# {module.__name__}, edited")
    assert corpus(paths, tmp_path, stages).fingerprint != before
