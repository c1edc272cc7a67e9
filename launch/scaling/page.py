"""The report of a scaling study, from what fit.json holds: one page that needs nothing else.

The prediction of the held-out budget comes first, for it says what the rest is worth.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import yaml

from launch import study_page
from launch.report_page import NONE, count, si, style
from launch.study_page import Axis, Line, bullets, folded, paragraph, plot, plots, section

Found = dict[str, Any]
GREY = "#808080"
FEW = 8  # budgets that have a colour each
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
        plots([*_isoflops(found), *_powers(found), *_frontier(found)]),
        *_parametric(found),
        *_isoflop_table(found),
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
        said = f" (95 % interval {low:.4f} to {high:.4f})" if low is not None else ""
        lines.append(
            f"Held out: {si(judged['budget'], 'FLOP')}, {judged['times']:.3g} times the largest fitted"
            f" budget. Predicted {head['predicted']['value']:.4f}{said}, measured {head['measured']:.4f}"
            f" nats per token: {head['error']:+.2%}, by the {head['law']} law."
        )
    if law := found["parametric"]:
        lines.append(
            "L(N, D) = E + A/N^α + B/D^β: " + ", ".join(
                f"{name} = {_value(law['fit'][name], law['intervals'][name])}" for name in CONSTANTS
            ) + "."
        )  # fmt: skip
        if law["fit"]["starts"]:
            reached, starts = law["fit"]["reached"], law["fit"]["starts"]
            lines.append(
                f"{reached:,} of {starts:,} starts reach the optimum, {law['fit']['objective']:.10g}."
            )
    for method, law in found["isoflop"].items():
        if law:
            sizes = law["parameters"]["exponent"]
            lines.append(f"IsoFLOP minima by {method}: N grows as C^{_estimate(sizes)}.")
    return lines


def remarks(found: Found) -> list[str]:
    """What a reader of the laws must know, a line each."""
    lines = list(found["parametric"]["warnings"]) if found["parametric"] else []
    for method, law in found["isoflop"].items():
        lines += [f"{method}: {note}" for note in law["notes"]] if law else []
    return [*lines, *found["notes"]]


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
            if one["predicted"]["low"] is None
            else f"{_quantity(one['predicted']['low'], one['of'])} to"
            f" {_quantity(one['predicted']['high'], one['of'])}",
            f"{one['error']:+.2%}",
            {True: "inside", False: "outside", None: NONE}[one["inside"]],
        )
        for one in judged["predictions"]
    ]
    head = ("by", "of", "measured", "predicted", "95 % interval", "error", "")
    return [
        *(paragraph(line, "lead" if number == 0 else "") for number, line in enumerate(lines)),
        section("Judged by what was held out", study_page.table(head, rows), bullets(judged["notes"])),
    ]


def _quantity(value: float, of: str) -> str:
    return count(value) if of == "parameters" else f"{value:.4f}"


def _budgets(found: Found) -> list[float]:
    return sorted({row["budget"] for row in found["points"]})


def _isoflops(found: Found) -> list[str]:
    """Loss against size, a colour for each budget of three sizes or more, with the laws' lines."""
    drawn = []
    laws = {**found["isoflop"], "parametric": found["parametric"]}
    for method, law in laws.items():
        if not law:
            continue
        curves = {line["budget"]: line for line in law["lines"]}
        shown = [budget for budget in _budgets(found) if budget in curves or _held(found, budget)]
        lines = _many(found, shown, curves) if len(shown) > FEW else _few(found, shown, curves)
        minima = [one for one in law.get("minima", ()) if one["bracketed"]]
        if minima:
            x, y = [one["parameters"] for one in minima], [one["loss"] for one in minima]
            lines.append(Line("minima", GREY, [x], y, mode="markers", symbol="star"))
        title = (
            "The parametric law along each budget" if method == "parametric" else f"IsoFLOP curves, {method}"
        )
        axis = Axis("parameters", log=True)
        drawn.append(plot(title, "A point is a run.", [axis], Axis("loss (nats per token)"), lines))
    return drawn


def _few(found: Found, budgets: Sequence[float], curves: dict[float, Found]) -> list[Line]:
    """A colour for each budget."""
    lines = []
    for index, budget in enumerate(budgets):
        color, held = style(index)["color"], _held(found, budget)
        rows = _of(found, budget)
        name = si(budget, "FLOP") + (", held out" if held else "")
        x, y = [row["parameters"] for row in rows], [row["loss"] for row in rows]
        symbol, text = "diamond-open" if held else "circle", [row["name"] for row in rows]
        lines.append(Line(name, color, [x], y, mode="markers", symbol=symbol, text=text))
        if budget in curves:
            own = curves[budget]
            lines.append(Line(f"{name}, law", color, [own["parameters"]], own["loss"], mode="lines"))
    return lines


def _many(found: Found, budgets: Sequence[float], curves: dict[float, Found]) -> list[Line]:
    """One colour for all runs, one for all laws, with gaps between the budgets."""
    rows = [row for budget in budgets for row in _of(found, budget)]
    x, y = [row["parameters"] for row in rows], [row["loss"] for row in rows]
    text = [f"{row['name']}, {si(row['budget'], 'FLOP')}" for row in rows]
    along: list[Any] = [value for own in curves.values() for value in (*own["parameters"], None)]
    losses: list[Any] = [value for own in curves.values() for value in (*own["loss"], None)]
    return [
        Line("runs", style(0)["color"], [x], y, mode="markers", text=text),
        Line("law", style(1)["color"], [along], losses, mode="lines"),
    ]


def _of(found: Found, budget: float) -> list[Found]:
    return [row for row in found["points"] if row["budget"] == budget and row["use"] != "left out"]


