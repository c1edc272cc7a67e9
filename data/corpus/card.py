"""The data card of a corpus: what card.json counts, as one page for people (what to show: Gebru et al. 2018,
arXiv 1803.09010, and the papers of Dolma, 2402.00159, and FineWeb, 2406.17557).

    python -m data.corpus.card corpora/web-0123456789ab
"""

import argparse
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data.cli import one_line, one_line_errors
from data.corpus.card_page import page

CARD = "card.json"
PAGE = "card.html"
VERSION = 1
COUNTS = ("documents", "bytes", "tokens")


def write(folder: Path) -> None:
    """Read the card.json of a corpus and write card.html beside it: one file, without scripts or a network.

    Raises ValueError in one line where card.json is missing or is not one, OSError where the page cannot be
    written.
    """
    card = read(folder)
    try:
        text = page(card, contradictions(card))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"is not a card: {one_line(error)}"
        raise ValueError(f"{folder / CARD}: {what}; delete {CARD} and build the corpus again") from error
    aside = folder / f".{PAGE}"
    # JSON can name halves of surrogate pairs, which no file can hold.
    aside.write_bytes(text.encode("utf-8", "replace"))
    os.replace(aside, folder / PAGE)


def read(folder: Path) -> dict[str, Any]:
    """The card.json of a corpus. Raises ValueError where there is none that this version can show."""
    path = folder / CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: not found; name the folder of a corpus that is complete") from None
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read: {one_line(error)}") from None
    version = card.get("version") if isinstance(card, dict) else None
    if version != VERSION:
        raise ValueError(f"{path}: is of version {version}, not {VERSION}; build the corpus again")
    return card


def contradictions(card: Mapping[str, Any]) -> list[str]:
    """Counts of a card that ought to agree and do not, a sentence each. None, unless a count is wrong."""
    found: list[str] = []
    before, place = card["raw"], "the raw text"
    for stage in card["stages"]:
        name = stage["name"]
        found += _unequal(f"what went into {name}", stage["in"], place, before)
        kept = {"documents": stage["out"]["documents"] + _sum(stage["dropped"].values())["documents"]}
        found += _unequal(f"what {name} kept and dropped", kept, "what went into it", stage["in"])
        for side, words in (("in", "what went into"), ("out", "what was left by")):
            parts = _sum(source[side] for source in stage["by_source"].values())
            found += _unequal(f"the sources of {words} {name}", parts, "all of it", stage[side])
        before, place = stage["out"], f"what was left by {name}"
    final = card["final"]
    found += _unequal("the final text", final, place, before)
    found += _unequal("the final sources", _sum(final["sources"].values()), "the final text", final)
    documents = {
        "files": sum(file["documents"] for file in final["files"]),
        "languages": sum(final["languages"].values()),
        "lengths": sum(final["lengths"].values()),
    }
    for what, number in documents.items():
        found += _unequal(f"the final {what}", {"documents": number}, "the final text", final)
    return found


def _unequal(what: str, counts: Mapping[str, int], other: str, expected: Mapping[str, int]) -> list[str]:
    return [
        f"{what}: {counts[unit]:,} {unit}, but {other}: {expected[unit]:,}"
        for unit in COUNTS
        if unit in counts and counts[unit] != expected[unit]
    ]


def _sum(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    parts = list(parts)
    return {unit: sum(part[unit] for part in parts) for unit in COUNTS}


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.corpus.card", description="Write a corpus's card.html."
    )
    parser.add_argument("folder", type=Path, help="of a complete corpus, which holds card.json")
    folder = parser.parse_args().folder
    write(folder)
    print(folder / PAGE)


if __name__ == "__main__":
    main()
