import gzip
import hashlib
import json
import lzma
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard
from omegaconf import DictConfig, OmegaConf

from data import encode, shards, sources, tokenizer
from data.prepare import CONF, prepare
from data.shards import TokenStream, read_manifest
from data.sources import Document
from data.tokenizer import load_tokenizer
from tests.killing import killed_at

BYTES = OmegaConf.create({"_target_": "data.tokenizer.Bytes"})
BPE = OmegaConf.create({"_target_": "data.tokenizer.BPE", "vocabulary_size": 300})
BY_DOCUMENT = {"_target_": "data.split.ByDocument", "share": 0.3}
TextConfig = Callable[..., DictConfig]


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    """40 files in tmp_path/corpus, by their path."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    words = ["alpha", "beta\n", " gamma", "\tδ", "<|endoftext|>", "😀", "\r\n"]
    random = np.random.default_rng(0)
    found = {}
    for number in range(40):
        text = " ".join(words[i] for i in random.integers(0, len(words), 50 + number))
        (folder / f"{number:02}.txt").write_bytes(text.encode())
        found[str(folder / f"{number:02}.txt")] = text
    return found


def decoded(folder: Path, split: str) -> list[str]:
    """The documents of a split, read back from its shards by the offsets."""
    stream = TokenStream(folder, split)
    reader = load_tokenizer(folder / "tokenizer")
    offsets = stream.offsets
    documents = []
    for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
        tokens = stream.read(int(start), int(stop))
        assert tokens[-1] == stream.end_of_text and stream.end_of_text not in tokens[:-1]
        documents.append(reader.decode(tokens[:-1].tolist(), skip_special_tokens=False))
    return documents


@pytest.mark.parametrize("recipe", [BYTES, BPE], ids=["bytes", "bpe"])
def test_the_shards_hold_the_text(
    tmp_path: Path, texts: dict[str, str], text_config: TextConfig, recipe: DictConfig
) -> None:
    config = text_config(f"{tmp_path}/corpus/*.txt", validation=BY_DOCUMENT)
    folder = prepare(config, recipe, progress=False)
    train, held_out = decoded(folder, "train"), decoded(folder, "validation")
    assert len(train) > len(held_out) > 3
    assert sorted(train + held_out) == sorted(texts.values())
    manifest = read_manifest(folder)
    assert manifest["round_trip"] == {"checked": 40, "unequal": 0}
    for split, documents in (("train", train), ("validation", held_out)):
        entry = manifest["splits"][split]
        sizes = [len(text.encode()) for text in documents]
        assert np.load(folder / entry["document_bytes"]["file"]).tolist() == sizes
        assert entry["bytes"] == sum(sizes) == TokenStream(folder, split).bytes
        for item in [*entry["shards"], entry["offsets"], entry["document_bytes"]]:
            assert hashlib.sha256((folder / item["file"]).read_bytes()).hexdigest() == item["sha256"]


def test_a_single_file_is_split_by_position(tmp_path: Path, text_config: TextConfig) -> None:
    path = tmp_path / "one.txt"
    text = "".join(chr(33 + i * i % 90) for i in range(200_001))  # several pieces
    path.write_text(text)
    folder = prepare(text_config(str(path)), BYTES, progress=False)
    assert decoded(folder, "train") == [text[:180_000]]
    assert decoded(folder, "validation") == [text[180_000:]]


def test_held_out_text_is_compressed_as_gzip_and_xz_do(tmp_path: Path, text_config: TextConfig) -> None:
    path = tmp_path / "one.txt"
    text = "".join(f"{i * i % 977} line\n" for i in range(50_000))
    path.write_text(text)
    entry = read_manifest(prepare(text_config(str(path)), BYTES, progress=False))["splits"]["validation"]
    held_out = text[int(len(text) * 0.9) :].encode()
    assert entry["compressed_bytes"] == len(held_out)
    by_gzip, by_xz = len(gzip.compress(held_out, 9)), len(lzma.compress(held_out, preset=9))
    assert entry["gzip_bits_per_byte"] == pytest.approx(8 * by_gzip / len(held_out), rel=1e-3)
    assert entry["xz_bits_per_byte"] == pytest.approx(8 * by_xz / len(held_out), rel=1e-2)


def test_nothing_is_done_when_nothing_changed(
    tmp_path: Path, texts: dict[str, str], text_config: TextConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = text_config(f"{tmp_path}/corpus/*.txt", validation=BY_DOCUMENT)
    folder = prepare(config, BYTES, progress=False)
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("prepared again")

    monkeypatch.setattr("data.prepare.write_splits", refuse)
    assert prepare(config, BYTES, progress=False) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == stamps
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_change_of_text_settings_or_code_makes_another_folder(
    tmp_path: Path, texts: dict[str, str], text_config: TextConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = f"{tmp_path}/corpus/*.txt"
    config = text_config(pattern, validation=BY_DOCUMENT)
    folders = [prepare(config, BYTES, progress=False), prepare(config, BPE, progress=False)]
    other_share = text_config(pattern, validation=BY_DOCUMENT | {"share": 0.5})
    folders.append(prepare(other_share, BYTES, progress=False))
    Path(next(iter(texts))).write_text("another text")
    folders.append(prepare(config, BYTES, progress=False))
    monkeypatch.setattr("data.prepare.VERSION", 10**6)
    folders.append(prepare(config, BYTES, progress=False))
    assert len(set(folders)) == 5
    assert "another text" in decoded(folders[3], "train") + decoded(folders[3], "validation")


def test_the_tokenizer_learns_from_the_training_split_only(tmp_path: Path, text_config: TextConfig) -> None:
    path = tmp_path / "one.txt"
    path.write_text("a" * 900 + "b" * 100)
    characters = OmegaConf.create({"_target_": "data.tokenizer.Characters"})
    folder = prepare(text_config(str(path)), characters, progress=False)
    assert load_tokenizer(folder / "tokenizer").token_to_id("b") is None
    unknown = load_tokenizer(folder / "tokenizer").token_to_id(tokenizer.UNKNOWN)
    assert TokenStream(folder, "validation").read(0, 100).tolist() == [unknown] * 100
    assert read_manifest(folder)["round_trip"]["unequal"] == 1  # told, not refused: it says so by UNKNOWN


def test_a_tokenizer_that_loses_what_it_must_not_is_refused(
    tmp_path: Path, texts: dict[str, str], text_config: TextConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    wordpiece = OmegaConf.create({"_target_": "data.tokenizer.WordPiece", "vocabulary_size": 100})
    config = text_config(f"{tmp_path}/corpus/*.txt", validation=BY_DOCUMENT)
    assert read_manifest(prepare(config, wordpiece, progress=False))["round_trip"]["unequal"] == 40
    monkeypatch.setattr(tokenizer.WordPiece, "lossless", True)
    plain = tmp_path / "plain.txt"
    plain.write_text("two  blanks " * 100)
    with pytest.raises(ValueError, match=r"^tokenizer: decodes document .*plain.txt to another text"):
        prepare(text_config(str(plain)), wordpiece, progress=False)


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_a_split_without_text_is_refused(
    tmp_path: Path, texts: dict[str, str], text_config: TextConfig, share: float
) -> None:
    config = text_config(f"{tmp_path}/corpus/*.txt", validation=BY_DOCUMENT | {"share": share})
    with pytest.raises(ValueError, match=r"^data.validation: no text falls to (train|validation)"):
        prepare(config, BYTES, progress=False)
    assert not (tmp_path / "prepared").exists()


def test_many_batches_and_shards_give_the_same_as_one(
    tmp_path: Path, texts: dict[str, str], text_config: TextConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = text_config(f"{tmp_path}/corpus/*.txt", validation=BY_DOCUMENT)
    one = prepare(config, BPE, progress=False)
    monkeypatch.setattr(encode, "BATCH", 300)
    monkeypatch.setattr(shards.SplitWriter.__init__, "__defaults__", (64, None))
    many = prepare(text_config(**_elsewhere(config, tmp_path)), BPE, progress=False)
    assert len(read_manifest(many)["splits"]["train"]["shards"]) > 10
    for split in ("train", "validation"):
        a, b = TokenStream(one, split), TokenStream(many, split)
        assert np.array_equal(a.read(0, a.tokens), b.read(0, b.tokens))
        assert np.array_equal(a.offsets, b.offsets)


def test_a_killed_preparation_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, texts: dict[str, str], text_config: TextConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at its changes to the disk, each time further on, through notes, shards, frames and documents of
    several pieces; by machines of more and fewer cores."""
    config = text_config(f"{tmp_path}/corpus/*.txt", validation=BY_DOCUMENT)
    for module, name, value in ((sources, "PIECE", 90), (encode, "NOTED", 700), (shards, "FRAME", 5)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(shards.SplitWriter.__init__, "__defaults__", (512, None))
    whole = prepare(config, BYTES, progress=False)
    broken = text_config(**_elsewhere(config, tmp_path))
    deaths, starts = 1, 0
    while killed_at(deaths, lambda: prepare(broken, BYTES, progress=False)):
        deaths += 1
        starts += 1
        monkeypatch.setattr(encode, "BATCH", 200 + 100 * (starts % 3))
    assert starts > 10
    again = prepare(broken, BYTES, progress=False)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for file in files:
        if file.name != "manifest.json":  # which tells how long it took
            assert (whole / file).read_bytes() == (again / file).read_bytes(), file
    first, second = (read_manifest(folder) for folder in (whole, again))
    assert first["splits"] == second["splits"] and first["round_trip"] == second["round_trip"]


def test_an_interrupted_preparation_does_not_encode_again(
    tmp_path: Path, texts: dict[str, str], text_config: TextConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = text_config(f"{tmp_path}/corpus/*.txt", validation=BY_DOCUMENT)
    seen: list[str] = []
    look = encode.RoundTrip.look

    def interrupted(self: encode.RoundTrip, document: Document, ids: np.ndarray) -> None:
        seen.append(document.id)
        if len(seen) == 30:
            raise KeyboardInterrupt
        look(self, document, ids)

    monkeypatch.setattr(encode, "BATCH", 300)
    monkeypatch.setattr(encode, "NOTED", 700)
    monkeypatch.setattr(encode.RoundTrip, "look", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, BYTES, progress=False)
    (left,) = (tmp_path / "prepared").iterdir()
    content = (left / "progress.json").read_text()
    folder = prepare(config, BYTES, progress=False)
    assert 40 < len(seen) < 55 and set(seen) == {Path(path).name for path in texts}
    assert not list(folder.glob("*progress*")) and not (folder / "lock").exists()

    # The same note beside another text: the source has changed in a way that its inputs do not tell.
    other = text_config(**_elsewhere(config, tmp_path))
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        prepare(other, BYTES, progress=False)
    (left,) = (tmp_path / "elsewhere").iterdir()
    assert json.loads(content)["items"] > 5
    note = json.loads((left / "progress.json").read_text())
    (left / "progress.json").write_text(json.dumps(note | {"digest": "0"}))
    with pytest.raises(
        ValueError, match="^data.source: gives other text than before .*; run the same command"
    ):
        prepare(other, BYTES, progress=False)
    assert prepare(other, BYTES, progress=False).name == folder.name


def test_what_is_known_of_each_document_is_kept(
    tmp_path: Path, texts: dict[str, str], text_config: TextConfig
) -> None:
    config = text_config(f"{tmp_path}/corpus/*.txt", validation=BY_DOCUMENT)
    folder = prepare(config, BYTES, progress=False)
    for split in ("train", "validation"):
        about = folder / read_manifest(folder)["splits"][split]["about"]["file"]
        with zstandard.open(about, "rt", encoding="utf-8") as file:
            ids = [json.loads(line)["id"] for line in file]
        assert decoded(folder, split) == [texts[str(tmp_path / "corpus" / id)] for id in ids]


def _elsewhere(config: DictConfig, tmp_path: Path) -> dict:
    settings = {"paths": config.source.paths, "validation": config.validation}
    return settings | {"directory": str(tmp_path / "elsewhere")}


def test_the_parts_of_a_mixture_lie_one_after_the_other(tmp_path: Path) -> None:
    parts = {}
    for name, count in (("code", 30), ("notes", 50)):
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number:02}.txt").write_text(f"{name} {number}")
        parts[name] = {"_target_": "data.sources.TextFiles", "paths": f"{tmp_path}/{name}/*.txt"}
    source = {"_target_": "data.sources.Parts", "parts": parts}
    node = {"name": "mixed", "source": source, "validation": BY_DOCUMENT, "directory": f"{tmp_path}/prepared"}
    folder = prepare(OmegaConf.create(node), BYTES, progress=False)
    for split in ("train", "validation"):
        texts, stream = decoded(folder, split), TokenStream(folder, split)
        bounds = read_manifest(folder)["splits"][split]["parts"]
        assert list(bounds) == ["code", "notes"]
        for name in parts:
            first, last = bounds[name]["documents"]
            assert last > first and all(text.startswith(name) for text in texts[first:last])
            assert [int(stream.offsets[i]) for i in (first, last)] == bounds[name]["tokens"]
        assert bounds["notes"]["documents"] == [bounds["code"]["documents"][1], stream.documents]


def test_the_command_says_where_the_corpus_and_its_card_are(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"text {number} of a corpus\n")
    source = "data.source.inputs.mine.source.paths"
    command = [
        sys.executable,
        "-m",
        "data.prepare",
        "data=cleaned",
        "tokenizer=bytes",
        f"{source}={tmp_path}/*.txt",
    ]
    command += ["data.source.executor.workers=1", "data.source.tasks=1", "data.validation.share=0.3"]
    command += [f"data.directory={tmp_path}/prepared", f"data.source.directory={tmp_path}/corpora"]
    for _ in range(2):  # made, and found made
        done = subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True, check=True)
        *counts, corpus, card, folder = done.stdout.splitlines()
        (made,) = (tmp_path / "corpora").iterdir()
        assert (corpus, card) == (f"corpus: {made}", f"data card: {made}/card.html")
        assert [Path(folder)] == list((tmp_path / "prepared").iterdir())
        assert [line.partition(":")[0] for line in counts] == ["train", "validation", "vocabulary"]
        assert (made / "card.html").is_file()
    shutil.rmtree(made)
    done = subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [*counts, folder]
