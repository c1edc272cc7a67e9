"""Small corpora for the tests, and stages for them that workers can import."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from datatrove.data import Document
from omegaconf import OmegaConf

from data.cli import instantiate
from data.corpus.corpus import Corpus

HERE = "tests.data.corpus.made"


class Without:
    """Drops documents that hold a word; edits those that hold `replace`."""

    def __init__(self, word: str, replace: str = "\0") -> None:
        self.word = word
        self.replace = replace

    def __call__(self, document: Document) -> str | None:
        document.text = document.text.replace(self.replace, "")
        return f"holds {self.word}" if self.word in document.text else None


class Language:
    def __call__(self, document: Document) -> None:
        document.metadata |= {"language": "en", "language_score": 0.5}


class Remembers:
    """Drops what is not the first document that it sees: it knows no others than those of its task."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, document: Document) -> str | None:
        self.seen += 1
        return "not the first" if self.seen > 1 else None


class Returns:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, document: Document) -> Any:
        return document.id if self.value == "id" else self.value


class Fails:
    """Has a bug that shows at documents that hold a word, unless there is a file."""

    def __init__(self, word: str, path: str = "") -> None:
        self.word = word
        self.path = path

    def __call__(self, document: Document) -> str | None:
        if self.word in document.text and not Path(self.path).is_file():
            raise KeyError("of\n a bug")
        return None


class Unpicklable:
    def __init__(self) -> None:
        self.function = lambda: None

    def __call__(self, document: Document) -> None: ...


class Gate:
    """Waits at documents that hold a word until there is a file; writes a line for every document."""

    def __init__(self, word: str, folder: str) -> None:
        self.word = word
        self.folder = Path(folder)

    def __call__(self, document: Document) -> None:
        with (self.folder / "seen").open("a") as file:
            file.write(document.id + "\n")
        while self.word in document.text and not (self.folder / "open").exists():
            time.sleep(0.01)


class Deadly:
    """Kills its worker at the first document, unless there is a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, document: Document) -> None:
        if not Path(self.path).exists():
            os.kill(os.getpid(), signal.SIGKILL)


def stage(name: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": name if "." in name else f"{HERE}.{name}", **arguments}


def write(folder: Path, texts: dict[str, str]) -> str:
    """Text files; the pattern that names them all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return f"{folder}/*"


def node(paths: str, directory: Path, stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    source = {"_target_": "data.sources.TextFiles", "paths": paths}
    return {
        "_target_": "data.corpus.corpus.Corpus",
        "_recursive_": False,
        "inputs": {"mine": {"source": source, "licence": "CC0", "retrieved": "2024-05-06"}},
        "stages": stages,
        "executor": {"_target_": "data.corpus.executors.Local", "workers": 2},
        "tasks": 3,
        "directory": str(directory),
    } | changes


def corpus(paths: str, directory: Path, stages: dict[str, Any], **changes: Any) -> Corpus:
    return instantiate(OmegaConf.create(node(paths, directory, stages, **changes)), "data.source")


def kept(texts: dict[str, str], folder: Path, stages: dict[str, Any], **changes: Any) -> dict[str, str]:
    """What is left of texts after some stages, by name."""
    made = corpus(write(folder / "raw", texts), folder / "corpora", stages, **changes)
    made.build(progress=False)
    found: dict[str, str] = {}
    for document in made.documents():
        name = document.id.removeprefix("mine/")
        found[name] = found.get(name, "") + document.text
    return found


def card(made: Corpus) -> dict[str, Any]:
    return json.loads((made.folder / "card.json").read_text())


def files(folder: Path) -> dict[str, bytes]:
    """The documents of a corpus, as bytes."""
    return {path.name: path.read_bytes() for path in sorted((folder / "documents").iterdir())}
