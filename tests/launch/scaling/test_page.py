"""The report of a scaling study and its fits.csv, from small fits made by hand."""

from __future__ import annotations

import html
import json
import math
import re
from typing import Any

import pytest

from launch.scaling.commands import rows
from launch.scaling.page import page, remarks

UNFIXED = "the losses do not fix the floor: none at all fits them about as well"
POWERS = {"parameters": (0.1, 0.5), "tokens": (2.0, 0.5), "loss": (60.0, -0.07)}
BUDGETS = (1e16, 1e18, 1e20)


def estimate(value: float | None, *ends: float | None) -> dict[str, float | None]:
    low, high = ends or (None, None)
    return {"value": value, "low": low, "high": high}


def floored(note: str | None = None) -> dict[str, Any]:
    return {
        "floor": estimate(1.5, 1.25, 1.75),
        "coefficient": estimate(200.0, 20.0, 3000.0),
        "exponent": estimate(0.125, 0.1, 0.15),
        "note": note,
    }


def lowest(flops: float) -> float:
    """By `floored`."""
    return float(1.5 + 200.0 * flops**-0.125)


def powers(*keys: str) -> dict[str, Any]:
    return {
        key: {"coefficient": k, "exponent": estimate(x, x - 0.01, x + 0.01), "bias": None}
        for key, (k, x) in POWERS.items()
        if key in keys
    }


def isoflop(method: str) -> dict[str, Any]:
    """Minima 5 % over the law of N, 10 % under that of D, and 2 % over that of the loss."""
    minima = [
        {
            "budget": c, "flops": 1.01 * c, "sizes": 5, "reason": None, "bracketed": True,
            "parameters": 1.05 * 0.1 * (1.01 * c) ** 0.5, "tokens": 0.9 * 2.0 * (1.01 * c) ** 0.5,
            "loss": 1.02 * lowest(1.01 * c),
        }
        for c in BUDGETS
    ]  # fmt: skip
    lost = {"parameters": None, "tokens": None, "loss": None, "reason": "the largest size is the best"}
    minima.append({"budget": 1e21, "flops": 1e21, "sizes": 5, "bracketed": False} | lost)
    own = {"method": method, "minima": minima, "notes": ["barely"], "lines": []}
    return own | powers(*POWERS) | {"loss_with_floor": floored(UNFIXED if method == "akima" else None)}


def row(name: str, budget: float, loss: float | None, use: str = "fitted") -> dict[str, Any]:
    own = {"parameters": 1e7, "tokens": budget / 6e7, "flops": budget, "loss": loss}
    return {"name": name, "budget": budget, "use": use} | own


@pytest.fixture
def found() -> dict[str, Any]:
    envelope = {"flops": [1e17, 1e19], "parameters": [0.0, 0.0], "tokens": [0.0, 0.0]}
    envelope["parameters"] = [1.25 * 0.1 * c**0.5 for c in envelope["flops"]]
    envelope["tokens"] = [0.75 * 2.0 * c**0.5 for c in envelope["flops"]]
    envelope["loss"] = [0.97 * lowest(c) for c in envelope["flops"]]
    curves = [{"name": "one", "flops": [1e17, 1e19], "loss": [3.0, 2.0]}]
    frontier = {"envelope": envelope, "curves": curves, "notes": ["no intervals: 3 curves"]}
    refits = [
        {"law": "parametric", "convention": "without embeddings", "a": estimate(0.6, 0.55, 0.65),
         "b": estimate(0.4, 0.35, 0.45), "note": None},
        {"law": "akima", "convention": "with the head", "a": None, "b": None, "note": "too few"},
    ]  # fmt: skip
    return {
        "request": {"table": "points.csv"},
        "points": [
            *(row(f"run-{c:g}", c, 1.1 * lowest(c)) for c in BUDGETS),
            row("again", 1e18, 2.5),
            *(row(f"held-{loss}", 1e22, loss, "held out") for loss in (1.9, 1.8, None)),
        ],
        "parametric": None,
        "isoflop": {method: isoflop(method) for method in ("parabola", "akima")},
        "frontier": frontier | powers("parameters", "tokens") | {"loss_with_floor": floored(UNFIXED)},
        "constrained": {
            "fit": {"repeats": 12.5, "excess": None, "objective": 0.01, "runs": 4},
            "intervals": {"repeats": [10.0, 16.0], "excess": [None, None]},
            "warnings": [],
            "residuals": {"again": 0.03},
        },
        "conventions": {"refits": refits, "moved": {"parametric": 0.1}},
        "judgement": None,
        "notes": [],
    }