def _held(found: Found, budget: float) -> bool:
    return any(row["budget"] == budget and row["use"] == "held out" for row in found["points"])


def _powers(found: Found) -> list[str]:
    """Best size and tokens against compute: minima and their laws."""
    lines: dict[str, list[Line]] = {"parameters": [], "tokens": []}
    for index, (method, law) in enumerate(found["isoflop"].items()):
        minima = [one for one in law["minima"] if one["bracketed"]] if law else []
        for key, own in lines.items():
            if not minima:
                continue
            x, y = [one["flops"] for one in minima], [one[key] for one in minima]
            power = law[key]
            along = [power["coefficient"] * value ** power["exponent"]["value"] for value in x]
            look = style(index)
            own.append(Line(f"minima, {method}", look["color"], [x], y, mode="markers"))
            name = f"C^{power['exponent']['value']:.3f}"
            own.append(Line(name, look["color"], [x], along, look["dash"], mode="lines"))
    titles = {"parameters": "Best size", "tokens": "Tokens of the best size"}
    note = "by compute, and the power laws through the minima"
    return [
        plot(titles[key], note, [Axis("compute (FLOP)", log=True)], Axis(key, log=True), own)
        for key, own in lines.items()
        if own
    ]


def _frontier(found: Found) -> list[str]:
    law = found["frontier"]
    if not law:
        return []
    flops: list[Any] = [value for one in law["curves"] for value in (*one["flops"], None)]
    losses: list[Any] = [value for one in law["curves"] for value in (*one["loss"], None)]
    lines = [Line("runs", GREY, [flops], losses, mode="lines")]
    points = law["envelope"]
    lines.append(Line("lowest", style(1)["color"], [points["flops"]], points["loss"], mode="markers"))
    note = "The lowest of all curves at each compute, where smaller and larger sizes are beside it."
    return [
        plot(
            "Training curves and their envelope", note, [Axis("compute (FLOP)", log=True)],
            Axis("loss (nats per token)", log=True), lines,
        )
    ]  # fmt: skip


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
            plots([_residuals(found, law), *_profiles(law)]),
        )
    ]


def _between(ends: Sequence[float | None]) -> str:
    low, high = ("?" if end is None else f"{end:.4g}" for end in ends)
    return f"{low} to {high}"


def _residuals(found: Found, law: Found) -> str:
    rows = [row for row in found["points"] if row["name"] in law["residuals"]]
    budgets = sorted({row["budget"] for row in rows})
    groups = [[row for row in rows if row["budget"] == budget] for budget in budgets]
    names = [si(budget, "FLOP") for budget in budgets]
    if len(groups) > FEW:
        groups, names = [rows], ["runs"]
    lines = []
    for index, (own, name) in enumerate(zip(groups, names, strict=True)):
        xs = [[row[key] for row in own] for key in ("parameters", "tokens", "flops")]
        y = [100 * law["residuals"][row["name"]] for row in own]
        text = [row["name"] for row in own]
        lines.append(Line(name, style(index)["color"], xs, y, mode="markers", text=text))
    axes = [Axis(key, key, log=True) for key in ("parameters", "tokens", "compute")]
    note = "Measured loss over the predicted one: a trend says that the law has another form."
    return plot("Residuals", note, axes, Axis("residual (%)"), lines)


def _profiles(law: Found) -> list[str]:
    drawn = []
    for name, profile in law["profiles"].items():
        pairs = [
            (value, objective)
            for value, objective in zip(profile["values"], profile["objectives"], strict=True)
            if value is not None
        ]
        x, y = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        lines = [
            Line("lowest objective", style(0)["color"], [x], y, mode="lines"),
            Line("limit", GREY, [[x[0], x[-1]]], [profile["limit"]] * 2, dash="dash", mode="lines"),
        ]
        note = "The lowest objective with the constant held; values below the limit are not excluded."
        axis = Axis(CONSTANTS[name], log=name in ("A", "B", "E") and x[0] > 0)
        drawn.append(plot(f"Profile of {CONSTANTS[name]}", note, [axis], Axis("objective"), lines))
    return drawn


def _isoflop_table(found: Found) -> list[str]:
    rows, notes = [], []
    for method, law in found["isoflop"].items():
        if not law:
            continue
        for one in law["minima"]:
            name = f"{method}, {si(one['budget'], 'FLOP')}"
            if one["bracketed"]:
                rows.append((name, count(one["parameters"]), count(one["tokens"]), f"{one['loss']:.4f}", ""))
            else:
                rows.append((name, NONE, NONE, NONE, html.escape(one["reason"])))
        notes += [f"{method}: {note}" for note in law["notes"]]
        for key, what in (("parameters", "N"), ("tokens", "D"), ("loss", "the lowest loss")):
            notes.append(f"{method}: {what} goes as C^{_estimate(law[key]['exponent'])}.")
    if not rows:
        return []
    head = ("minimum", "parameters", "tokens", "loss", "")
    return [section("IsoFLOP minima", study_page.table(head, rows), bullets(notes))]


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
    moved = [f"{law}: {by:.3f}" for law, by in found["conventions"]["moved"].items()]
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
    return [section("Repeated data", paragraph(said), table, bullets(law["warnings"]))]


def _runs(found: Found) -> str:
    rows = [
        (
            html.escape(row["name"]),
            si(row["budget"], "FLOP"),
            count(row["parameters"]),
            count(row["tokens"]),
            f"{row['tokens'] / row['parameters']:.3g}",
            f"{row['loss']:.4f}",
            row["use"],
        )
        for row in found["points"]
    ]
    head = ("run", "budget", "parameters", "tokens", "tokens per parameter", "loss", "")
    body = study_page.table(head, rows)
    return f"<details><summary>{len(rows)} runs</summary>{body}</details>"
