"""Where text comes from. A source yields documents in a fixed order and knows the identity of its inputs.

A document is (id, text); a long one comes in several pieces of the same id, so that memory stays flat
whatever the size of a file. Empty documents are left out: there is nothing in them to predict.
"""

import codecs
import datetime
import glob
import importlib
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from data.cli import standing_at
from data.hub import failure, quiet_datasets

PIECE = 2**16  # characters; small beside what the cores encode at once, so that none of them waits for long
READ = 2**20  # bytes
# Where a text may be cut without changing its tokens: pre-tokenizers look at whole runs of white space, so
# only at the end of a line that ends in one newline and is followed by something visible.
CUT = re.compile(r"(?<=\S\n)(?=\S)")
NAME = re.compile(r"[\w-]+")
NOTHING: Mapping[str, str] = MappingProxyType({})


class Document(NamedTuple):
    """A document, or a piece of a long one; `ends` is true on the last piece.

    about: what is known of it, by source, licence, retrieved (ISO date), url, language. part: the component
    of a mixture that it belongs to.
    """

    id: str
    text: str
    ends: bool = True
    about: Mapping[str, str] = NOTHING
    part: str = ""


class Source(Protocol):
    def documents(self) -> Iterator[Document]:
        """Every document, in the same order each time. Raises ValueError on what cannot be read."""
        ...

    def inputs(self) -> dict[str, Any]:
        """What the text depends on; equal answers mean equal text. Raises ValueError on a missing input."""
        ...

    def size(self) -> int | None:
        """About how many bytes of text there are, where that is known without reading them."""
        ...


@runtime_checkable
class Builds(Protocol):
    """A source that makes its text before it can be read, and keeps it."""

    def build(self, progress: bool = True) -> Path: ...

    def page(self) -> Path:
        """Where its data card lies once it is made, in the folder of the text."""
        ...


class PythonLibrary:
    """The standard library of the running Python: its source files and its language reference.

    Tests and site-packages are left out: some distributions ship the library without its tests, and what
    else is installed differs from machine to machine.
    """

    SKIPPED = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})

    def __init__(self) -> None:
        self.root = Path(sysconfig.get_path("stdlib"))

    def documents(self) -> Iterator[Document]:
        for path in self._files():
            name = path.relative_to(self.root).as_posix()
            if name != "pydoc_data/topics.py":  # comes as text below, not as one escaped literal
                yield from pieces(name, [_python_text(path)])
        for topic, text in sorted(_topics().items()):
            yield from pieces(f"topics/{topic}", [text])

    def inputs(self) -> dict[str, Any]:
        return _stamps(self._files())

    def size(self) -> int:
        return sum(path.stat().st_size for path in self._files())

    def _files(self) -> list[Path]:
        found = []
        for folder, children, names in os.walk(self.root):
            children[:] = sorted(set(children) - self.SKIPPED)
            found += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
        if not found:
            raise ValueError(f"data.source: {self.root} holds no .py files; choose another source")
        return found


class Files:
    """What sources of files share. paths: files or globs (`**` reaches into folders)."""

    def __init__(self, paths: str | list[str]) -> None:
        self.paths = [paths] if isinstance(paths, str) else list(paths)

    def files(self) -> list[Path]:
        return _expand(self.paths)

    def documents(self, files: list[Path] | None = None) -> Iterator[Document]:
        """The documents of all files, or of these."""
        root = _root(self.paths)
        for path in self.files() if files is None else files:
            yield from self.read(path, os.path.relpath(path, root))

    def read(self, path: Path, name: str) -> Iterator[Document]:
        """The documents of one file. name: its path from the folder that all have in common."""
        raise NotImplementedError

    def inputs(self) -> dict[str, Any]:
        return _stamps(self.files())

    def size(self) -> int | None:
        return sum(path.stat().st_size for path in self.files())


class TextFiles(Files):
    """UTF-8 text files, one document each."""

    def read(self, path: Path, name: str) -> Iterator[Document]:
        yield from pieces(name, _utf8(path))