def sections(text: str) -> dict[str, str]:
    parts = re.split(r"<h2>(.*?)</h2>", text.split("<script>")[0])
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def table(text: str) -> dict[str, list[str]]:
    """The rows of a section's tables by what they are named."""
    found = re.findall(r"<tr><th>([^<]*)</th>((?:<td>[^<]*</td>)+)</tr>", text)
    return {html.unescape(name): re.findall(r"<td>(.*?)</td>", cells) for name, cells in found}


def drawn(text: str) -> dict[str, dict[str, Any]]:
    """The lines of each plot by their names."""
    found = re.findall(r'<h3>([^<]*)</h3><p>[^<]*</p><div class="canvas" data-plot="([^"]*)"', text)
    plots = {html.unescape(title): json.loads(html.unescape(plot)) for title, plot in found}
    return {title: {line["name"]: line for line in plot["lines"]} for title, plot in plots.items()}


def test_the_laws_of_compute_are_told_with_their_intervals(found: dict[str, Any]) -> None:
    parts = sections(page(found))
    minima, curves = table(parts["IsoFLOP minima"]), table(parts["Minimum over training curves"])
    law = ["1.5 (1.25 to 1.75)", "200 (20 to 3000)", "0.125 (0.1 to 0.15)"]
    for method in ("parabola", "akima"):
        assert minima[f"{method}, N = k C^x"] == ["–", "0.1", "0.5 (0.49 to 0.51)"]
        assert minima[f"{method}, L = k C^x"] == ["–", "60", "-0.07 (-0.08 to -0.06)"]
        assert minima[f"{method}, L = E + k C^-x"] == law
    assert minima["parabola, 1 ZFLOP"] == ["–", "–", "–", "the largest size is the best"]
    assert curves["D = k C^x"] == ["–", "2", "0.5 (0.49 to 0.51)"]
    assert curves["L = E + k C^-x"] == law
    assert "L = k C^x" not in curves


def test_notes_are_on_the_page_and_among_the_remarks(found: dict[str, Any]) -> None:
    notes = ["parabola: barely", "akima: barely", f"akima: {UNFIXED}"]
    curves = ["no intervals: 3 curves", UNFIXED]
    assert remarks(found) == [*notes, *(f"training curves: {note}" for note in curves)]
    parts = sections(page(found))
    for title, lines in (("IsoFLOP minima", notes), ("Minimum over training curves", curves)):
        assert re.findall("<li>(.*?)</li>", parts[title]) == lines


def test_residuals_are_what_is_off_the_laws(found: dict[str, Any]) -> None:
    plots = drawn(page(found))
    both = plots["Residuals of the IsoFLOP minima: size and tokens"]
    loss = plots["Residuals of the IsoFLOP minima: lowest loss"]
    for method in ("parabola", "akima"):
        assert both[f"parameters, {method}"]["x"] == [[1.01 * c for c in BUDGETS]]
        assert both[f"parameters, {method}"]["y"] == pytest.approx([5.0] * 3)
        assert both[f"tokens, {method}"]["y"] == pytest.approx([-10.0] * 3)
        assert loss[method]["y"] == pytest.approx([2.0] * 3)
    both = plots["Residuals of the envelope: size and tokens"]
    assert both["parameters"]["y"] == pytest.approx([25.0] * 2)
    assert both["tokens"]["y"] == pytest.approx([-25.0] * 2)
    assert plots["Residuals of the envelope: loss"]["loss"]["y"] == pytest.approx([-3.0] * 2)


def test_without_a_floor_the_loss_is_compared_with_its_power_law(found: dict[str, Any]) -> None:
    law = found["isoflop"]["parabola"]
    law["loss_with_floor"] = None
    text = page(found)
    assert "parabola, L = E + k C^-x" not in table(sections(text)["IsoFLOP minima"])
    by_hand = [100 * (1.02 * lowest(1.01 * c) / (60.0 * (1.01 * c) ** -0.07) - 1) for c in BUDGETS]
    assert drawn(text)["Residuals of the IsoFLOP minima: lowest loss"]["parabola"]["y"] == pytest.approx(
        by_hand
    )
    assert ("IsoFLOP, parabola", "loss with a floor, floor") not in {
        (one["law"], one["constant"]) for one in rows(found)
    }


