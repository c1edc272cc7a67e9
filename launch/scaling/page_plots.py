"""The plots of a scaling study's report, from what fit.json holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launch.report_page import si, style
from launch.study_page import Axis, Line, plot

Found = dict[str, Any]
GREY = "#808080"
FEW = 8  # budgets that have a colour each
DRAWN = 60  # points of a law's line
FARTHER = 1.5  # times the largest compute, to which a law's line goes
LEAST = 0.1  # %, to which residuals are shown however small they are
SYMBOLS = ("circle", "square-open")  # of a method's minima, which may lie on each other
COMPUTE = Axis("compute (FLOP)", log=True)
LOSS = Axis("loss (nats per token)")


def laws(found: Found) -> list[str]:
    """What was measured, and the laws through it."""
    return [*_isoflops(found), *_powers(found), *_lowest(found), *_frontier(found)]


def off_minima(found: Found) -> list[str]:
    """How far the bracketed minima are off their laws."""
    both, loss = [], []
    for index, (method, law) in enumerate(found["isoflop"].items()):
        if not law:
            continue
        minima, color = _bracketed(law), style(index)["color"]
        flops, text = _column(minima, "flops"), [si(one["budget"], "FLOP") for one in minima]
        for key, symbol in (("parameters", "circle"), ("tokens", "diamond-open")):
            off = _off(_column(minima, key), _power(law[key], flops))
            name = f"{key}, {method}"
            both.append(Line(name, color, [flops], off, mode="markers", symbol=symbol, text=text))
        off = _off(_column(minima, "loss"), _loss(law, flops))
        loss.append(Line(method, color, [flops], off, mode="markers", symbol=SYMBOLS[index], text=text))
    title, how = "Residuals of the IsoFLOP minima", "Off the law with a floor, or else the power law."
    exact = " Three minima fix a law with a floor, and most often lie on it." if _exact(found) else ""
    return [
        _over(f"{title}: size and tokens", "How far each minimum is off its power law.", both),
        _over(f"{title}: lowest loss", f"{how}{exact}", loss),
    ]


def off_envelope(law: Found) -> list[str]:
    """How far the envelope of training curves is off its laws."""
    points = law["envelope"]
    flops = points["flops"]
    both = [
        Line(key, style(index)["color"], [flops], _off(points[key], _power(law[key], flops)), mode="markers")
        for index, key in enumerate(("parameters", "tokens"))
    ]
    off = _off(points["loss"], _loss(law, flops))
    loss = [Line("loss", style(0)["color"], [flops], off, mode="markers")]
    return [
        _over("Residuals of the envelope: size and tokens", "Steps come of the sizes that there are.", both),
        _over("Residuals of the envelope: loss", "A trend says that the law has another form.", loss),
    ]


def residuals(found: Found, law: Found, by: Sequence[str]) -> str:
    """Those of runs, against columns of the table."""
    rows = [row for row in found["points"] if law["residuals"].get(row["name"]) is not None]
    budgets = sorted({row["budget"] for row in rows})
    groups = [[row for row in rows if row["budget"] == budget] for budget in budgets]
    names = [si(budget, "FLOP") for budget in budgets]
    if len(groups) > FEW:
        groups, names = [rows], ["runs"]
    lines = []
    for index, (own, name) in enumerate(zip(groups, names, strict=True)):
        xs = [_column(own, key) for key in by]
        y = [100 * law["residuals"][row["name"]] for row in own]
        text = _column(own, "name")
        lines.append(Line(name, style(index)["color"], xs, y, mode="markers", text=text))
    titles = {"flops": "compute"}
    axes = [Axis(titles.get(key, key), titles.get(key, key), log=True) for key in by]
    note = "Measured loss over the predicted one: a trend says that the law has another form."
    return plot("Residuals", note, axes, Axis("residual (%)"), lines)


def profiles(law: Found, names: Mapping[str, str]) -> list[str]:
    """names: how constants are shown."""
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
        axis = Axis(names[name], log=name in ("A", "B", "E") and x[0] > 0)
        drawn.append(plot(f"Profile of {names[name]}", note, [axis], Axis("objective"), lines))
    return drawn


def _isoflops(found: Found) -> list[str]:
    """Loss against size, a colour for each budget of three sizes or more, with the laws' lines."""
    drawn = []
    every = {**found["isoflop"], "parametric": found["parametric"]}
    for method, law in every.items():
        if not law:
            continue
        curves = {line["budget"]: line for line in law["lines"]}
        shown = [budget for budget in _budgets(found) if budget in curves or _held(found, budget)]
        lines = _many(found, shown, curves) if len(shown) > FEW else _few(found, shown, curves)
        minima = _bracketed(law)
        if minima:
            x, y = _column(minima, "parameters"), _column(minima, "loss")
            lines.append(Line("minima", GREY, [x], y, mode="markers", symbol="star"))
        title = (
            "The parametric law along each budget" if method == "parametric" else f"IsoFLOP curves, {method}"
        )
        drawn.append(plot(title, "A point is a run.", [Axis("parameters", log=True)], LOSS, lines))
    return drawn


def _few(found: Found, budgets: Sequence[float], curves: dict[float, Found]) -> list[Line]:
    """A colour for each budget."""
    lines = []
    for index, budget in enumerate(budgets):
        color, held = style(index)["color"], _held(found, budget)
        rows = _of(found, budget)
        name = si(budget, "FLOP") + (", held out" if held else "")
        x, y, text = _column(rows, "parameters"), _column(rows, "loss"), _column(rows, "name")
        symbol = "diamond-open" if held else "circle"
        lines.append(Line(name, color, [x], y, mode="markers", symbol=symbol, text=text))
        if budget in curves:
            own = curves[budget]
            lines.append(Line(f"{name}, law", color, [own["parameters"]], own["loss"], mode="lines"))
    return lines


