"""Raw text to a prepared folder: train the tokenizer, encode every document, write the shards.

    python -m data.prepare data=python-library tokenizer=bpe tokenizer.vocabulary_size=4096

The folder is `<data.directory>/<data.name>-<fingerprint>`. It appears when it is complete, one process makes
it while others wait, and where it is there already, nothing is done. A killed or interrupted preparation goes
on where it was.
"""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from data.cli import instantiate, main_guard, one_line_errors
from data.encode import forget_progress, write_splits
from data.exclusive import exclusive
from data.remote import fetch
from data.shards import MANIFEST, SPLITS, read_manifest, token_dtype
from data.sources import Builds, Document, Parts, Source
from data.split import FromSource, SplitRule
from data.tokenizer import (
    END_OF_TEXT,
    TokenizerRecipe,
    capped,
    load_tokenizer,
    save_tokenizer,
    vocabulary_size,
)

VERSION = 3  # of this package: raise it when the same text and settings would give other files
CONF = Path(__file__).resolve().parent.parent / "conf"


@dataclass(frozen=True)
class Job:
    """What is to be prepared, instantiated from the configuration.

    shards: into how many the training text is dealt that is tokenized in training (see data.stream): then
    only the validation split is prepared; None: all is.
    """

    name: str
    source: Source
    validation: SplitRule
    tokenizer: TokenizerRecipe
    shards: int | None
    settings: dict[str, Any]
    inputs: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Of everything the result depends on: settings, inputs and the version of this package."""
        content = json.dumps([VERSION, self.settings, self.inputs], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def prepare(data: DictConfig, tokenizer: DictConfig, progress: bool = True) -> Path:
    """The prepared folder of a data and a tokenizer configuration; made if it is not there yet.

    Raises ValueError in one line on anything wrong with the configuration or the text; nothing is left of the
    folder then.
    """
    if "address" in data:
        return fetch(data)
    job = _job(data, tokenizer)
    target = Path(data.directory) / f"{job.name}-{job.fingerprint[:12]}"
    if isinstance(job.source, Builds) and not (target / MANIFEST).is_file():
        job.source.build(progress)
    with exclusive(target, lambda folder: (folder / MANIFEST).is_file()) as folder:
        if folder is not None:
            _make(job, folder, Meter(progress))
    return target


def _job(data: DictConfig, tokenizer: DictConfig) -> Job:
    known = ("name", "source", "validation", "directory", "shards")
    for key in data:
        if key not in known:
            raise ValueError(f"data.{key!s}: unknown key; data knows {', '.join(known)}")
    source: Source = instantiate(data.source, "data.source")
    validation: SplitRule = instantiate(data.validation, "data.validation")
    recipe: TokenizerRecipe = instantiate(tokenizer, "tokenizer")
    shards = data.get("shards")
    if shards is not None and not isinstance(validation, FromSource):
        raise ValueError(
            "data.validation: a stream is not read through for what it holds out; set"
            " data.validation._target_=data.split.FromSource and its source"
        )
    text = {key: OmegaConf.to_container(data[key], resolve=True) for key in ("source", "validation")}
    if isinstance(source, Builds):  # its inputs say all that its text depends on
        text["source"] = {"_target_": data.source._target_}
    settings = {
        "data": text,
        "tokenizer": OmegaConf.to_container(tokenizer, resolve=True),
        **({} if shards is None else {"shards": shards}),
    }
    inputs = {"source": source.inputs(), **validation.inputs(), "tokenizer": recipe.inputs()}
    return Job(data.name, source, validation, recipe, shards, settings, inputs)


def _make(job: Job, folder: Path, meter: "Meter") -> None:
    with meter:
        tokenizer = _tokenizer(job, folder / "tokenizer", meter)
        meter.begin("encode", job.source.size())
        started = time.perf_counter()
        streamed = isinstance(job.validation, FromSource) and job.shards is not None
        written = write_splits(
            job.validation.held_out() if streamed else job.validation.split(job.source),  # type: ignore
            tokenizer,
            folder,
            lossless=job.tokenizer.lossless,
            passed=meter.passed,
            splits=("validation",) if streamed else SPLITS,
        )
    manifest = {
        "version": VERSION,
        "name": job.name,
        "fingerprint": job.fingerprint,
        "settings": job.settings,
        "inputs": job.inputs,
        "vocabulary_size": vocabulary_size(tokenizer),
        "dtype": token_dtype(vocabulary_size(tokenizer)).name,
        "end_of_text": tokenizer.token_to_id(END_OF_TEXT),
        "tokenizer": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((folder / "tokenizer").iterdir())
        },
        "encode_seconds": round(time.perf_counter() - started, 3),
        **written,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    forget_progress(folder)


def _tokenizer(job: Job, folder: Path, meter: "Meter") -> Tokenizer:
    """Train on the first training_bytes of the training split, save, and load again as others will."""
    if folder.exists():
        return load_tokenizer(folder)
    size, most = job.source.size(), job.tokenizer.training_bytes
    meter.begin("tokenizer", most if size is None else min(size, most))
    documents = (document for split, document in job.validation.split(job.source) if split == "train")
    texts = capped(_texts(documents, meter), most)
    trained: Future[Tokenizer] = Future()

    def train() -> None:
        try:
            trained.set_result(job.tokenizer.train(texts))
        except BaseException as error:
            trained.set_exception(error)

    # In a thread, so that this one can notice a signal.
    threading.Thread(target=train, daemon=True).start()
    aside = folder.with_name(".tokenizer")
    shutil.rmtree(aside, ignore_errors=True)
    save_tokenizer(trained.result(), aside)
    aside.rename(folder)
    return load_tokenizer(folder)


def _texts(documents: Iterator[Document], meter: "Meter") -> Iterator[str]:
    for document in documents:
        meter.passed(document)
        yield document.text


class Meter:
    """A progress bar on a terminal: documents, megabytes a second, and the time left where it is known."""

    def __init__(self, shown: bool) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:9}"),
            BarColumn(),
            TextColumn("{task.fields[documents]:,} documents  {task.fields[rate]:.1f} MB/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self._bytes = self._documents = 0

    def __enter__(self) -> "Meter":
        self._progress.start()
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._progress.live.transient = error is not None  # an error then stands alone
        self._progress.stop()

    def begin(self, what: str, size: int | None) -> None:
        """Start on something of about `size` bytes."""
        self._task = self._progress.add_task(what, total=size, documents=0, rate=0.0)
        self._bytes = self._documents = 0
        self._started = time.perf_counter()

    def passed(self, document: Document) -> None:
        self._bytes += len(document.text)  # near enough for a bar
        self._documents += document.ends
        rate = self._bytes / 1e6 / (time.perf_counter() - self._started)
        self._progress.update(self._task, completed=self._bytes, documents=self._documents, rate=rate)


def _pages(data: DictConfig) -> list[Path]:
    """The data cards of the corpora that the text came from."""
    source = instantiate(data.source, "data.source") if "source" in data else None
    sources = source.parts.values() if isinstance(source, Parts) else [source]
    pages = [corpus.page() for corpus in sources if isinstance(corpus, Builds)]
    return [page for page in pages if page.is_file()]  # a corpus may be deleted once it is prepared


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="prepare")
@one_line_errors
def main(config: DictConfig) -> None:
    folder = prepare(config.data, config.tokenizer)
    manifest = read_manifest(folder)
    for name, split in manifest["splits"].items():
        counts = [f"{split[count]:,} {count}" for count in ("tokens", "documents", "bytes")]
        print(f"{name}: {', '.join(counts)}")
    print(f"vocabulary: {manifest['vocabulary_size']:,} tokens")
    for page in _pages(config.data):
        print(f"corpus: {page.parent}")
        print(f"data card: {page}")
    print(folder)


if __name__ == "__main__":
    main_guard(main)