class Rows(Files):
    """Rows of jsonl, parquet or csv files, gzip and zstd too, one document each.

    column: the one that holds the text. about: columns of what else is known, by the name that it gets
    (licence, source, retrieved, url, language).
    """

    def __init__(
        self,
        format: Literal["json", "parquet", "csv"],
        paths: str | list[str],
        column: str = "text",
        about: dict[str, str] | None = None,
    ) -> None:
        super().__init__(paths)
        self.format = format
        self.column = column
        self.about = about or {}

    def read(self, path: Path, name: str) -> Iterator[Document]:
        arguments = {"path": self.format, "data_files": [str(path)], "split": "train"}
        rows = _rows(f"{path}, read as {self.format}", self.column, self.about, **arguments)
        for number, (text, about) in enumerate(rows):
            yield from pieces(f"{name}:{number}", [text], about)

    def size(self) -> int | None:
        return None  # a file's size says little about its column's


class HuggingFace:
    """Rows of a data set that `datasets` can load: a name on the Hub or a local folder, streamed.

    path, name, split, revision: as in datasets.load_dataset. column, about: as in Rows.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        column: str = "text",
        revision: str | None = None,
        about: dict[str, str] | None = None,
    ) -> None:
        self.path = path
        self.name = name
        self.split = split
        self.column = column
        self.revision = revision
        self.about = about or {}

    def documents(self) -> Iterator[Document]:
        arguments = {"path": self.path, "name": self.name, "split": self.split, "revision": self.revision}
        rows = _rows(self.path, self.column, self.about, **arguments)
        for number, (text, about) in enumerate(rows):
            yield from pieces(f"{self.path}:{self.split}:{number}", [text], about)

    def inputs(self) -> dict[str, Any]:
        """Of a folder its files; of a Hub name the revision, so name one where it must not move."""
        if Path(self.path).is_dir():
            return _stamps(sorted(file for file in Path(self.path).rglob("*") if file.is_file()))
        return {"path": self.path, "name": self.name, "revision": self.revision or "main"}

    def size(self) -> int | None:
        return None


class Parts:
    """Several sources, one after the other: the parts of a mixture, by name. See `mixture` in the config."""

    def __init__(self, parts: dict[str, Source]) -> None:
        if not parts:
            raise ValueError("data.source.parts: is empty; name at least one source")
        for name in parts:
            if not NAME.fullmatch(name):
                raise ValueError(f"data.source.parts.{name}: a name has letters, digits, '-' and '_' only")
        self.parts = parts

    def documents(self) -> Iterator[Document]:
        for part, source in self.parts.items():
            empty = True
            with standing_at(f"data.source.parts.{part}"):
                for document in source.documents():
                    about = {"source": part, **document.about}
                    yield document._replace(id=f"{part}/{document.id}", about=about, part=part)
                    empty = False
            if empty:
                raise ValueError(
                    f"data.source.parts.{part}: holds no text; leave it out or name another source"
                )

    def inputs(self) -> dict[str, Any]:
        inputs = []  # in their order
        for part, source in self.parts.items():
            with standing_at(f"data.source.parts.{part}"):
                inputs.append([part, source.inputs()])
        return {"parts": inputs}

    def size(self) -> int | None:
        sizes = [source.size() for source in self.parts.values()]
        return None if None in sizes else sum(size or 0 for size in sizes)


def pieces(id: str, texts: Iterable[str], about: Mapping[str, str] = NOTHING) -> Iterator[Document]:
    """The pieces of a document whose text comes in parts of any size."""
    rest = ""
    for text in texts:
        rest += text
        start = 0
        while len(rest) - start > 2 * PIECE:
            cut = CUT.search(rest, start + PIECE, start + 2 * PIECE)
            stop = cut.start() if cut else start + PIECE
            yield Document(id, rest[start:stop], ends=False, about=about)
            start = stop
        rest = rest[start:]
    if rest:
        yield Document(id, rest, about=about)


def _utf8(path: Path) -> Iterator[str]:
    """The text of a file, in parts. Line ends stay as they are."""
    with path.open("rb") as file:
        held = b""
        while True:
            chunk = file.read(READ)
            offset = file.tell() - len(chunk) - len(held)
            held += chunk
            try:
                text, used = codecs.utf_8_decode(held, "strict", not chunk)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}: not UTF-8 at byte {offset + error.start} (0x{held[error.start]:02x}); "
                    "convert the file, for example with iconv -t UTF-8, or leave it out"
                ) from None
            held = held[used:]
            yield text
            if not chunk:
                return


def _python_text(path: Path) -> str:
    """The text of a Python file in the encoding that it declares."""
    with path.open("rb") as file:
        encoding, _ = tokenize.detect_encoding(file.readline)
        file.seek(0)
        return file.read().decode(encoding)


def _topics() -> dict[str, str]:
    try:
        return importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:  # a Python built without its documentation
        return {}


def _rows(
    where: str, column: str, about: Mapping[str, str], **arguments: Any
) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The texts of a column and what others say about them, through `datasets` in streaming mode."""
    try:
        rows = quiet_datasets().load_dataset(**arguments, streaming=True)
        columns = rows.column_names or list(next(iter(rows), {}))
        for key, wanted in {"column": column, **{f"about.{name}": about[name] for name in about}}.items():
            if columns and wanted not in columns:
                raise ValueError(f"no column {wanted!r}, only {', '.join(columns)}; set data.source.{key}")
        used = list({column: None} | dict.fromkeys(about.values()))
        batches = rows.select_columns(used).with_format("arrow").iter(1000) if columns else ()
        for table in batches:
            known = ({name: table[about[name]][row].as_py() for name in about} for row in range(len(table)))
            for text, facts in zip(_texts(table[column].to_pylist(), column), known, strict=True):
                yield text, {name: _said(fact) for name, fact in facts.items() if fact is not None} or NOTHING
    except GeneratorExit:
        raise
    except Exception as error:
        raise failure(where, error) from error


