"""The data card: every number on it is card.json's, and nothing in a text can act on the page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lxml import html

from data.corpus.card import contradictions, read, write
from data.corpus.card_html import duration, share, size

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = "<script>alert(1)</script><img src=x onerror='alert(2)'>\" onclick=\"x\u202e\x00 &amp; {{title}}"


def counts(documents: int, size: int, tokens: int) -> dict[str, int]:
    return {"documents": documents, "bytes": size, "tokens": tokens}


def stage(name: str, into: dict[str, int], out: dict[str, int], dropped: dict[str, Any], **more: Any) -> Any:
    """All that goes in comes from the crawl."""
    return {
        "name": name,
        "target": f"data.corpus.clean.{name}",
        "in": into,
        "out": out,
        "dropped": dropped,
        "edited": 0,
        "replaced": {},
        "by_source": {"crawl": {"in": into, "out": out}},
        "seconds": 1.5,
        "examples": [],
    } | more


def made_card() -> dict[str, Any]:
    """1,000 raw documents, of which an editing stage drops none and a filter 700, for two reasons."""
    raw, repaired, final = counts(1000, 50_000, 9000), counts(1000, 48_000, 8800), counts(300, 20_000, 4000)
    dropped = {"short": counts(10, 1000, 200), "language": counts(690, 27_000, 4600)}
    example = {"reason": "language", "id": "https://a.b/?q=<b>", "source": "crawl", "text": "北京大学"}
    card = {
        "version": 1,
        "name": "web",
        "fingerprint": "ab" * 32,
        "made": "2025-01-02T03:04:05+00:00",
        "settings": {"stages": {"gopher": {"_target_": "data.corpus.clean.Gopher"}}, "tasks": 2},
        "inputs": {"crawl": {"/raw/a.warc.gz": [123, 456]}},
        "packages": {"datatrove": "0.10.1"},
        "raw": raw,
        "stages": [
            stage("repair", raw, repaired, {}, edited=77, replaced={"e-mail": 30, "phone": 10}),
            stage("gopher", repaired, final, dropped, seconds=3725, examples=[example]),
        ],
        "final": {
            **final,
            "sources": {"crawl": {**final, "licence": None, "retrieved": "2025-01-01"}},
            "languages": {"en": 299, "zh": 1},
            "lengths": {"0": 1, "16": 200, "128": 99},
            "files": [
                {"file": "documents/00000.jsonl.zst", "sha256": "cd" * 32, "bytes": 999, "documents": 300}
            ],
        },
    }
    return json.loads(json.dumps(card))  # nothing in it shared


def written(folder: Path, card: dict[str, Any]) -> Any:
    """The parsed page of a card."""
    (folder / "card.json").write_text(json.dumps(card))
    write(folder)
    return html.document_fromstring((folder / "card.html").read_bytes())


def rows(page: Any, column: str, place: int = 0) -> dict[str, dict[str, str]]:
    """By first cell, the cells by label of a table whose first column is called this, one of several."""
    tables = [t for t in page.iter("table") if t.find(".//th").text_content() == column]
    found = {}
    for row in tables[place].iterfind("tbody/tr"):
        name = row.find("th")
        if name is not None:
            cells = {cell.get("data-label"): cell.text_content() for cell in row.iterfind("td[@data-label]")}
            found[name.text_content()] = cells
    return found


def number(text: str) -> int:
    """What a cell says, without the share that stands in it too."""
    return int(re.sub(r"[,+]|\d+\.\d %$", "", text).replace("−", "-"))


def test_the_funnel_is_that_of_the_card(tmp_path: Path) -> None:
    page = written(tmp_path, made_card())
    funnel = rows(page, "Stage")
    assert list(funnel) == ["raw text", "repairdata.corpus.clean.repair", "gopherdata.corpus.clean.gopher"]
    raw, repair, gopher = funnel.values()
    assert raw["Left"] == "1,000100.0 %" and raw["Dropped"] == ""
    assert (repair["Dropped"], repair["Changed"], repair["Worker time"]) == ("00.0 %", "77", "1.5 s")
    assert gopher == {
        "Dropped": "70070.0 %",
        "Left": "30030.0 %",
        "Bytes left": "20 kB40.0 %",
        "Tokens left": "4 thousand44.4 %",
        "Changed": "0",
        "Worker time": "1 h 2 min",
    }
    bars = [[i.get("style") for i in bar] for bar in page.find_class("bar")[:3]]
    assert bars == [
        ["width:100.000%"],
        ["width:100.000%", "width:0.000%"],
        ["width:30.000%", "width:70.000%"],
    ]


def test_exact_counts_add_up(tmp_path: Path) -> None:
    card = made_card()
    page = written(tmp_path, card)
    for place, unit in enumerate(("documents", "bytes", "tokens"), 1):
        shown = rows(page, "Stage", place)
        assert list(shown) == ["repair", "gopher"]
        for cells, about in zip(shown.values(), card["stages"], strict=True):
            assert (number(cells["In"]), number(cells["Out"])) == (about["in"][unit], about["out"][unit])
            moved = [number(value) for name, value in cells.items() if name not in ("In", "Out")]
            assert number(cells["In"]) + sum(moved) == number(cells["Out"])
    assert rows(page, "Stage", 2)["repair"]["By editing"] == "−2,000"


def test_reasons_stand_with_their_examples(tmp_path: Path) -> None:
    page = written(tmp_path, made_card())
    reasons = rows(page, "Reason")
    assert list(reasons) == ["language", "short"]  # most documents first
    assert reasons["language"] == {
        "Documents": "690",
        "Share of dropped": "98.6 %",
        "Share of what came in": "69.0 %",
        "Bytes": "27 kB",
    }
    (example,) = page.find_class("more")
    assert example.getprevious().find("th").text == "language"
    assert "北京大学" in example.text_content() and "https://a.b/?q=<b>" in example.text_content()
    assert "Nothing was dropped by repair." in page.text_content()


def test_the_rest_of_the_card(tmp_path: Path) -> None:
    page = written(tmp_path, made_card())
    assert rows(page, "Source")["crawl"] == {
        "Tokens": "4 thousand100.0 %",
        "Bytes": "20 kB",
        "Documents": "300",
        "Raw documents": "1,000",
        "Licence": "not stated",
        "Retrieved": "2025-01-01",
    }
    assert rows(page, "Kind")["e-mail"] == {"Places": "30", "Share": "75.0 %", "Stage": "repair"}
    assert {name: cells["Share"] for name, cells in rows(page, "Language").items()} == {
        "en": "99.7 %",
        "zh": "0.3 %",
    }
    lengths = {name: cells["Documents"] for name, cells in rows(page, "Characters").items()}
    assert lengths == {"0": "1", "16–31": "200", "32–63": "0", "64–127": "0", "128–255": "99"}
    text = page.text_content()
    for part in (
        "ab" * 32,
        "cd" * 32,
        "_target_: data.corpus.clean.Gopher",
        "crawl › /raw/a.warc.gz",
        "[123, 456]",
    ):
        assert part in text
    assert "GPT-2's pre-tokenizer" in text and "do not agree" not in text


def test_text_of_the_web_cannot_act(tmp_path: Path) -> None:
    card = made_card()
    gopher, final = card["stages"][1], card["final"]
    card["name"] = card["made"] = gopher["name"] = gopher["target"] = HOSTILE
    gopher["dropped"] = {HOSTILE: counts(700, 28_000, 4800)}
    gopher["examples"] = [dict.fromkeys(("reason", "id", "source", "text"), HOSTILE)]
    card["stages"][0]["replaced"] = {HOSTILE: 1}
    for about in card["stages"]:
        about["by_source"] = {
            HOSTILE: about["by_source"]["crawl"],
            "empty": {"in": counts(0, 0, 0), "out": counts(0, 0, 0)},
        }
    final["sources"] = {HOSTILE: {**final["sources"]["crawl"], "licence": HOSTILE, "retrieved": HOSTILE}}
    final["languages"] = {HOSTILE: 300}
    final["files"][0] |= {"file": HOSTILE, "sha256": HOSTILE}
    card["settings"] = card["inputs"] = card["packages"] = {HOSTILE: HOSTILE}
    page = written(tmp_path, card)
    visible = HOSTILE.replace("\x00", "\u2400")
    assert page.text_content().count(visible) >= 15
    assert page.find_class("more")[0].find(".//pre").text.lstrip("\n") == visible
    elements = [element for element in page.iter() if isinstance(element.tag, str)]
    assert not {element.tag for element in elements} & {
        "script",
        "img",
        "iframe",
        "object",
        "a",
        "base",
        "form",
    }
    assert not [name for element in elements for name in element.attrib if name.startswith("on")]
    assert [element.get("href") for element in elements if element.get("href")] == ["data:,"]
    policy = page.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_half_a_surrogate_pair_does_no_harm(tmp_path: Path) -> None:
    card = made_card()
    card["stages"][1]["examples"][0]["text"] = "\ud800 half"
    assert written(tmp_path, card).find_class("more")[0].find(".//pre").text.lstrip("\n") == "? half"


def test_counts_that_agree_are_not_complained_about() -> None:
    assert contradictions(made_card()) == []


@pytest.mark.parametrize(
    ("keys", "value", "complaint"),
    [
        (("raw", "bytes"), 1, "what went into repair: 50,000 bytes, but the raw text: 1"),
        (
            ("stages", 1, "dropped", "short", "documents"),
            11,
            "what gopher kept and dropped: 1,001 documents, but",
        ),
        (
            ("stages", 1, "in", "tokens"),
            1,
            "what went into gopher: 1 tokens, but what was left by repair: 8,800",
        ),
        (
            ("stages", 0, "by_source"),
            {},
            "the sources of what went into repair: 0 documents, but all of it: 1,000",
        ),
        (("final", "tokens"), 5, "the final text: 5 tokens, but what was left by gopher: 4,000"),
        (("final", "sources"), {}, "the final sources: 0 documents, but the final text: 300"),
        (("final", "languages", "zh"), 2, "the final languages: 301 documents, but the final text: 300"),
        (("final", "lengths"), {}, "the final lengths: 0 documents, but the final text: 300"),
        (("final", "files"), [], "the final files: 0 documents, but the final text: 300"),
    ],
)
def test_counts_that_disagree_are_shown(
    tmp_path: Path, keys: tuple[Any, ...], value: Any, complaint: str
) -> None:
    card = made_card()
    part: Any = card
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    assert any(line.startswith(complaint) for line in contradictions(card))
    assert complaint in " ".join(p.text_content() for p in written(tmp_path, card).find_class("warn"))


def test_a_corpus_of_nothing_has_a_card(tmp_path: Path) -> None:
    nothing = counts(0, 0, 0)
    card = made_card() | {"raw": nothing, "stages": [], "inputs": {}, "settings": {}}
    card["final"] = {**nothing, "sources": {}, "languages": {}, "lengths": {}, "files": []}
    page = written(tmp_path, card)
    assert rows(page, "Stage") == {
        "raw text": {
            "Dropped": "",
            "Left": "0–",
            "Bytes left": "0 B–",
            "Tokens left": "0–",
            "Changed": "",
            "Worker time": "",
        }
    }
    assert contradictions(card) == []


def test_a_source_of_which_nothing_is_left_is_shown(tmp_path: Path) -> None:
    card = made_card()
    for index, about in enumerate(card["stages"]):
        crawl = about["by_source"]["crawl"]
        lost = counts(5, 5, 5) if index == 0 else counts(0, 0, 0)
        about["by_source"] = {
            "crawl": {"in": {unit: n - lost[unit] for unit, n in crawl["in"].items()}, "out": crawl["out"]},
            "gone": {"in": lost, "out": counts(0, 0, 0)},
        }
    assert contradictions(card) == []
    page = written(tmp_path, card)
    gone = rows(page, "Source")["gone"]
    assert (gone["Tokens"], gone["Documents"], gone["Raw documents"]) == ("00.0 %", "0", "5")
    assert rows(page, "Stage", 4)["repair"] == {"crawl": "1,000", "gone": "0"}


def test_a_share_never_reads_as_none_or_all() -> None:
    assert [share(part, 10_000) for part in (0, 1, 5, 9994, 9999, 10_000)] == [
        "0.0 %",
        "&lt;0.1 %",
        "0.1 %",
        "99.9 %",
        "&gt;99.9 %",
        "100.0 %",
    ]
    assert share(0, 0) == "–"


def test_sizes_and_durations() -> None:
    assert [size(n, "B") for n in (0, 999, 1234, 999_600, 5e15)] == [
        "0 B",
        "999 B",
        "1.23 kB",
        "1 MB",
        "5 PB",
    ]
    assert [size(n) for n in (7, 1.5e9, 2e15)] == ["7", "1.5 billion", "2,000 trillion"]
    assert [duration(s) for s in (0.25, 59.9, 61, 3725)] == ["0.25 s", "59.9 s", "1 min 1 s", "1 h 2 min"]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "not found; name the folder of a corpus that is complete"),
        ("{", "cannot be read: "),
        ("[]", "is of version None, not 1; build the corpus again"),
        ('{"version": 9}', "is of version 9, not 1; build the corpus again"),
        ('{"version": 1}', "lacks 'raw'; delete card.json and build the corpus again"),
    ],
)
def test_what_is_no_card_is_said_in_one_line(tmp_path: Path, content: str | None, line: str) -> None:
    if content is not None:
        (tmp_path / "card.json").write_text(content)
    with pytest.raises(
        ValueError, match=f"^{re.escape(str(tmp_path))}/card.json: {re.escape(line)}"
    ) as caught:
        write(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "card.html").exists()


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(json.dumps(made_card()))
    command = [sys.executable, "-m", "data.corpus.card"]
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "card.html") and (tmp_path / "card.html").is_file()
    assert read(tmp_path)["name"] == "web"
    wrong = subprocess.run([*command, str(tmp_path / "none")], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1
