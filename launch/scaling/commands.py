"""The commands that read a table of runs: fit, report, forecast (conf/laws.yaml)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from data.cli import one_line_errors
from data.files import write
from launch.overrides import split, top
from launch.report_page import NONE, count, si
from launch.request import CONF
from launch.scaling import forecast as forecasts
from launch.scaling import laws
from launch.scaling.laws import Request
from launch.scaling.page import CONSTANTS, finding, page, remarks
from launch.scaling.table import write_rows
from launch.scaling.training import CURVES, POINTS

FIT, FITS, REPORT, FORECAST = "fit.json", "fits.csv", "report.html", "forecast"
QUANTITIES = {"budget": "compute", "parameters": "parameters", "tokens": "tokens", "loss": "loss"}
OUTSIDE = QUANTITIES | {"unique_tokens": "tokens"}


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="laws")
@one_line_errors
def fit(node: DictConfig) -> None:
    typed = HydraConfig.get().overrides.task
    request, console = request_of(node, typed), Console(highlight=False)
    found = laws.fit(request, console)
    directory = Path(request.directory)
    directory.mkdir(parents=True, exist_ok=True)
    write(directory / FIT, json.dumps(found, indent=1, allow_nan=False) + "\n")
    write_rows(directory / FITS, rows(found))
    for line in [*finding(found), *remarks(found)]:
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"{directory / FIT}; python -m launch.scaling report shows it", soft_wrap=True)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="laws")
@one_line_errors
def report(node: DictConfig) -> None:
    typed = HydraConfig.get().overrides.task
    request, console = request_of(node, typed), Console(highlight=False)
    for override in typed:
        if top(override) not in ("study", "name", "directory"):
            raise ValueError(f"{top(override)}: is a setting of fit, which report only shows; set it there")
    path = Path(request.directory) / FIT
    if not path.exists():
        raise ValueError(
            f"directory: {request.directory} has no {FIT}; python -m launch.scaling fit makes it"
        )
    found = made(path)
    made_from = Path(found["request"]["table"])
    if made_from.exists() and made_from.stat().st_mtime > path.stat().st_mtime:
        raise ValueError(f"{path}: is older than {made_from}; fit it again")
    target = path.with_name(REPORT)
    write(target, page(found))
    for line in finding(found)[:1]:
        console.print(line, markup=False, soft_wrap=True)
    console.print(str(target), soft_wrap=True)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="laws")
@one_line_errors
def forecast(node: DictConfig) -> None:
    typed = HydraConfig.get().overrides.task
    request, console = request_of(node, typed), Console(highlight=False)
    path = Path(request.directory) / FIT
    given = {top(override) for override in typed} | {"budget", "parameters", "unique_tokens", "directory"}
    if "table" not in given and path.exists():  # the laws that were fitted there, but for what is given
        asked = {key: value for key, value in vars(request).items() if key in given}
        request = Request(**(made(path)["request"] | asked))
    if request.budget is request.parameters is request.unique_tokens is None:
        raise ValueError("budget: is not set, for example budget=1e21; or set parameters, or unique_tokens")
    fitted, notes = laws.for_forecast(request)
    found: dict[str, Any] = {}
    if request.budget is not None:
        found["budget"] = forecasts.at_budget(fitted, request.budget)
    if request.parameters is not None:
        found["size"] = forecasts.at_size(fitted, request.parameters)
    if request.unique_tokens is not None:
        found["data"] = forecasts.at_data(fitted, request.unique_tokens, request.budget)
    directory = Path(request.directory)
    directory.mkdir(parents=True, exist_ok=True)
    write(directory / f"{FORECAST}.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    told = told_rows(found)
    write_rows(directory / f"{FORECAST}.csv", told)
    console.print(_table(told))
    for line in [*_remarks(request, fitted, found), *notes]:
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"{directory / FORECAST}.json and .csv", soft_wrap=True)


def made(path: Path) -> dict[str, Any]:
    """A fit.json. Raises ValueError where another version of this code wrote it, or it is damaged."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: is damaged; python -m launch.scaling fit makes it anew") from error
    if not isinstance(found, dict) or found.get("format") != laws.FORMAT:
        raise ValueError(f"{path}: is of another version; python -m launch.scaling fit makes it anew")
    return found


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Every fitted constant with its interval: a row each."""
    table = []
    if law := found["parametric"]:
        for name in CONSTANTS:
            low, high = law["intervals"][name]
            table.append(_row("parametric", name, law["fit"][name], low, high))
    powers = {f"IsoFLOP, {method}": law for method, law in found["isoflop"].items()}
    for name, law in (powers | {"training curves": found["frontier"]}).items():
        for key in ("parameters", "tokens", "loss"):
            if law and key in law:
                table.append(_row(name, f"{key}, coefficient", law[key]["coefficient"], None, None))
                table.append(_row(name, f"{key}, exponent", *law[key]["exponent"].values()))
        if law and (floored := law["loss_with_floor"]):
            for key in ("floor", "coefficient", "exponent"):
                table.append(_row(name, f"loss with a floor, {key}", *floored[key].values()))
    if law := found["constrained"]:
        for key, name in (("repeats", "R_D*"), ("excess", "R_N*")):
            table.append(_row("repeated data", name, law["fit"][key], *law["intervals"][key]))
    for one in found["conventions"]["refits"] if found["conventions"] else ():
        for key in ("a", "b"):
            ends = one[key].values() if one[key] else (None, None, None)
            table.append(_row(f"{one['law']}, {one['convention']}", key, *ends))
    return table


def _row(law: str, constant: str, value: Any, low: Any, high: Any) -> dict[str, Any]:
    return {"law": law, "constant": constant, "value": value, "low": low, "high": high}


def told_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A forecast's quantities with their intervals: a row each."""
    table = []
    for what, own in found.items():
        for key in QUANTITIES:
            if isinstance(own.get(key), dict):
                table.append({"of": what, "quantity": key, **own[key]})
        for key, estimate in own.get("isoflop", {}).items():
            table.append({"of": f"{what}, IsoFLOP", "quantity": key, **estimate})
        for off in own.get("off", ()):
            table.append({"of": f"{off['times']:g} x the size", "quantity": "loss lost", **off["loss"]})
            table.append({"of": f"{off['times']:g} x the size", "quantity": "compute lost", **off["wasted"]})
        for key, estimate in own.get("repeated", {}).items():
            table.append({"of": f"{what}, repeated", "quantity": key, **estimate})
    return table


