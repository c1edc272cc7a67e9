"""The HTML of a study: a page of text, tables and plots that says all by itself.

What comes in as `html` is taken as it is; all other text is escaped here.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from data.files import write

TEMPLATE = Path(__file__).with_name("study_template.html")


@dataclass(frozen=True)
class Axis:
    """name: in the choice between several. log: logarithmic. format: more of plotly's, of ticks and range."""

    title: str
    name: str = ""
    log: bool = False
    format: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """A curve. x: a column for each x axis of its plot. low, high: the edges of a band around it, or the ends
    of bars where it is markers alone, or one point.

    mode: plotly's, of lines and markers. text: what is said of each point.
    """

    name: str
    color: str
    x: Sequence[Sequence[float | str]]
    y: Sequence[float]
    dash: str = "solid"
    mode: str = "lines+markers"
    symbol: str = "circle"
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    text: Sequence[str] = ()


def page(title: str, kind: str, body: str) -> str:
    """The whole page. kind: of study. body: html."""
    parts = {
        "title": html.escape(title),
        "kind": html.escape(kind),
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "body": body,
        "plotly": get_plotlyjs(),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def written(directory: Path, results: dict[str, Any], html: str) -> Path:
    """The path of the report, which is written into the directory beside the results that it shows."""
    directory.mkdir(parents=True, exist_ok=True)
    write(directory / "results.json", json.dumps(results, indent=1) + "\n")
    write(directory / "report.html", html)
    return directory / "report.html"


def plot(title: str, note: str, xs: Sequence[Axis], y: Axis, lines: Sequence[Line]) -> str:
    """A plot, in html; between several x axes the reader can choose."""
    drawn = {"xs": [asdict(x) for x in xs], "y": asdict(y), "lines": [asdict(line) for line in lines]}
    return (
        f'<div class="plot"><h3>{html.escape(title)}</h3><p>{html.escape(note)}</p>'
        f'<div class="canvas" data-plot="{html.escape(json.dumps(drawn))}"></div></div>'
    )


def plots(drawn: Iterable[str]) -> str:
    """Plots beside each other as far as there is room, in html."""
    return f'<div class="plots">{"".join(drawn)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, in html, of cells in html; the first of a row names it."""
    columns = "".join(f"<th>{name}</th>" for name in head)
    body = "".join(
        f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for name, *cells in rows
    )
    return f'<div class="wide"><table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>'


def section(title: str, *parts: str) -> str:
    """A heading and what follows it, in html."""
    return f"<h2>{html.escape(title)}</h2>{''.join(parts)}"


def paragraph(text: str, kind: str = "") -> str:
    """Text as a paragraph. kind: "lead" or "faint"."""
    return f'<p class="{kind}">{html.escape(text)}</p>' if kind else f"<p>{html.escape(text)}</p>"


def bullets(lines: Iterable[str]) -> str:
    """Lines of text as a list."""
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def chip(color: str, name: str) -> str:
    """A name beside its colour."""
    return f'<span class="chip" style="background:{color}"></span>{html.escape(name)}'


def folded(summary: str, text: str) -> str:
    """Text as it is, behind a line that opens it."""
    return f"<details><summary>{html.escape(summary)}</summary><pre>\n{html.escape(text)}</pre></details>"
