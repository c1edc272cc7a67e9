"""From a table of runs to fit.json, a report and forecasts, on planted laws."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hydra import compose
from rich.console import Console

from launch.overrides import composing
from launch.request import CONF
from launch.scaling import forecast, laws
from launch.scaling.commands import _remarks, made, request_of, rows, told_rows
from launch.scaling.laws import Request
from launch.scaling.page import finding, page, remarks
from launch.scaling.table import Points, points, write
from tests.tiny import ROOT

A, B, E, ALPHA, BETA = 400.0, 410.0, 1.7, 0.34, 0.28
BUDGETS = (1e17, 4e17, 1.6e18, 6.4e18)


def best(flops: float) -> float:
    """The best size, after equation 4 of Hoffmann et al."""
    ratio = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    return ratio * (flops / 6) ** (BETA / (ALPHA + BETA))


def loss(parameters: Any, tokens: Any) -> Any:
    return E + A / parameters**ALPHA + B / tokens**BETA


def planted(noise: float = 0.001, sizes: int = 7) -> Points:
    random = np.random.default_rng(0)
    c = np.repeat(BUDGETS, sizes)
    n = np.concatenate([best(budget) * np.geomspace(1 / 6, 6, sizes) for budget in BUDGETS])
    d = c / (6 * n)
    names = [f"{budget:.2g}-{size:.3g}" for budget, size in zip(c, n, strict=True)]
    measured = loss(n, d) * np.exp(noise * random.standard_normal(len(n)))
    return points(n, d, measured, flops=c, budget=c, names=names)


def request(folder: Path, **changed: Any) -> Request:
    given = yaml.safe_load((CONF / "laws.yaml").read_text())
    keys = {key: given.get(key, 0) for key in Request.__dataclass_fields__}
    own = {"directory": str(folder), "table": str(folder / "points.csv"), "curves": None, "grid": False}
    return Request(**(keys | own | {"resamples": 200} | changed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("laws")
    write(folder / "points.csv", planted())
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return laws.fit(request(folder), Console(file=io.StringIO()))


def test_the_largest_budget_is_held_out_and_predicted(found: dict[str, Any]) -> None:
    assert found["runs"] == {"table": 28, "kept": 28, "fitted": 21}
    assert {row["use"] for row in found["points"] if row["budget"] == BUDGETS[-1]} == {"held out"}
    judged = found["judgement"]
    assert judged["budget"] == BUDGETS[-1] and judged["times"] == pytest.approx(4)
    assert abs(judged["headline"]["error"]) < 0.01
    head = judged["headline"]
    line = finding(found)[0]
    assert (
        f"measured {head['measured']:.4f}" in line and f"{head['error']:+.2%}, by IsoFLOP, parabola." in line
    )
    by_run = [one for one in judged["predictions"] if one["law"] == "parametric"]
    best_run = min(by_run, key=lambda one: one["predicted"]["value"])
    assert f"Others: parametric {best_run['error']:+.2%}" in line


def test_the_planted_constants_are_within_their_intervals(found: dict[str, Any]) -> None:
    intervals = found["parametric"]["intervals"]
    for name, value in (("alpha", ALPHA), ("beta", BETA), ("E", E), ("a", BETA / (ALPHA + BETA))):
        low, high = intervals[name]
        assert low <= value <= high, name
    exponent = found["isoflop"]["parabola"]["parameters"]["exponent"]
    assert exponent["low"] <= BETA / (ALPHA + BETA) <= exponent["high"]


def test_what_is_left_out_is_named_and_what_it_changes_shown(folder: Path) -> None:
    runs = planted()
    off = runs.loss.copy()
    off[[0, 9]] *= 1.4
    write(folder / "off.csv", replace(runs, loss=off))
    asked = request(folder, table=str(folder / "off.csv"), drop_highest=2, hold_out=False)
    found = laws.fit(asked, Console(file=io.StringIO()))
    assert [row["name"] for row in found["points"] if row["use"] == "left out"] == [
        runs.names[0],
        runs.names[9],
    ]
    whole, kept = found["parametric"]["with_all"]["fit"], found["parametric"]["fit"]
    assert (kept["runs"], whole["runs"]) == (26, 28)
    assert abs(kept["alpha"] - whole["alpha"]) > 1e-6
    assert found["judgement"] is None and "No budget was held out" in page(found)


def test_the_page_and_the_rows_hold_the_figures(found: dict[str, Any]) -> None:
    text = page(json.loads(json.dumps(found, allow_nan=False)))
    head = found["judgement"]["headline"]
    for shown in (f"{head['measured']:.4f}", f"{found['parametric']['fit']['alpha']:.4g}", "IsoFLOP curves"):
        assert shown in text
    assert "NaN" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    table = {(row["law"], row["constant"]): row for row in rows(found)}
    assert table["parametric", "alpha"]["value"] == found["parametric"]["fit"]["alpha"]
    assert ("IsoFLOP, akima", "tokens, exponent") in table


def test_a_grid_that_brackets_no_minimum_is_said_and_left_out(folder: Path) -> None:
    runs = planted(noise=0.0)
    small = runs.select((runs.budget != BUDGETS[1]) | (runs.parameters < 0.9 * best(BUDGETS[1])))
    write(folder / "small.csv", small)
    asked = request(folder, table=str(folder / "small.csv"), hold_out=False)
    found = laws.fit(asked, Console(file=io.StringIO()))
    law = found["isoflop"]["parabola"]
    assert [one["bracketed"] for one in law["minima"]] == [True, False, True, True]
    assert "add larger ones" in law["minima"][1]["reason"] and law["minima"][1]["parameters"] is None
    assert any("do not bracket" in line for line in remarks(found))


def test_a_forecast_is_that_of_the_planted_law(folder: Path) -> None:
    fitted, notes = laws.for_forecast(request(folder, hold_out=False))
    assert fitted.per == pytest.approx(6)
    flops = 1e20
    at = forecast.at_budget(fitted, flops)
    for key, value in (
        ("parameters", best(flops)),
        ("loss", loss(best(flops), flops / 6 / best(flops))),
    ):
        assert at[key]["low"] <= value <= at[key]["high"], key
    assert forecast.beyond(fitted, at)[0] == ("budget", pytest.approx(flops / BUDGETS[-1]))
    exact = replace(
        fitted,
        law=replace(
            fitted.law, log_A=math.log(A), log_B=math.log(B), log_E=math.log(E), alpha=ALPHA, beta=BETA
        ),
    )
    at = forecast.at_budget(exact, flops)
    assert at["parameters"]["value"] == pytest.approx(best(flops))
    for off in at["off"]:
        size = off["times"] * best(flops)
        wrong = float(loss(size, flops / 6 / size))
        assert off["loss"]["value"] == pytest.approx(wrong - at["loss"]["value"])
        # With what is not wasted, the best size reaches the same loss.
        less = flops * (1 - off["wasted"]["value"])
        assert loss(best(less), less / 6 / best(less)) == pytest.approx(wrong)
    size = forecast.at_size(exact, best(flops))
    assert size["tokens"]["value"] == pytest.approx(flops / 6 / best(flops))
    assert size["budget"]["value"] == pytest.approx(flops)
    data = forecast.at_data(exact, flops / 6 / best(flops), None)
    assert data["parameters"]["value"] == pytest.approx(best(flops)) and "repeated" not in data
    told = told_rows({"budget": at, "size": size, "data": data})
    assert {row["quantity"] for row in told} >= {"parameters", "tokens", "loss", "compute lost"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"resamples": 5}, "^resamples: 5 are too few"),
        ({"drop_highest": -1}, "^drop_highest: -1 is below 0"),
        ({"budget": 0.0}, "^budget: 0.0 is not a positive number"),
    ],
)
def test_what_is_no_request(folder: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request(folder, **changed)


def test_too_few_runs_are_one_line(folder: Path) -> None:
    write(folder / "few.csv", planted().select([0, 1, 2]))
    with pytest.raises(ValueError, match=r"few\.csv: no law can be fitted; .*needs 7 runs"):
        laws.fit(request(folder, table=str(folder / "few.csv")), Console(file=io.StringIO()))
    write(folder / "two.csv", planted().select(np.r_[0:5, 7:12]))
    with pytest.raises(ValueError, match="5 runs are held out, and hold_out=false fits them too$"):
        laws.fit(request(folder, table=str(folder / "two.csv")), Console(file=io.StringIO()))


def test_names_that_repeat_are_told_apart(folder: Path) -> None:
    runs = replace(planted(), names=[f"size-{index % 7}" for index in range(28)])
    write(folder / "twice.csv", runs)
    found = laws.fit(request(folder, table=str(folder / "twice.csv")), Console(file=io.StringIO()))
    assert [row["use"] for row in found["points"]].count("held out") == 7
    assert len(found["parametric"]["residuals"]) == 21
    assert found["points"][8]["name"] == "size-1 (2)"


def test_curves_of_what_is_held_out_are_not_seen(folder: Path) -> None:
    runs = planted()
    lines = ["name,parameters,tokens,flops,loss"]
    for i, name in enumerate(runs.names):
        for share in np.geomspace(0.05, 1, 12):
            n, d = runs.parameters[i], runs.tokens[i] * share
            lines.append(f"{name},{n},{d},{6 * n * d},{loss(n, d)}")
    (folder / "curves.csv").write_text("\n".join(lines) + "\n")
    asked = request(folder, curves=str(folder / "curves.csv"))
    text = (folder / "points.csv").read_text().replace(f"{runs.loss[-1]}", "nan")  # held out, and diverged
    (folder / "diverged.csv").write_text(text)
    assert "nan" in text
    asked = replace(asked, table=str(folder / "diverged.csv"))
    found = laws.fit(asked, Console(file=io.StringIO()))
    held = {row["name"] for row in found["points"] if row["use"] == "held out"}
    seen = {curve["name"] for curve in found["frontier"]["curves"]}
    assert len(seen) == 21 and not seen & held and runs.names[-1] not in seen


def test_stray_runs_of_no_budget_are_no_judges(folder: Path) -> None:
    runs = planted()
    stray = runs.select([27])
    c = 3 * stray.flops
    more = points(stray.parameters, c / 6 / stray.parameters, stray.loss * 1.5, flops=c)
    columns = {
        key: np.concatenate([getattr(runs, key), getattr(more, key)])
        for key in ("parameters", "tokens", "loss", "flops")
    }
    found = points(**columns)  # budgets are found from the runs
    write(folder / "stray.csv", replace(found, budget=found.budget))
    text = (folder / "stray.csv").read_text().splitlines()
    at = text[0].split(",").index("budget")
    bare = [",".join(cell for i, cell in enumerate(line.split(",")) if i != at) for line in text]
    (folder / "stray.csv").write_text("\n".join(bare) + "\n")
    runs_of = laws.runs_of(request(folder, table=str(folder / "stray.csv")))
    assert (len(runs_of.every), len(runs_of.kept), len(runs_of.fitted)) == (29, 28, 21)
    assert any(note.startswith("1 runs with more compute") for note in runs_of.notes)


def test_every_study_s_tables_are_found() -> None:
    for path in (CONF / "study").glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["name"] == f"scaling-{path.stem}"


def test_the_commands(folder: Path) -> None:
    def command(*given: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "launch.scaling", *given]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)

    own = [f"table={folder}/points.csv", f"directory={folder}/out", "resamples=100", "grid=false"]
    place = own[1]
    early = command("report", place)
    assert early.returncode == 1 and "has no fit.json" in early.stderr
    done = command("fit", *own)
    assert done.returncode == 0, done.stderr
    assert "Held out" in done.stdout
    assert json.loads((folder / "out" / "fit.json").read_text())["runs"]["fitted"] == 21
    assert command("report", place).returncode == 0
    other = command("report", place, "seed=1")
    assert other.returncode == 1 and other.stderr.startswith("error: seed: is a setting of fit")
    assert "<html" in (folder / "out" / "report.html").read_text()[:200]
    told = command("forecast", *own, "budget=1e21")
    assert told.returncode == 0, told.stderr
    assert "budget: extrapolated, to 625 times the largest compute" in told.stdout
    with (folder / "out" / "forecast.csv").open() as file:
        assert {"value", "low", "high"} < set(next(csv.reader(file)))
    again = command("forecast", place, "budget=1e21")  # by what was fitted there
    assert again.returncode == 0 and again.stdout == told.stdout, again.stderr
    whole = command("forecast", place, "budget=1e21", "hold_out=false")
    assert whole.returncode == 0 and whole.stdout != told.stdout, whole.stderr
    nothing = command("forecast", *own)
    assert nothing.returncode == 1 and nothing.stderr.startswith("error: budget: is not set")
    path = folder / "out" / "fit.json"
    whole_fit = path.read_text()
    other = whole_fit.replace('"format": 1', '"format": 0')
    for text, why in ((other, "another version"), ("{", "damaged"), ("[]", "another version")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"fit.json: is .*{why}; python -m launch.scaling fit makes it"):
            made(path)
    missing = command("fit", f"table={folder}/none.csv", f"directory={folder}/out")
    assert missing.returncode == 1 and len(missing.stderr.strip().splitlines()) == 1


def test_a_foreign_table_has_a_directory_of_its_own() -> None:
    with composing():
        given = ["table=theirs.csv"]
        with pytest.raises(ValueError, match="^directory: must be set where table is"):
            request_of(compose("laws", overrides=given), given)
        given = ["study=tiny", "budget=1e20"]
        own = request_of(compose("laws", overrides=given), given)
    assert (own.directory, own.table) == ("runs/scaling-tiny", "runs/scaling-tiny/points.csv")


def test_a_forecast_says_how_far_it_goes_and_what_it_leaves_out(folder: Path) -> None:
    runs = planted()
    small = runs.select((runs.budget != BUDGETS[1]) | (runs.parameters < 0.9 * best(BUDGETS[1])))
    write(folder / "unbracketed.csv", small)
    fitted, notes = laws.for_forecast(request(folder, table=str(folder / "unbracketed.csv")))
    assert any(note.startswith("7 runs of the largest budget are held out of this") for note in notes)
    assert any("IsoFLOP law: 1 of 3 budgets do not bracket" in note for note in notes)
    assert any("move together" in note for note in notes)
    within = forecast.at_size(fitted, best(BUDGETS[1]))
    assert forecast.beyond(fitted, within) == []
    far = forecast.beyond(fitted, forecast.at_size(fitted, 1e15))
    assert dict(far)["parameters"] == pytest.approx(1e15 / fitted.points.parameters.max())
    few = forecast.beyond(fitted, forecast.at_data(fitted, 1e3, None))
    assert {key for key, times in few if times < 1} == {"budget", "parameters", "unique_tokens"}
    asked = request(folder, parameters=1e15)
    (line, *_) = _remarks(asked, fitted, {"size": forecast.at_size(fitted, 1e15)})
    assert line.startswith("size: extrapolated, to ") and "the largest parameters" in line
    assert "which no run shows" in line