def _said(value: Any) -> str:
    """A fact as text; a day that a reader took for a moment is a day again."""
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        value = value.date()
    return value.isoformat() if isinstance(value, datetime.date) else str(value)


def _texts(values: list[Any], column: str) -> Iterator[str]:
    for value in values:
        if value is not None and not isinstance(value, str):
            kind = type(value).__name__
            raise ValueError(f"column {column!r} holds {kind}, not text; set data.source.column")
        yield value or ""


def _expand(paths: list[str]) -> list[Path]:
    """The files that paths and globs name, each once. Raises ValueError where one names none."""
    found: dict[Path, None] = {}
    for pattern in paths:
        matches = [Path(match) for match in sorted(glob.glob(os.path.expanduser(pattern), recursive=True))]
        files = [match for match in matches if match.is_file()]
        if not files:
            raise ValueError(f"data.source.paths: {pattern} {_without_files(matches)}")
        found |= dict.fromkeys(files)
    if not found:
        raise ValueError("data.source.paths: the list is empty; name at least one file")
    return list(found)


def _without_files(matches: list[Path]) -> str:
    """What is wrong with a pattern of which nothing, or nothing but folders, was found."""
    if not matches:
        return "matches no file"
    if not any(names for folder in matches for _, _, names in os.walk(folder)):
        return "is a folder without files"
    return "is a folder; name its files, for example with /*.txt"


def _root(paths: list[str]) -> str:
    """The folder that all patterns name: ids are relative to it, so that a corpus may be moved and grow."""
    patterns = [os.path.abspath(os.path.expanduser(path)) for path in paths]
    folders = [os.path.dirname(re.split(r"[*?[]", pattern, maxsplit=1)[0]) for pattern in patterns]
    return os.path.commonpath(folders)


def _stamps(paths: Iterable[Path]) -> dict[str, Any]:
    """Size in bytes and time of last change of each file: enough to see that it is another one."""
    stamps = {}
    for path in paths:
        status = path.stat()
        stamps[str(path.resolve())] = [status.st_size, status.st_mtime_ns]
    return stamps
