"""The card of a corpus, put together from what its tasks counted."""

import importlib.metadata
import json
import platform
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.corpus import card as page
from data.corpus.counts import Counts, none, total
from data.corpus.plan import DOCUMENTS, READ, Pass, tallies
from data.corpus.stage import Tally

if TYPE_CHECKING:
    from data.corpus.corpus import Corpus

PACKAGES = ("datatrove", "ftfy", "jieba", "lxml", "numpy", "py3langid", "trafilatura", "warcio", "xxhash")
SHOWN = 5  # licences of a source


def card(corpus: "Corpus", plan: list[Pass], work: Path) -> dict[str, Any]:
    """The content of card.json. plan: the passes that were run, whose tasks left their counts in `work`."""
    seconds = _seconds(plan)
    targets = {READ: "data.corpus.files.Read"}
    targets |= {name: node["_target_"] for name, node in corpus.settings["stages"].items()}
    stages = []
    for name, target in targets.items():
        tally = Tally.load(tallies(work, name).iterdir())
        stages.append({"name": name, "target": target, **tally.card(), "seconds": round(seconds[name], 3)})
    return {
        "version": page.VERSION,
        "name": corpus.name,
        "fingerprint": corpus.fingerprint,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": corpus.settings,
        "inputs": corpus._stamps,
        "packages": _packages(),
        "raw": stages[0]["in"],
        "stages": stages,
        "final": _final(work / "final"),
    }


def _final(folder: Path) -> dict[str, Any]:
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.iterdir())]
    sources: dict[str, Counts] = {}
    known: dict[str, dict[str, set[str]]] = {}
    languages: Counter[str] = Counter()
    lengths: Counter[str] = Counter()
    for part in parts:
        for name, counts in part["sources"].items():
            sources[name] = total([sources.get(name, none()), counts])
            facts = known.setdefault(name, {"licence": set(), "retrieved": set()})
            for key, values in part["known"][name].items():
                facts[key] |= set(values)
        languages += Counter(part["languages"])
        lengths += Counter(part["lengths"])
    return {
        **total(sources.values()),
        "sources": {name: sources[name] | _facts(known[name]) for name in sorted(sources)},
        "languages": dict(sorted(languages.items())),
        "lengths": dict(sorted(lengths.items(), key=lambda item: int(item[0]))),
        "files": [part["file"] | {"file": f"{DOCUMENTS}/{part['file']['file']}"} for part in parts],
    }


def _facts(known: dict[str, set[str]]) -> dict[str, str | None]:
    dates = sorted(known["retrieved"])
    return {
        "licence": "; ".join(sorted(known["licence"])[:SHOWN]) or None,
        "retrieved": " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else None,
    }


def _seconds(plan: list[Pass]) -> Counter[str]:
    """Of work in each stage, all tasks together, as datatrove measured them."""
    seconds: Counter[str] = Counter()
    for part in plan:
        for path in (part.folder / "stats").iterdir():
            for owner, step in zip(part.owners, json.loads(path.read_text()), strict=True):
                spent = step["time_stats"]  # 0 for a step that took no time
                seconds[owner] += spent["total"] if spent else 0
    return seconds


def _packages() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