def test_the_lowest_loss_is_drawn_past_what_was_held_out(found: dict[str, Any]) -> None:
    lines = drawn(page(found))["Lowest loss by compute"]
    law, held = lines["law, akima"], lines["10 ZFLOP, held out"]
    (x,) = law["x"]
    assert (x[0], x[-1]) == (pytest.approx(1.01e16), pytest.approx(1.5e22))
    assert law["y"] == pytest.approx([lowest(c) for c in x])
    assert lines["minima, akima"]["y"] == pytest.approx([1.02 * lowest(1.01 * c) for c in BUDGETS])
    assert (held["x"], held["y"], held["symbol"], held["text"]) == (
        [[1e22]],
        [1.8],
        "diamond-open",
        ["held-1.8"],
    )
    found["points"] = [one for one in found["points"] if one["use"] == "fitted"]
    lines = drawn(page(found))["Lowest loss by compute"]
    assert lines["law, akima"]["x"][0][-1] == pytest.approx(1.01e20)
    assert not any("held out" in name for name in lines)


def test_repeated_data_has_residuals_by_tokens(found: dict[str, Any]) -> None:
    text = sections(page(found))["Repeated data"]
    assert table(text)["R_D*, in repetitions"] == ["12.5", "10 to 16"]
    (line,) = drawn(text)["Residuals"].values()
    assert (line["x"], line["y"], line["text"]) == ([[1e18 / 6e7]], [pytest.approx(3.0)], ["again"])
    del found["constrained"]["residuals"]
    assert drawn(sections(page(found))["Repeated data"]) == {}


def test_every_constant_has_a_row(found: dict[str, Any]) -> None:
    told = {(one["law"], one["constant"]): (one["value"], one["low"], one["high"]) for one in rows(found)}
    assert len(told) == len(rows(found))
    for law in ("IsoFLOP, parabola", "IsoFLOP, akima", "training curves"):
        assert told[law, "parameters, coefficient"] == (0.1, None, None)
        assert told[law, "tokens, exponent"] == (0.5, 0.49, 0.51)
        assert told[law, "loss with a floor, floor"] == (1.5, 1.25, 1.75)
        assert told[law, "loss with a floor, coefficient"] == (200.0, 20.0, 3000.0)
        assert told[law, "loss with a floor, exponent"] == (0.125, 0.1, 0.15)
    assert told["repeated data", "R_D*"] == (12.5, 10.0, 16.0)
    assert told["repeated data", "R_N*"] == (None, None, None)
    assert told["parametric, without embeddings", "a"] == (0.6, 0.55, 0.65)
    assert told["parametric, without embeddings", "b"] == (0.4, 0.35, 0.45)
    assert told["akima, with the head", "a"] == (None, None, None)


def test_laws_that_are_missing_leave_nothing(found: dict[str, Any]) -> None:
    found |= {"isoflop": {"parabola": None, "akima": None}, "frontier": None}
    found |= {"constrained": None, "conventions": None}
    text = page(found)
    assert list(sections(text)) == ["Runs", "Settings"]
    assert drawn(text) == {} and rows(found) == [] and remarks(found) == []


def test_numbers_that_are_none_are_a_dash(found: dict[str, Any]) -> None:
    law = found["isoflop"]["parabola"]
    law["parameters"] |= {"coefficient": None, "exponent": estimate(None)}
    law["loss_with_floor"]["coefficient"] = estimate(None)
    prediction = {"law": "parametric", "of": "loss", "run": "held-1.8", "measured": 1.8}
    prediction |= {"predicted": estimate(None), "error": None, "inside": None}
    found["judgement"] = {"budget": 1e22, "times": math.pi, "headline": prediction}
    found["judgement"] |= {"predictions": [prediction], "notes": []}
    text = page(found)
    parts, plots = sections(text), drawn(text)
    assert table(parts["IsoFLOP minima"])["parabola, N = k C^x"] == ["–", "–", "–"]
    assert table(parts["Judged by what was held out"])["parametric: loss"][2:] == ["–"] * 4
    assert plots["Residuals of the IsoFLOP minima: size and tokens"]["parameters, parabola"]["y"] == []
    assert plots["Lowest loss by compute"]["law, parabola"]["y"] == []
    assert table(parts["Runs"])["held-None"][-2:] == ["–", "held out"]
