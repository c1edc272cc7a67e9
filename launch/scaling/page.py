"""The report of a scaling study, from what fit.json holds: one page that needs nothing else.

The prediction of the held-out budget comes first, for it says what the rest is worth.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import yaml

from launch import study_page
from launch.report_page import NONE, count, si
from launch.scaling import page_plots
from launch.study_page import bullets, folded, paragraph, plots, section

Found = dict[str, Any]
CONSTANTS = {
    "A": "A",
    "B": "B",
    "E": "E (nats per token)",
    "alpha": "α",
    "beta": "β",
    "a": "a: the best N grows as C^a",
    "b": "b: the best D grows as C^b",
}


def page(found: Found) -> str:
    """The whole page."""
    title = f"Scaling laws of {found['request']['table']}"
    parts = [
        *_judged(found),
        plots(page_plots.laws(found)),
        *_parametric(found),
        *_isoflop(found),
        *_frontier(found),
        *_conventions(found),
        *_constrained(found),
    ]
    if found["notes"]:
        parts.append(section("What is missing, and why", bullets(found["notes"])))
    rows = section("Runs", _runs(found))
    settings = section("Settings", folded("of the fit", yaml.safe_dump(found["request"], sort_keys=False)))
    return study_page.page(title, "scaling laws", "".join([*parts, rows, settings]))


def finding(found: Found) -> list[str]:
    """In a few sentences: the judgement, and the laws with their intervals."""
    lines = []
    if (judged := found["judgement"]) and (head := judged["headline"]):
        low, high = head["predicted"]["low"], head["predicted"]["high"]
        said = f" (95 % interval {low:.4f} to {high:.4f})" if low is not None and high is not None else ""
        lines.append(
            f"Held out: {si(judged['budget'], 'FLOP')}, {judged['times']:.3g} times the largest fitted"
            f" budget. Predicted {_shown(head['predicted']['value'])}{said}, measured"
            f" {_shown(head['measured'])} nats per token: {_shown(head['error'], '+.2%')},"
            f" by {head['law']}.{_others(judged, head)}"
        )
    if law := found["parametric"]:
        lines.append(
            "L(N, D) = E + A/N^α + B/D^β: " + ", ".join(
                f"{name} = {_value(law['fit'][name], law['intervals'][name])}" for name in CONSTANTS
            ) + "."
        )  # fmt: skip
        if law["fit"]["starts"]:
            reached, starts = law["fit"]["reached"], law["fit"]["starts"]
            lowest = _shown(law["fit"]["objective"], ".10g")
            lines.append(f"{reached:,} of {starts:,} starts reach the optimum, {lowest}.")
    for method, law in found["isoflop"].items():
        if law:
            sizes = law["parameters"]["exponent"]
            lines.append(f"IsoFLOP minima by {method}: N grows as C^{_estimate(sizes)}.")
    return lines


def _others(judged: Found, head: Found) -> str:
    """What other laws say of the losses: of the run that each expects to be the best."""
    first: dict[str, Found] = {}
    for one in judged["predictions"]:
        if one["of"] != "loss" or one["law"] == head["law"]:
            continue
        before = first.setdefault(one["law"], one)
        if (one["predicted"]["value"] or math.inf) < (before["predicted"]["value"] or math.inf):
            first[one["law"]] = one
    outside = {True: "", False: ", outside of its interval", None: ""}
    said = [f"{one['law']} {_shown(one['error'], '+.2%')}{outside[one['inside']]}" for one in first.values()]
    return f" Others: {'; '.join(said)}." if said else ""


def remarks(found: Found) -> list[str]:
    """What a reader of the laws must know, a line each."""
    judged = list(found["judgement"]["notes"]) if found["judgement"] else []
    lines = list(found["parametric"]["warnings"]) if found["parametric"] else []
    for method, law in found["isoflop"].items():
        lines += [f"{method}: {note}" for note in _notes(law)] if law else []
    if law := found["frontier"]:
        lines += [f"training curves: {note}" for note in _notes(law)]
    return [*judged, *lines, *found["notes"]]


def _shown(value: float | None, format: str = ".4f") -> str:
    return NONE if value is None else f"{value:{format}}"


def _value(value: float | None, ends: Sequence[float | None]) -> str:
    if value is None:
        return NONE
    if ends[0] is None or ends[1] is None:
        return f"{value:.4g}"
    return f"{value:.4g} ({ends[0]:.4g} to {ends[1]:.4g})"


def _estimate(found: Found) -> str:
    return _value(found["value"], (found["low"], found["high"]))


def _judged(found: Found) -> list[str]:
    lines = finding(found)
    judged = found["judgement"]
    if not judged:
        what = "No budget was held out: nothing says how far these laws can be trusted beyond their runs."
        return [paragraph(what, "lead"), *(paragraph(line) for line in lines)]
    rows = [
        (
            html.escape(f"{one['law']}: {'best size' if one['of'] == 'parameters' else 'loss'}"),
            html.escape(one["run"] or "best of the budget"),
            _quantity(one["measured"], one["of"]),
            _quantity(one["predicted"]["value"], one["of"]),
            NONE
            if one["predicted"]["low"] is None or one["predicted"]["high"] is None
            else f"{_quantity(one['predicted']['low'], one['of'])} to"
            f" {_quantity(one['predicted']['high'], one['of'])}",
            _shown(one["error"], "+.2%"),
            {True: "inside", False: "outside", None: NONE}[one["inside"]],
        )
        for one in judged["predictions"]
    ]
    head = ("by", "of", "measured", "predicted", "95 % interval", "error", "")
    return [
        *(paragraph(line, "lead" if number == 0 else "") for number, line in enumerate(lines)),
        section("Judged by what was held out", study_page.table(head, rows), bullets(judged["notes"])),
    ]


def _quantity(value: float | None, of: str) -> str:
    return count(value) if of == "parameters" else _shown(value)


def _parametric(found: Found) -> list[str]:
    law = found["parametric"]
    if not law:
        return []
    head = ["constant", "value", "95 % interval", "profile excludes all but"]
    both = law["with_all"]
    if both:
        head += ["with the runs left out", "95 % interval"]
    rows = []
    for name, shown in CONSTANTS.items():
        profile = law["profiles"].get(name)
        row = [
            shown,
            _value(law["fit"][name], (None, None)),
            _between(law["intervals"][name]),
            _between((profile["low"], profile["high"])) if profile else NONE,
        ]
        if both:
            row += [_value(both["fit"][name], (None, None)), _between(both["intervals"][name])]
        rows.append(row)
    return [
        section(
            "The parametric law",
            study_page.table(head, rows),
            bullets(law["warnings"]),
            plots(
                [
                    page_plots.residuals(found, law, ("parameters", "tokens", "flops")),
                    *page_plots.profiles(law, CONSTANTS),
                ]
            ),
        )
    ]


def _between(ends: Sequence[float | None]) -> str:
    low, high = ("?" if end is None else f"{end:.4g}" for end in ends)
    return f"{low} to {high}"


def _isoflop(found: Found) -> list[str]:
    minima, laws, notes = [], [], []
    for method, law in found["isoflop"].items():
        if not law:
            continue
        for one in law["minima"]:
            name = f"{method}, {si(one['budget'], 'FLOP')}"
            if one["bracketed"]:
                minima.append((name, count(one["parameters"]), count(one["tokens"]), _shown(one["loss"]), ""))
            else:
                minima.append((name, NONE, NONE, NONE, html.escape(one["reason"])))
        laws += _law_rows(law, f"{method}, ")
        notes += [f"{method}: {note}" for note in _notes(law)]
    if not minima:
        return []
    head = ("minimum", "parameters", "tokens", "loss", "")
    return [
        section(
            "IsoFLOP minima",
            _law_table(laws),
            study_page.table(head, minima),
            bullets(notes),
            plots(page_plots.off_minima(found)),
        )
    ]


def _frontier(found: Found) -> list[str]:
    law = found["frontier"]
    if not law:
        return []
    parts = _law_table(_law_rows(law)), bullets(_notes(law)), plots(page_plots.off_envelope(law))
    return [section("Minimum over training curves", *parts)]


def _law_rows(law: Found, prefix: str = "") -> list[tuple[str, ...]]:
    """The laws of compute: floor, coefficient and exponent of each."""
    rows: list[tuple[str, ...]] = []
    for key, symbol in (("parameters", "N"), ("tokens", "D"), ("loss", "L")):
        if key in law:
            power = law[key]
            k = _value(power["coefficient"], (None, None))
            rows.append((f"{prefix}{symbol} = k C^x", NONE, k, _estimate(power["exponent"])))
    if floored := law["loss_with_floor"]:
        cells = (_estimate(floored[key]) for key in ("floor", "coefficient", "exponent"))
        rows.append((f"{prefix}L = E + k C^-x", *cells))
    return rows


def _law_table(rows: Sequence[tuple[str, ...]]) -> str:
    head = ("law of compute C, 95 % intervals", "floor E (nats per token)", "coefficient k", "exponent x")
    return study_page.table(head, rows)


def _notes(law: Found) -> list[str]:
    """Those of minima or an envelope, and that of their law with a floor."""
    floored = law["loss_with_floor"]
    return [*law["notes"], *([floored["note"]] if floored and floored["note"] else [])]


def _conventions(found: Found) -> list[str]:
    if not found["conventions"]:
        return []
    rows = [
        (
            html.escape(f"{one['law']}, {one['convention']}"),
            _estimate(one["a"]) if one["a"] else NONE,
            _estimate(one["b"]) if one["b"] else NONE,
            html.escape(one["note"] or ""),
        )
        for one in found["conventions"]["refits"]
    ]
    moved = [f"{law}: {_shown(by, '.3f')}" for law, by in found["conventions"]["moved"].items()]
    head = ("counted", "N grows as C^", "D grows as C^", "")
    said = f"How parameters and compute are counted alone moves the exponent of N by: {'; '.join(moved)}."
    return [section("Under other conventions", paragraph(said), study_page.table(head, rows))]


def _constrained(found: Found) -> list[str]:
    law = found["constrained"]
    if not law:
        return []
    names = {"repeats": "R_D*, in repetitions", "excess": "R_N*, in models of the best size"}
    rows = [
        (shown, _value(law["fit"][key], (None, None)), _between(law["intervals"][key]))
        for key, shown in names.items()
    ]
    table = study_page.table(("constant", "value", "95 % interval"), rows)
    runs = law["fit"]["runs"]
    said = f"After how many passes over the data further ones are worth less, by the {runs} runs that repeat."
    parts = [paragraph(said), table, bullets(law["warnings"])]
    if law.get("residuals"):
        parts.append(plots([page_plots.residuals(found, law, ("tokens",))]))
    return [section("Repeated data", *parts)]


def _runs(found: Found) -> str:
    rows = [
        (
            html.escape(row["name"]),
            si(row["budget"], "FLOP"),
            count(row["parameters"]),
            count(row["tokens"]),
            f"{row['tokens'] / row['parameters']:.3g}",
            _shown(row["loss"]),
            row["use"],
        )
        for row in found["points"]
    ]
    head = ("run", "budget", "parameters", "tokens", "tokens per parameter", "loss", "")
    body = study_page.table(head, rows)
    return f"<details><summary>{len(rows)} runs</summary>{body}</details>"
