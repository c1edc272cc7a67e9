"""What cleaning raw text costs and finds: documents a second, memory, near-duplicates and personal data.

    python -m launch.bench_corpus --megabytes 200 --json corpus.json

The text is what a machine has: documentation, manuals, source code. Copies with changes and personal data are
planted in it, so that what is found can be counted.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import random
import sys
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from datatrove.data import Document
from omegaconf import OmegaConf

from data.cli import instantiate, one_line_errors
from data.corpus.corpus import Corpus
from data.prepare import CONF
from launch import bench_planted as planted

ROOTS = ["/usr/share/doc", "/usr/share/perl*", "/usr/share/man", "/usr/share/info", "/usr/lib/python3*"]
SUFFIXES = {"", ".gz", ".txt", ".md", ".rst", ".html", ".py", ".pm", ".pl", ".pod", ".htm"}
SMALLEST, LARGEST = 500, 200_000  # characters of a file that is taken


def corpus_figures(
    megabytes: int, workers: int | None = None, say: Callable[[str], object] = print
) -> dict[str, Any]:
    """All figures for so many megabytes of text and for half of them; workers: processes, or all cores.

    Raises ValueError where the machine has less text.
    """
    with TemporaryDirectory() as folder:
        texts = gather(megabytes * 10**6)
        figures: dict[str, Any] = {"cleaning": {}}
        for size in (megabytes // 2, megabytes):
            figures["cleaning"][f"{size} MB"] = cleaning(_first(texts, size * 10**6), Path(folder), workers)
            say(f"cleaning {size} MB: {figures['cleaning'][f'{size} MB']}")
        figures |= finding(texts, Path(folder), workers)
    for name in ("near_duplicates", "personal_data"):
        say(f"{name}: {figures[name]}")
    return figures


def gather(size: int) -> dict[str, str]:
    """Texts of so many bytes, by path, each once; from all over the machine, whatever the size."""
    site = sysconfig.get_path("purelib")
    roots = [path for root in [*ROOTS, sysconfig.get_path("stdlib"), site] for path in _globbed(root)]
    texts: dict[str, str] = {}
    seen: set[bytes] = set()
    found = 0
    paths = list(_files(roots))
    random.Random(0).shuffle(paths)
    for path in paths:
        text = _text(path)
        if text is None or not SMALLEST <= len(text) <= LARGEST:
            continue
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            texts[str(path)] = text
            found += len(text.encode())
        if found >= size:
            return texts
    raise ValueError(
        f"--megabytes: only {found // 10**6} MB of text were found in {', '.join(map(str, roots))}"
    )


def cleaning(texts: list[str], folder: Path, workers: int | None) -> dict[str, Any]:
    """All stages of data/web on these texts: speed, and the most memory of a process.

    What a machine holds is hardly ever prose: the filters judge it but drop nothing, so that all stages have
    all text to work on.
    """
    quiz = [" ".join(text.split()[40:80]) for text in texts[:: len(texts) // 20]]
    against = {"quiz": _source(_write(folder / f"quiz-{len(texts)}", quiz))}
    stages = OmegaConf.to_container(OmegaConf.load(CONF / "data/web.yaml").source.stages)
    assert isinstance(stages, dict)
    last = {"_target_": "data.corpus.decontaminate.Decontaminate", "against": against}
    stages = {str(name): node for name, node in stages.items() if node} | {"decontaminate": last}
    for name, node in stages.items():
        if node["_target_"].startswith("data.corpus.clean."):
            stages[name] = {"_target_": "launch.bench_corpus.Lenient", "stage": node}
    corpus = _corpus(_write(folder / f"raw-{len(texts)}", texts), folder, stages, workers)
    started = time.perf_counter()
    with Memory() as memory:
        built = corpus.build(progress=False)
    seconds = time.perf_counter() - started
    card = json.loads((built / "card.json").read_text())
    cores = workers or len(os.sched_getaffinity(0))
    return {
        "documents": card["raw"]["documents"],
        "bytes": card["raw"]["bytes"],
        "documents_left": card["final"]["documents"],
        "seconds": round(seconds, 1),
        "documents_per_s_per_core": round(card["raw"]["documents"] / seconds / cores, 1),
        "MB_per_s_per_core": round(card["raw"]["bytes"] / 1e6 / seconds / cores, 2),
        "stage_seconds": {stage["name"]: stage["seconds"] for stage in card["stages"]},
        "parent_peak_MB": memory.parent // 10**6,
        "worker_peak_MB": memory.worker // 10**6,
    }


def finding(texts: dict[str, str], folder: Path, workers: int | None) -> dict[str, Any]:
    """Plant copies and personal data, take both out, and count what was found and what should have stayed."""
    random_ = random.Random(0)
    originals = list(texts.values())
    counts, copies = planted.copies(originals, random_)
    raw = {f"{number:06}": text for number, text in enumerate(originals)}
    alone = sorted(raw.keys() - {f"{of:06}" for _, of, _ in copies})
    held = {name: planted.personal(random_) for name in random_.sample(alone, len(alone) // 20)}
    raw |= {name: raw[name] + planted.sentences(values) for name, values in held.items()}
    raw |= {f"copy-{number:06}": text for number, (text, _, _) in enumerate(copies)}
    stages = {
        "exact": {"_target_": "data.corpus.dedup.Exact"},
        "near": {"_target_": "data.corpus.dedup.Near"},
        "personal": {"_target_": "data.corpus.clean.Personal"},
    }
    corpus = _corpus(_write(folder / "planted", list(raw.values()), list(raw)), folder, stages, workers)
    left: dict[str, str] = {}
    for document in corpus.documents():
        name = document.id.rpartition("/")[2]
        left[name] = left.get(name, "") + document.text
    found = Counter(
        kind for n, (_, of, kind) in enumerate(copies) if not {f"copy-{n:06}", f"{of:06}"} <= left.keys()
    )
    dropped = [name for name in raw if name not in left]
    false = planted.unlike(raw, dropped)
    return {
        "near_duplicates": {
            "recall": {kind: round(found[kind] / counts[kind], 4) for kind in counts},
            "planted": dict(counts),
            "dropped": len(dropped),
            "false": false,
            "false_rate": round(false / (len(left) + false), 5),
        },
        "personal_data": planted.personal_figures(held, left),
    }


class Lenient:
    """A stage whose edits count and whose reasons to drop a document do not."""

    def __init__(self, stage: Callable[[Document], str | None]) -> None:
        self.stage = stage

    def __call__(self, document: Document) -> None:
        text = document.text
        if self.stage(document) is not None or not document.text.strip():
            document.text = text


class Memory:
    """The most resident memory, in bytes, of this process (`parent`) and of any below it (`worker`)."""

    def __enter__(self) -> Memory:
        self.parent = self.worker = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        process = psutil.Process()
        while not self._ended.wait(0.1):
            self.parent = max(self.parent, process.memory_info().rss)
            for child in process.children(recursive=True):
                try:
                    self.worker = max(self.worker, child.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue


def _corpus(paths: str, folder: Path, stages: dict[str, Any], workers: int | None) -> Corpus:
    node = {
        "_target_": "data.corpus.corpus.Corpus",
        "_recursive_": False,
        "inputs": {"machine": {"source": _source(paths)}},
        "stages": stages,
        "executor": {"_target_": "data.corpus.executors.Local", "workers": workers},
        "directory": str(folder),
    }
    return instantiate(node, "data.source")


def _source(paths: str) -> dict[str, str]:
    return {"_target_": "data.sources.TextFiles", "paths": paths}


def _write(folder: Path, texts: list[str], names: list[str] | None = None) -> str:
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / (names[number] if names else f"{number:06}")).write_text(text, encoding="utf-8", newline="")
    return f"{folder}/*"


def _first(texts: dict[str, str], size: int) -> list[str]:
    """The first texts, of so many bytes together."""
    taken = []
    for text in texts.values():
        if size <= 0:
            break
        size -= len(text.encode())
        taken.append(text)
    return taken


def _globbed(pattern: str) -> list[Path]:
    path = Path(pattern)
    return sorted(found for found in path.parent.glob(path.name) if found.is_dir() and not found.is_symlink())


def _files(roots: list[Path]) -> Iterator[Path]:
    for root in dict.fromkeys(root.resolve() for root in roots):
        for folder, children, names in os.walk(root):
            children.sort()
            paths = (Path(folder, name) for name in sorted(names))
            yield from (path for path in paths if path.suffix in SUFFIXES or path.parts[3] == "man")


def _text(path: Path) -> str | None:
    try:
        data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError):
        return None


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.bench_corpus")
    parser.add_argument("--megabytes", type=int, default=200, help="of text")
    parser.add_argument("--workers", type=int, help="processes; all cores by default")
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    figures = corpus_figures(
        arguments.megabytes, arguments.workers, lambda line: print(line, file=sys.stderr)
    )
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