def _many(found: Found, budgets: Sequence[float], curves: dict[float, Found]) -> list[Line]:
    """One colour for all runs, one for all laws, with gaps between the budgets."""
    rows = [row for budget in budgets for row in _of(found, budget)]
    x, y = _column(rows, "parameters"), _column(rows, "loss")
    text = [f"{row['name']}, {si(row['budget'], 'FLOP')}" for row in rows]
    along: list[Any] = [value for own in curves.values() for value in (*own["parameters"], None)]
    losses: list[Any] = [value for own in curves.values() for value in (*own["loss"], None)]
    return [
        Line("runs", style(0)["color"], [x], y, mode="markers", text=text),
        Line("law", style(1)["color"], [along], losses, mode="lines"),
    ]


def _powers(found: Found) -> list[str]:
    """Best size and tokens against compute: minima and their laws."""
    lines: dict[str, list[Line]] = {"parameters": [], "tokens": []}
    for index, (method, law) in enumerate(found["isoflop"].items()):
        if not law:
            continue
        minima, look = _bracketed(law), style(index)
        x = _column(minima, "flops")
        for key, own in lines.items():
            own.append(Line(f"minima, {method}", look["color"], [x], _column(minima, key), mode="markers"))
            if along := _power(law[key], x):
                name = f"C^{law[key]['exponent']['value']:.3f}"
                own.append(Line(name, look["color"], [x], along, look["dash"], mode="lines"))
    titles = {"parameters": "Best size", "tokens": "Tokens of the best size"}
    note = "by compute, and the power laws through the minima"
    return [plot(titles[key], note, [COMPUTE], Axis(key, log=True), own) for key, own in lines.items() if own]


def _lowest(found: Found) -> list[str]:
    """The minima's loss against compute, with the laws as far as the held-out budget, and what is there."""
    held = [row for row in found["points"] if row["use"] == "held out" and row["loss"] is not None]
    best = min(held, key=lambda row: row["loss"], default=None)
    lines = []
    for index, (method, law) in enumerate(found["isoflop"].items()):
        if not law:
            continue
        minima, look = _bracketed(law), style(index)
        x = _column(minima, "flops")
        text = [si(one["budget"], "FLOP") for one in minima]
        y, symbol = _column(minima, "loss"), SYMBOLS[index]
        name = f"minima, {method}"
        lines.append(Line(name, look["color"], [x], y, mode="markers", symbol=symbol, text=text))
        end = FARTHER * max(*x, best["flops"]) if best else max(x)
        along = [min(x) * (end / min(x)) ** (step / (DRAWN - 1)) for step in range(DRAWN)]
        lines.append(Line(f"law, {method}", look["color"], [along], _loss(law, along), mode="lines"))
    if not lines:
        return []
    if best:
        name = f"{si(best['budget'], 'FLOP')}, held out"
        x, y, text = [best["flops"]], [best["loss"]], [best["name"]]
        lines.append(Line(name, GREY, [x], y, mode="markers", symbol="diamond-open", text=text))
    note = "The minima, and their law, with a floor where there is one. Held out: the budget's best run."
    return [plot("Lowest loss by compute", note, [COMPUTE], LOSS, lines)]


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
    y = Axis("loss (nats per token)", log=True)
    return [plot("Training curves and their envelope", note, [COMPUTE], y, lines)]


def _over(title: str, note: str, lines: Sequence[Line]) -> str:
    """Residuals, about zero."""
    farthest = max((abs(value) for line in lines for value in line.y), default=0.0)
    edge = max(LEAST, 1.15 * farthest)
    y = Axis("residual (%)", format={"range": [-edge, edge]})
    return plot(title, note, [COMPUTE], y, lines)


def _off(measured: Sequence[float], law: Sequence[float]) -> list[float]:
    """In %; none where there is no law."""
    return [100 * (value / by - 1) for value, by in zip(measured, law, strict=bool(law))]


def _power(law: Found, flops: Sequence[float]) -> list[float]:
    """What a power law says; nothing where a constant is no number."""
    k, exponent = law["coefficient"], law["exponent"]["value"]
    return [] if k is None or exponent is None else [k * c**exponent for c in flops]


def _loss(law: Found, flops: Sequence[float]) -> list[float]:
    """The lowest loss by the law with a floor where there is one, else by the power law."""
    if not (floored := law["loss_with_floor"]):
        return _power(law["loss"], flops)
    floor, k, exponent = (floored[key]["value"] for key in ("floor", "coefficient", "exponent"))
    return [] if None in (floor, k, exponent) else [floor + k * c**-exponent for c in flops]


def _bracketed(law: Found) -> list[Found]:
    return [one for one in law.get("minima", ()) if one["bracketed"]]


def _exact(found: Found) -> bool:
    """Whether a law with a floor has no more minima than constants."""
    return any(
        law and law["loss_with_floor"] and len(_bracketed(law)) == 3 for law in found["isoflop"].values()
    )


def _column(rows: Sequence[Found], key: str) -> list[Any]:
    return [row[key] for row in rows]


def _budgets(found: Found) -> list[float]:
    return sorted({row["budget"] for row in found["points"]})


def _of(found: Found, budget: float) -> list[Found]:
    return [row for row in found["points"] if row["budget"] == budget and row["use"] != "left out"]


def _held(found: Found, budget: float) -> bool:
    return any(row["budget"] == budget and row["use"] == "held out" for row in found["points"])
