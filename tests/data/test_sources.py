import gzip
import json
import sysconfig
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import zstandard

from data.cli import instantiate
from data.sources import PIECE, HuggingFace, Parts, PythonLibrary, Rows, Source, TextFiles
from data.split import ByPosition
from data.tokenizer import BPE

TEXTS = ["one\r\n two\t", "drei 😀", '"quoted", with\nnewline']


def read(source: Source) -> list[str]:
    """The texts of the documents, pieces put together."""
    texts = [""]
    for document in source.documents():
        texts[-1] += document.text
        if document.ends:
            texts.append("")
    assert texts.pop() == ""
    return texts


def write_rows(format: str, folder: Path, rows: dict[str, list]) -> str:
    table = datasets.Dataset.from_dict(rows)
    path = str(folder / f"rows.{format}")
    {"json": table.to_json, "parquet": table.to_parquet, "csv": table.to_csv}[format](path)
    return path


def test_python_library_is_its_sources_and_its_language_reference() -> None:
    documents = {document.id: document for document in PythonLibrary().documents()}
    root = Path(sysconfig.get_path("stdlib"))
    assert documents["bisect.py"].text.encode() == (root / "bisect.py").read_bytes()
    assert "asyncio/queues.py" in documents
    assert documents["topics/assert"].text.startswith('The "assert" statement')
    assert "pydoc_data/topics.py" not in documents
    assert not [id for id in documents if "site-packages" in id or "/test" in id or id.startswith("test/")]
    inputs = PythonLibrary().inputs()
    status = (root / "bisect.py").stat()
    assert inputs[str((root / "bisect.py").resolve())] == [status.st_size, status.st_mtime_ns]


def test_text_files_come_as_they_are(tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    (tmp_path / "empty.txt").touch()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "x.md").write_text("deep")
    assert read(TextFiles(f"{tmp_path}/*.txt")) == TEXTS
    assert read(TextFiles([f"{tmp_path}/2.txt", f"{tmp_path}/?.txt"])) == [TEXTS[2], TEXTS[0], TEXTS[1]]
    assert read(TextFiles(f"{tmp_path}/**/*.md")) == ["deep"]
    assert TextFiles(f"{tmp_path}/?.txt").size() == sum(len(text.encode()) for text in TEXTS)