def _table(told: list[dict[str, Any]]) -> Table:
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for column, justify in (("", "left"), ("", "left"), ("forecast", "right"), ("95 % interval", "right")):
        shown.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in told:
        low, high = (_shown(row["quantity"], row[key]) for key in ("low", "high"))
        between = f"{low} to {high}" if row["low"] is not None else NONE
        shown.add_row(row["of"], row["quantity"], _shown(row["quantity"], row["value"]), between)
    return shown


def _shown(quantity: str, value: float | None) -> str:
    if value is None or quantity in ("parameters", "tokens"):
        return count(value)
    if quantity == "budget":
        return si(value, "FLOP")
    if quantity == "compute lost":
        return f"{value:.1%}"
    return f"{value:.4f}"


def _remarks(request: Request, fitted: forecasts.Fitted, found: dict[str, Any]) -> list[str]:
    lines = []
    for what, own in found.items():
        outside = forecasts.beyond(fitted, own)
        if not outside:
            continue
        words = [
            f"{times:,.3g} times the {'largest' if times > 1 else 'smallest'} {OUTSIDE[key]}"
            for key, times in outside
        ]
        line = f"{what}: extrapolated, to {', '.join(words)} that was fitted"
        if any(not 1 / forecasts.DOUBTFUL <= times <= forecasts.DOUBTFUL for _, times in outside):
            line += "; the intervals hold only if the law keeps its form that far, which no run shows"
        lines.append(f"{line}.")
    law = fitted.law
    if not (law.alpha > 0 and law.beta > 0):
        lines.append(
            f"The law has no best size: alpha is {law.alpha:.3g} and beta {law.beta:.3g}, and both must be"
            " positive; add runs of other sizes and lengths."
        )
    if request.unique_tokens is not None and request.budget is not None and fitted.constrained is None:
        lines.append("Nothing is said of repeated data: there is no law of it through these runs.")
    return lines


def request_of(node: DictConfig, typed: Sequence[str]) -> Request:
    """With the study's own files where none are named. typed: overrides of the command line.

    Raises ValueError where a foreign table has no directory of its own.
    """
    request, _ = split(node, Request)
    if request.table is not None:
        if not {"directory", "name"} & {top(override) for override in typed}:
            raise ValueError("directory: must be set where table is; fits and reports are written there")
        return request
    curves = request.curves
    if curves is None and (Path(request.directory) / CURVES).exists():
        curves = f"{request.directory}/{CURVES}"
    return replace(request, table=f"{request.directory}/{POINTS}", curves=curves)
