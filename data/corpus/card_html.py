"""Pieces of a data card's HTML: text made safe, numbers made short, tables and bars."""

import html
from collections.abc import Sequence

NONE = "–"
# Control characters mean nothing in HTML: show their pictures (U+2400 and on). Tab and newline stay.
CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}


def escaped(text: object) -> str:
    """Text as HTML, in attributes too, with control characters made visible."""
    return html.escape(str(text).replace("\r\n", "\n").translate(CONTROLS))


def size(number: float, unit: str = "") -> str:
    """Three digits: 1234567, "B" -> "1.23 MB"; without a unit 7e9 -> "7 billion"."""
    names = ("", "k", "M", "G", "T", "P") if unit else ("", "thousand", "million", "billion", "trillion")
    power = 0
    while abs(number) >= 999.5 and power < len(names) - 1:
        number, power = number / 1000, power + 1
    digits = f"{number:.3g}" if abs(number) < 999.5 else f"{number:,.0f}"
    return f"{digits} {names[power]}{unit}".rstrip()


def share(part: float, whole: float) -> str:
    """As "12.3 %", in HTML. What is neither nothing nor all never reads as 0 or 100 %."""
    if not whole:
        return NONE
    percent = 100 * part / whole
    if 0 < percent < 0.05:
        return "&lt;0.1 %"
    if 99.95 <= percent < 100:
        return "&gt;99.9 %"
    return f"{percent:.1f} %"


def duration(seconds: float) -> str:
    """3725 -> "1 h 2 min"."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole // 60 % 60} min"


def bar(whole: float, **parts: float) -> str:
    """A bar of parts one after the other, named by their colours, kept or dropped."""
    pieces = "".join(
        f'<i class="{color}" style="width:{100 * part / whole if whole else 0:.3f}%"></i>'
        for color, part in parts.items()
    )
    return f'<div class="bar">{pieces}</div>'


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    words: Sequence[str] = (),
    below: Sequence[str] = (),
) -> str:
    """A table that becomes a list on a narrow screen; each row's first cell names it.

    words: the columns, besides the first, that hold no numbers; one called "" holds bars. below: for each row
    what stands below it over the whole width, or "".
    """
    first, *others = columns
    kinds = ["graph" if not name else "text" if name in words else "n" for name in others]
    head = "".join(f'<th class="{kind}">{name}</th>' for name, kind in zip(others, kinds, strict=True))
    body = ""
    for (name, *cells), more in zip(rows, below or [""] * len(rows), strict=True):
        body += f'<tr class="with-more"><th>{name}</th>' if more else f"<tr><th>{name}</th>"
        for label, kind, content in zip(others, kinds, cells, strict=True):
            named = f' data-label="{label}"' if label else ""
            body += f'<td class="{kind}"{named}>{content}</td>'
        body += f'</tr><tr class="more"><td colspan="{len(columns)}">{more}</td></tr>' if more else "</tr>"
    return f'<table class="stack"><thead><tr><th>{first}</th>{head}</tr></thead><tbody>{body}</tbody></table>'


def fold(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"