def test_a_change_of_a_file_changes_the_identity(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a")
    source = TextFiles(str(path))
    before = source.inputs()
    assert source.inputs() == before
    path.write_text("ab")
    assert source.inputs() != before


def test_a_corpus_that_is_moved_keeps_its_ids(tmp_path: Path) -> None:
    for place in ("here", "there/too"):
        for name in ("a/0.txt", "b/0.txt"):
            (tmp_path / place / name).parent.mkdir(parents=True)
            (tmp_path / place / name).write_text(name)
        for pattern in ("**/*.txt", "[ab]/?.txt"):
            ids = [document.id for document in TextFiles(f"{tmp_path}/{place}/{pattern}").documents()]
            assert ids == ["a/0.txt", "b/0.txt"]
    both = [f"{tmp_path}/here/a/*.txt", f"{tmp_path}/there/too/b/0.txt"]
    assert [d.id for d in TextFiles(both).documents()] == ["here/a/0.txt", "there/too/b/0.txt"]


@pytest.mark.parametrize("line", ["def f(x):\n    return 'é😀'\n", "no end of line 😀 ", "\n", "x\n\n  y\n"])
def test_a_long_file_comes_in_pieces(tmp_path: Path, line: str) -> None:
    path = tmp_path / "long.txt"
    text = line * (3_000_000 // len(line))  # several reads, characters cut in the middle by them
    path.write_bytes(text.encode())
    documents = list(TextFiles(str(path)).documents())
    assert "".join(document.text for document in documents) == text
    assert max(len(document.text) for document in documents) <= 2 * PIECE
    assert [document.ends for document in documents] == [False] * (len(documents) - 1) + [True]
    assert len({document.id for document in documents}) == 1


def test_the_cuts_between_pieces_do_not_change_the_tokens(tmp_path: Path) -> None:
    path = tmp_path / "long.py"
    parts = [document.text for document in PythonLibrary().documents() if document.id.startswith("asyncio/")]
    path.write_text("\n\n\n".join(parts))
    pieces = [document.text for document in TextFiles(str(path)).documents()]
    assert len(pieces) > 3
    tokenizer = BPE(600).train(pieces[:1])
    assert [i for piece in pieces for i in tokenizer.encode(piece).ids] == tokenizer.encode(
        "".join(pieces)
    ).ids


@pytest.mark.parametrize("offset", [0, 5, 2**20 - 1, 2**20, 2**20 + 3])
def test_what_is_not_utf8_is_named_with_file_and_byte(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(b"a" * offset + b"\xff" + b"b" * 10)
    with pytest.raises(ValueError, match=rf"bad\.txt: not UTF-8 at byte {offset} \(0xff\)"):
        read(TextFiles(str(path)))


def test_a_character_that_the_file_ends_in_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "cut.txt"
    path.write_bytes("aé".encode()[:-1])
    with pytest.raises(ValueError, match=r"cut\.txt: not UTF-8 at byte 1 \(0xc3\)"):
        read(TextFiles(str(path)))


@pytest.mark.parametrize("make", [TextFiles, lambda paths: Rows("json", paths)])
def test_paths_that_name_nothing_are_refused(tmp_path: Path, make: Callable[..., Source]) -> None:
    for paths, problem in [
        (f"{tmp_path}/none.txt", "none.txt matches no file"),
        ([f"{tmp_path}/*.x"], "x matches no file"),
        (str(tmp_path), "is a folder without files"),
        (f"{tmp_path}/**", "is a folder without files"),
        (str(Path(__file__).parent), r"data is a folder; name its files, for example with /\*.txt"),
        ([], "the list is empty"),
    ]:
        with pytest.raises(ValueError, match=rf"^data\.source\.paths: .*{problem}"):
            make(paths).inputs()


@pytest.mark.parametrize("format", ["json", "parquet", "csv"])
def test_rows_are_documents(tmp_path: Path, format: str) -> None:
    path = write_rows(format, tmp_path, {"n": [1, 2, 3, 4], "body": [*TEXTS, ""]})
    source = Rows(format, path, column="body")  # type: ignore[arg-type]
    # datasets reads csv through pandas, which takes a carriage return inside quotes for a line end
    expected = [text.replace("\r\n", "\n") for text in TEXTS] if format == "csv" else TEXTS
    assert [text.replace("\r\n", "\n") if format == "csv" else text for text in read(source)] == expected
    ids = [document.id for document in source.documents()]
    assert ids == [f"{Path(path).name}:{number}" for number in range(3)]
    assert list(source.inputs()) == [str(Path(path).resolve())]


@pytest.mark.parametrize("format", ["json", "parquet", "csv"])
def test_a_missing_column_is_named_beside_those_there_are(tmp_path: Path, format: str) -> None:
    path = write_rows(format, tmp_path, {"a": [1], "b": ["x"]})
    wrong = rf"^data\.source: .*, read as {format}: no column 'text', only a, b; set data\.source\.column"
    with pytest.raises(ValueError, match=wrong):
        read(Rows(format, path))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"column 'a' holds int, not text"):
        read(Rows(format, path, column="a"))  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["json", "parquet", "csv"])
def test_rows_keep_what_their_columns_say(tmp_path: Path, format: str) -> None:
    columns = {"text": ["a", "b" * 3 * PIECE, ""], "license": ["MIT", None, "x"], "day": ["2024-01-05"] * 3}
    path = write_rows(format, tmp_path, columns)
    source = Rows(format, path, about={"licence": "license", "retrieved": "day"})  # type: ignore[arg-type]
    first, *pieces = source.documents()
    assert first.about == {"licence": "MIT", "retrieved": "2024-01-05"}
    assert len(pieces) > 1 and all(piece.about == {"retrieved": "2024-01-05"} for piece in pieces)
    missing = Rows(format, path, about={"licence": "licence"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no column 'licence', only .*; set data\.source\.about\.licence"):
        read(missing)


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_compressed_rows(tmp_path: Path, ending: str) -> None:
    lines = "".join(
        json.dumps({"text": f"{number} {'x' * (number % 97)}"}) + "\n" for number in range(3000)
    ).encode()
    compressed = {"gz": gzip.compress, "zst": zstandard.compress}[ending](lines)
    path = tmp_path / f"rows.jsonl.{ending}"
    path.write_bytes(compressed)
    assert len(read(Rows("json", str(path)))) == 3000
    path.write_bytes(compressed[: len(compressed) // 2])
    wrong = rf"^data\.source: .*rows\.jsonl\.{ending}, read as json: "
    with pytest.raises(ValueError, match=wrong) as caught:
        read(Rows("json", str(path)))
    assert "\n" not in str(caught.value)


def test_rows_that_cannot_be_read_name_their_file(tmp_path: Path) -> None:
    for name, content in [
        ("latin.jsonl", b'{"text": "\xe9"}\n'),
        ("broken.jsonl", b'{"text": "a"}\n{"te'),
        ("words.txt", b"words, not rows\n"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"^data\.source: .*{name}, read as json: ") as caught:
            read(Rows("json", str(tmp_path / name)))
        assert "\n" not in str(caught.value)


def test_a_local_folder_goes_through_datasets(tmp_path: Path) -> None:
    for split, text in (("train", "to train on"), ("test", "to test on")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    assert read(HuggingFace(str(tmp_path))) == ["to train on"]
    assert read(HuggingFace(str(tmp_path), split="test")) == ["to test on"]
    assert len(HuggingFace(str(tmp_path)).inputs()) == 2
    with pytest.raises(ValueError, match=r"^data\.source: .*nothing"):
        read(HuggingFace(str(tmp_path), split="nothing"))


def test_a_hub_name_is_identified_by_its_revision() -> None:
    assert HuggingFace("a/b").inputs() == {"path": "a/b", "name": None, "revision": "main"}
    assert HuggingFace("a/b", name="c", revision="d").inputs() == {
        "path": "a/b",
        "name": "c",
        "revision": "d",
    }


def test_parts_come_one_after_the_other_with_their_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(f"text of {name}")
    parts = Parts({name: TextFiles(f"{tmp_path}/{name}/*.txt") for name in ("b", "a")})
    found = [(d.id, d.text, d.part, d.about["source"]) for d in parts.documents()]
    assert found == [("b/x.txt", "text of b", "b", "b"), ("a/x.txt", "text of a", "a", "a")]
    assert [part for part, _ in parts.inputs()["parts"]] == ["b", "a"] and parts.size() == 18


def test_parts_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    empty = TextFiles(f"{tmp_path}/empty.txt")
    with pytest.raises(ValueError, match=r"^data.source.parts: is empty; name at least one source"):
        Parts({})
    with pytest.raises(ValueError, match=r"^data.source.parts.a/b: a name has letters"):
        Parts({"a/b": empty})
    with pytest.raises(ValueError, match=r"^data.source.parts.a: holds no text"):
        list(Parts({"a": empty}).documents())
    with pytest.raises(
        ValueError, match=r"^data.validation: ByPosition would hold out the end of the last part"
    ):
        list(ByPosition(0.1).split(Parts({"a": empty})))


def test_what_is_wrong_with_a_part_names_its_key(tmp_path: Path) -> None:
    none = Parts({"a": TextFiles(f"{tmp_path}/none.txt")})
    with pytest.raises(ValueError, match=r"^data\.source\.parts\.a\.paths: .*none\.txt matches no file$"):
        none.inputs()
    rows = Parts({"a": Rows("json", write_rows("json", tmp_path, {"body": ["x"]}))})
    key = r"data\.source\.parts\.b\.parts\.a"
    with pytest.raises(ValueError, match=rf"^{key}: .*; set {key}\.column$"):
        list(Parts({"b": rows}).documents())


def test_a_wrong_part_is_named(tmp_path: Path) -> None:
    node = {
        "_target_": "data.sources.Parts",
        "parts": {"a": {"_target_": "data.sources.TextFiles", "path": "x"}},
    }
    with pytest.raises(
        ValueError, match=r"^data.source.parts.a.path: unknown key; data.sources.TextFiles knows paths"
    ):
        instantiate(node, "data.source")
