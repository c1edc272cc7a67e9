"""The sections of a data card. Ids, reasons and examples come from the raw web: all of them are escaped."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from data.corpus.card_html import NONE, bar, duration, escaped, fold, share, size, table

TEMPLATE = Path(__file__).with_name("card_template.html")
MANY = 40  # rows from which a list is folded
UNITS = ("documents", "bytes", "tokens")
MEANING = """<h2>How the numbers are meant</h2><ul>
<li><b>Documents</b>: a document is dropped once, by the first stage that objects to it, for the first reason
that the stage finds. A stage sees only what the stages before it left.</li>
<li><b>Bytes</b>: UTF-8 of a document's text as it stood at that point. Markup counts until a stage takes it
out, and stages that edit text change the bytes of documents that they keep.</li>
<li><b>Tokens</b>: pieces of GPT-2's pre-tokenizer (words with the space before them, numbers, runs of
marks), counted before there is a vocabulary. A vocabulary cuts some of them further.</li>
<li><b>Changed</b> and <b>replaced</b>: in all documents that the stage saw; later stages may have dropped
some of these.</li>
<li><b>Worker time</b>: added up over all workers. It and the time of making are the only figures here that
another build from the same inputs would not repeat.</li>
<li><b>Examples</b>: at most five a reason, chosen by a hash of the document's id, the first 600 characters of
each. They are quoted as found, and nobody has looked through them.</li>
</ul>"""

Card = Mapping[str, Any]
Counts = Mapping[str, int]


def page(card: Card, contradictions: Sequence[str]) -> str:
    """The whole page about a card.json; `contradictions` are shown at its top."""
    body = [
        _head(card),
        *(f'<p class="warn">These counts do not agree. {escaped(line)}.</p>' for line in contradictions),
        _funnel(card),
        _sources(card),
        _reasons(card),
        _replaced(card),
        _languages(card["final"]),
        _lengths(card["final"]),
        _repeat(card),
        MEANING,
    ]
    parts = {"title": escaped(card["name"]), "body": "\n".join(body)}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def _head(card: Card) -> str:
    raw, final = card["raw"], card["final"]
    mean = size(final["bytes"] / final["documents"], "B") if final["documents"] else NONE
    tiles = [
        (f"{final['documents']:,}", f"documents: {share(final['documents'], raw['documents'])} of the raw"),
        (size(final["bytes"], "B"), f"of text: {share(final['bytes'], raw['bytes'])} of the raw"),
        (size(final["tokens"]), f"tokens: {share(final['tokens'], raw['tokens'])} of the raw"),
        (mean, "a document, mean"),
    ]
    shown = "".join(f'<div class="tile"><b>{number}</b><span>{what}</span></div>' for number, what in tiles)
    return (
        f"<h1>{escaped(card['name'])}</h1>"
        f'<p class="lead">{final["documents"]:,} documents with {size(final["bytes"], "B")} of text and'
        f" {size(final['tokens'])} tokens, out of {raw['documents']:,} raw documents with"
        f" {size(raw['bytes'], 'B')}.</p>"
        f'<p class="faint">Data card of a pretraining corpus, made {escaped(card["made"])}. Fingerprint'
        f" <code>{escaped(card['fingerprint'])}</code></p>"
        f'<div class="tiles">{shown}</div>'
    )


def _note(text: str) -> str:
    return f'<p class="faint">{text}</p>'


def _of(part: float, whole: float) -> str:
    return f'<br><span class="of">{share(part, whole)}</span>'


def _funnel(card: Card) -> str:
    raw = card["raw"]
    rows = [["raw text", bar(raw["documents"], kept=raw["documents"]), "", *_left(raw, raw), "", ""]]
    for stage in card["stages"]:
        before, left = stage["in"]["documents"], stage["out"]["documents"]
        target = escaped(stage["target"]).replace(".", ".<wbr>")
        rows.append(
            [
                f'{escaped(stage["name"])}<br><code class="of">{target}</code>',
                bar(raw["documents"], kept=left, dropped=before - left),
                f"{before - left:,}{_of(before - left, before)}",
                *_left(stage["out"], raw),
                f"{stage['edited']:,}",
                duration(stage["seconds"]),
            ]
        )
    columns = ("Stage", "", "Dropped", "Left", "Bytes left", "Tokens left", "Changed", "Worker time")
    legend = _note(
        '<span class="chip kept"></span>left<span class="chip dropped"></span>dropped by this stage'
        '<span class="chip gone"></span>dropped before. The whole bar is all raw documents. Below what was'
        " dropped: its share of what came in; below what was left: its share of the raw."
    )
    exact = fold("Exact counts, in and out of every stage", _exact(card)) if card["stages"] else ""
    return f"<h2>What each stage left</h2>{legend}{table(columns, rows)}{exact}"


def _left(left: Counts, raw: Counts) -> list[str]:
    shown = (f"{left['documents']:,}", size(left["bytes"], "B"), size(left["tokens"]))
    return [text + _of(left[unit], raw[unit]) for text, unit in zip(shown, UNITS, strict=True)]


def _exact(card: Card) -> str:
    """For each unit: in, dropped, added or taken away by editing, out. In each row they add up."""
    shown = ""
    for unit in UNITS:
        columns = ["Stage", "In", "Dropped", "By editing", "Out"]
        rows = []
        for stage in card["stages"]:
            into, out = stage["in"][unit], stage["out"][unit]
            dropped = sum(counts[unit] for counts in stage["dropped"].values())
            edited = out - into + dropped
            rows.append([escaped(stage["name"]), f"{into:,}", _signed(-dropped), _signed(edited), f"{out:,}"])
        shown += f"<h3>{unit.capitalize()}</h3>{table(columns, rows)}"
    return shown


def _signed(number: int) -> str:
    return f"{number:+,}".replace("-", "−") if number else "0"


def _sources(card: Card) -> str:
    final, stages = card["final"], card["stages"]
    before = {name: counts["in"] for name, counts in stages[0]["by_source"].items()} if stages else {}
    nothing = {**dict.fromkeys(UNITS, 0), "licence": None, "retrieved": None}
    found = {**dict.fromkeys(before, nothing), **final["sources"]}
    rows = [
        [
            escaped(name),
            bar(final["tokens"], kept=counts["tokens"]),
            f"{size(counts['tokens'])}{_of(counts['tokens'], final['tokens'])}",
            size(counts["bytes"], "B"),
            f"{counts['documents']:,}",
            f"{before[name]['documents']:,}" if name in before else NONE,
            _known(counts["licence"]),
            f'<span class="date">{_known(counts["retrieved"])}</span>',
        ]
        for name, counts in sorted(found.items(), key=lambda item: (-item[1]["tokens"], item[0]))
    ]
    columns = ("Source", "", "Tokens", "Bytes", "Documents", "Raw documents", "Licence", "Retrieved")
    note = _note("What the corpus is made of in the end. The bar is the share of its tokens.")
    several = _by_stage(card, list(found)) if len(found) > 1 and stages else ""
    return f"<h2>Sources</h2>{note}{table(columns, rows, words=columns[-2:])}{several}"


def _known(value: Any) -> str:
    return escaped(value) if value else '<span class="faint">not stated</span>'


def _by_stage(card: Card, sources: Sequence[str]) -> str:
    """How many documents of each source every stage left."""
    rows = []
    for stage in card["stages"]:
        left = {name: counts["out"]["documents"] for name, counts in stage["by_source"].items()}
        rows.append([escaped(stage["name"]), *(f"{left.get(name, 0):,}" for name in sources)])
    shown = table(("Stage", *map(escaped, sources)), rows)
    return fold("Documents of each source left by every stage", f'<div class="wide">{shown}</div>')


def _reasons(card: Card) -> str:
    shown, quiet = "", []
    for stage in card["stages"]:
        if any(counts["documents"] for counts in stage["dropped"].values()):
            shown += _stage_reasons(stage)
        else:
            quiet.append(escaped(stage["name"]))
    none = f"<p>Nothing was dropped by {', '.join(quiet)}.</p>" if quiet else ""
    note = _note(
        "Most documents first. The bar is the share of all documents that the stage dropped. Open a reason's"
        " examples to see what it hit."
    )
    return f"<h2>What was dropped, and why</h2>{note}{shown}{none}"


def _stage_reasons(stage: Card) -> str:
    examples = defaultdict(list)
    for example in stage["examples"]:
        examples[example["reason"]].append(example)
    into = stage["in"]["documents"]
    dropped = sum(counts["documents"] for counts in stage["dropped"].values())
    rows, below = [], []
    for reason, counts in sorted(stage["dropped"].items(), key=lambda item: (-item[1]["documents"], item[0])):
        n, found = counts["documents"], examples[reason]
        bytes_ = size(counts["bytes"], "B")
        row = [escaped(reason), bar(dropped, dropped=n), f"{n:,}", share(n, dropped), share(n, into), bytes_]
        rows.append(row)
        title = f"{len(found)} example{'s' * (len(found) > 1)}"
        below.append(fold(title, "".join(map(_example, found))) if found else "")
    columns = ("Reason", "", "Documents", "Share of dropped", "Share of what came in", "Bytes")
    said = f"dropped {dropped:,} of {into:,} documents, {share(dropped, into)}"
    title = f'<h3>{escaped(stage["name"])} <span class="of">{said}</span></h3>'
    return title + table(columns, rows, below=below)


def _example(example: Card) -> str:
    # HTML drops a newline that a pre element begins with: give it one to drop.
    return (
        f"<figure><figcaption><bdi>{escaped(example['source'])}</bdi>,"
        f" <bdi><code>{escaped(example['id'])}</code></bdi></figcaption>"
        f'<pre dir="auto">\n{escaped(example["text"])}</pre></figure>'
    )


def _replaced(card: Card) -> str:
    kinds = [(-n, kind, stage["name"]) for stage in card["stages"] for kind, n in stage["replaced"].items()]
    if not any(n for n, *_ in kinds):
        return "<h2>Personal data replaced</h2><p>None: no stage replaced anything.</p>"
    total = -sum(n for n, *_ in kinds)
    rows = [
        [escaped(kind), bar(total, kept=-n), f"{-n:,}", share(-n, total), escaped(stage)]
        for n, kind, stage in sorted(kinds)
    ]
    note = _note("Found by patterns, so some will have been missed, and some were none.")
    shown = table(("Kind", "", "Places", "Share", "Stage"), rows, words=["Stage"])
    return f"<h2>Personal data replaced</h2>{note}{shown}"


def _languages(final: Card) -> str:
    documents = final["documents"]
    found = sorted(final["languages"].items(), key=lambda item: (-item[1], item[0]))
    rows = [[escaped(code), bar(documents, kept=n), f"{n:,}", share(n, documents)] for code, n in found]
    return f"<h2>Languages</h2>{_long('languages', ('Language', '', 'Documents', 'Share'), rows)}"


def _lengths(final: Card) -> str:
    """A histogram over powers of two, the empty ones between the shortest and the longest included."""
    found = Counter({int(least): n for least, n in final["lengths"].items()})
    rows = []
    for least in _powers(found):
        name = f"{least:,}–{2 * least - 1:,}" if least > 1 else f"{least}"
        n = found[least]
        rows.append([name, bar(max(found.values()), kept=n), f"{n:,}", share(n, final["documents"])])
    note = _note("Characters of a document. The longest bar is the most frequent length.")
    return f"<h2>Lengths</h2>{note}{table(('Characters', '', 'Documents', 'Share'), rows)}"


def _powers(found: Mapping[int, int]) -> Iterator[int]:
    if 0 in found:
        yield 0
    positive = [least for least in found if least]
    least = min(positive, default=1)
    while least <= max(positive, default=0):
        yield least
        least *= 2


def _repeat(card: Card) -> str:
    settings = yaml.safe_dump(card["settings"], sort_keys=False, allow_unicode=True, width=100)
    inputs = [[f"<code>{escaped(what)}</code>" for what in pair] for pair in _flat(card["inputs"])]
    packages = [[escaped(what) for what in pair] for pair in sorted(card["packages"].items())]
    files = [
        [
            escaped(file["file"]),
            f"{file['documents']:,}",
            size(file["bytes"], "B"),
            f"<code>{escaped(file['sha256'])}</code>",
        ]
        for file in card["final"]["files"]
    ]
    stamps = _note(
        "What the corpus depends on. Of a file: its size in bytes and the time of its last change in"
        " nanoseconds since 1970."
    )
    same = _note("The same settings, inputs and packages give the same files, byte for byte.")
    return (
        f"<h2>How to repeat it</h2>{same}<h3>Settings</h3><pre>\n{escaped(settings)}</pre>"
        f"<h3>Inputs</h3>{stamps}{_long('inputs', ('Input', 'Stamp'), inputs)}"
        f"<h3>Packages</h3>{table(('Package', 'Version'), packages, words=['Version'])}"
        f"<h3>Files</h3>{_long('files', ('File', 'Documents', 'Size', 'SHA-256'), files)}"
    )


def _long(what: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that is folded where it has many rows."""
    shown = table(columns, rows, words=["Stamp", "SHA-256"])
    return fold(f"{len(rows):,} {what}", shown) if len(rows) > MANY else shown


def _flat(value: Any, trail: str = "") -> Iterator[tuple[str, str]]:
    """(trail of keys, JSON of what stands there) for everything in nested dictionaries."""
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _flat(part, f"{trail} › {key}" if trail else str(key))
    else:
        yield trail, json.dumps(value, ensure_ascii=False)
