"""Copies with changes and personal data that are put into text, to count what cleaning finds of them."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from typing import Any

import numpy as np

from data.corpus.grams import grams, hashes

NEAR = 5  # words in a run, as in data.corpus.dedup.Near
UNLIKE = 0.5  # share of runs in common below which two documents are no near-duplicates; MinHash aims at 0.67
SAMPLED = 16  # one in so many runs is looked at to find which documents are alike
KINDS = {
    "1 % of words": 0.01,
    "2 % of words": 0.02,
    "3 % of words": 0.03,
    "5 % of words": 0.05,
    "moved": None,
}


def copies(texts: list[str], random_: random.Random) -> tuple[Counter[str], list[tuple[str, int, str]]]:
    """How many of each kind, and (changed text, number of the original, kind); an original has one copy."""
    fit = [
        n for n, text in enumerate(texts) if 150 <= len(text.split()) <= 20_000 and text.count("\n\n") >= 5
    ]
    random_.shuffle(fit)
    share = max(1, min(len(texts) // 50, len(fit) // len(KINDS)))
    copies = []
    for kind, part in KINDS.items():
        for _ in range(min(share, len(fit))):
            number = fit.pop()
            copies.append((_changed(texts[number], part, random_), number, kind))
    return Counter(kind for _, _, kind in copies), copies


def _changed(text: str, share: float | None, random_: random.Random) -> str:
    """With a share of the words replaced; without one, with its paragraphs moved around one place."""
    if share is None:
        paragraphs = text.split("\n\n")
        cut = random_.randrange(1, len(paragraphs))
        return "\n\n".join(paragraphs[cut:] + paragraphs[:cut])
    words = text.split(" ")
    places = [n for n, word in enumerate(words) if word.strip()]
    for place in random_.sample(places, max(1, round(share * len(places)))):
        words[place] = f"changed{random_.randrange(10**6)}"
    return " ".join(words)


def unlike(texts: dict[str, str], dropped: list[str]) -> int:
    """How many of the dropped documents are like no other document."""
    runs = {name: _runs(texts[name]) for name in dropped}
    holders: dict[int, list[str]] = {}
    for name in dropped:
        for run in runs[name][runs[name] % SAMPLED == 0].tolist():
            holders.setdefault(run, []).append(name)
    best = dict.fromkeys(dropped, 0.0)
    for name, text in texts.items():
        mine = _runs(text)
        shared = Counter(
            other
            for run in mine[mine % SAMPLED == 0].tolist()
            for other in holders.get(run, ())
            if other != name and best[other] < UNLIKE
        )
        for other, count in shared.items():
            if count * SAMPLED > 0.2 * len(runs[other]):
                common = len(np.intersect1d(mine, runs[other], assume_unique=True))
                best[other] = max(best[other], common / (len(mine) + len(runs[other]) - common))
    same = Counter(" ".join(text.split()).lower() for text in texts.values())
    return sum(
        like < UNLIKE and same[" ".join(texts[name].split()).lower()] == 1 for name, like in best.items()
    )


def _runs(text: str) -> np.ndarray:
    return np.unique(grams(hashes(text), NEAR))


def personal(random_: random.Random) -> dict[str, str]:
    """Personal data of each kind, and, by names that start with "not", what only looks like it."""
    digits = lambda count: "".join(random_.choices("0123456789", k=count))  # noqa: E731
    number = f"4{digits(14)}"
    doubled = [sum(divmod(2 * int(d), 10)) if n % 2 == 0 else int(d) for n, d in enumerate(number)]
    account = f"{random_.randrange(10**7, 10**8)}{digits(10)}"
    byte = lambda: random_.randrange(1, 255)  # noqa: E731
    return {
        "email": f"{random_.choice(['ann', 'b.smith', 'li_wei'])}{digits(6)}@mail{digits(2)}.example.org",
        "ip": f"{random_.choice([23, 51, 89, 185, 203])}.{byte()}.{byte()}.{byte()}",
        "phone": f"+44 20 7{digits(3)} {digits(4)}",
        "phone, American": f"({random_.randrange(201, 999)}) 5{digits(2)}-{digits(4)}",
        "identity": f"{random_.randrange(100, 600)}-{random_.randrange(10, 99)}-5{digits(3)}",
        "card": f"{number}{-sum(doubled) % 10}",
        "iban": f"DE{98 - int(account + '131400') % 97:02}{account}",
        "not: version": f"version {byte()}.{byte()}.{byte()}.{byte()}",
        "not: date": f"20{digits(2)}-0{random_.randrange(1, 10)}-1{random_.randrange(10)}",
        "not: ISBN": f"978-0-{digits(3)}-{digits(5)}-{digits(1)}",
        "not: hash": hashlib.sha256(digits(9).encode()).hexdigest(),
        "not: decimal": f"0.{digits(12)}",
        "not: years": f"19{random_.randrange(10, 50)}-19{random_.randrange(50, 99)}",
        "not: loopback": "127.0.0.1",
    }


def sentences(values: dict[str, str]) -> str:
    return "".join(f"\n\nThen there is {value} in the text." for value in values.values())


def personal_figures(held: dict[str, dict[str, str]], left: dict[str, str]) -> dict[str, Any]:
    gone: Counter[str] = Counter()
    kept = [name for name in held if name in left]
    for name in kept:
        gone.update(kind for kind, value in held[name].items() if value not in left[name])
    rates = {kind: round(gone[kind] / len(kept), 4) for kind in next(iter(held.values()))}
    return {
        "documents": len(kept),
        "recall": {kind: rate for kind, rate in rates.items() if not kind.startswith("not")},
        "false_rate": {kind: rate for kind, rate in rates.items() if kind.startswith("not")},
    }
