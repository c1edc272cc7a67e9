"""What became of a search: its trials as results.json has them, the finding in words, and the HTML page."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from optuna.trial import FrozenTrial, TrialState
from rich.table import Table

from launch import study_page
from launch.overrides import spelled
from launch.report_page import NONE, duration, style
from launch.study_page import Axis, Line, bullets, folded, paragraph, plot, plots, section
from train.records import Record, read_metrics
from train.rundir import RunDir

Told = dict[str, Any]  # what results.json says of a trial

OVER = TrialState.COMPLETE, TrialState.PRUNED
STATES = ("finished", "pruned", "diverged", "refused", "unfinished")
SHOWN = 5  # trials in the terminal
ROWS = 20  # in the page
EDGE = 0.05  # of a range, within which a point is at its end


def evaluations(directory: Path) -> list[Record]:
    """The validation losses of a run so far."""
    return [record for record in read_metrics(RunDir(directory).metrics) if record["kind"] == "eval"]


def told(frozen: FrozenTrial) -> Told:
    """What results.json says of a trial: one that is not over is unfinished."""
    known = frozen.user_attrs
    directory = known.get("directory")
    records = evaluations(Path(directory)) if directory else []
    return {
        "number": frozen.number,
        "setting": known.get("setting", {}),
        "state": known.get("state", "unfinished") if frozen.state in OVER else "unfinished",
        "said": known.get("said"),
        "loss": frozen.value if frozen.state == TrialState.COMPLETE else None,
        "directory": directory,
        "curve": {key: [record[key] for record in records] for key in ("step", "loss", "elapsed_s")},
    }


def ranked(results: dict[str, Any]) -> list[Told]:
    """The finished trials, the lowest loss first."""
    whole = [one for one in results["trials"] if one["state"] == "finished"]
    return sorted(whole, key=lambda one: (one["loss"], one["number"]))


def finding(results: dict[str, Any]) -> str:
    """In a few sentences: the best trial, and what became of the others."""
    trials, best = results["trials"], ranked(results)
    counts = {state: sum(one["state"] == state for one in trials) for state in STATES}
    became = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    if not best:
        last = next((one["said"] for one in reversed(trials) if one["said"]), None)
        return f"No trial has finished ({became or 'none has begun'}){f': {last}' if last else ''}."
    first = best[0]
    point = ", ".join(f"{key}={_shown(value)}" for key, value in first["setting"].items())
    lowest = f"{first['loss']:.4f} nats per token, of trial {first['number']}"
    said = f"The lowest validation loss is {lowest}: {point}."
    if at := edges(results):
        said += f" It lies at the edge of the space in {', '.join(at)}: a wider one may have a lower loss."
    return f"{said} Of {len(trials)} trials: {became}."


def edges(results: dict[str, Any]) -> list[str]:
    """In words, the keys of which the best trial's value is next to an end of its range."""
    found = []
    for key, value in ranked(results)[0]["setting"].items():
        given = results["search"][key]
        if "values" in given:
            continue
        low, high = given["low"], given["high"]
        share = _share(value, low, high, given.get("log", False))
        if share <= EDGE or share >= 1 - EDGE:
            found.append(f"{key} ({'lowest' if share <= EDGE else 'highest'})")
    return found


def table(results: dict[str, Any]) -> Table:
    """For the terminal, a row for each of the best trials."""
    found = Table(box=None, padding=(0, 2, 0, 0))
    keys = list(results["search"])
    ends = [key.rpartition(".")[2] for key in keys]
    short = [end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)]
    for column in ("trial", *short, "loss"):
        found.add_column(column, justify="right", overflow="fold")
    for one in ranked(results)[:SHOWN]:
        found.add_row(str(one["number"]), *map(_shown, one["setting"].values()), f"{one['loss']:.4f}")
    return found


def page(results: dict[str, Any]) -> str:
    """The whole page."""
    space, best = results["search"], ranked(results)
    settings = {key: results[key] for key in ("search", "settings", "run")}
    slices = [_slice(results, key) for key in space] if best else []
    body = [
        paragraph(finding(results), "lead"),
        section("Trials", plots([_history(results), _curves(results)])) if best else "",
        section("Loss against each key", plots(slices)) if best else "",
        section("What the loss depends on", _importances(results)),
        section("The best trials", _table(space, best[:ROWS])) if best else "",
        section("The others", _others(results)),
        section("What this does not say", bullets(_limits())),
        section("Settings", folded("of the search and its runs", yaml.safe_dump(settings, sort_keys=False))),
    ]
    return study_page.page(f"Search: {', '.join(space)}", "sweep", "".join(body))


def _history(results: dict[str, Any]) -> str:
    whole = sorted(ranked(results), key=lambda one: one["number"])
    numbers, losses = [one["number"] for one in whole], [one["loss"] for one in whole]
    lowest = list(itertools.accumulate(losses, min))
    lines = [
        Line("finished", style(0)["color"], [numbers], losses, mode="markers", text=_points(whole)),
        Line("lowest so far", style(1)["color"], [numbers], lowest, mode="lines"),
    ]
    ended = [one for one in results["trials"] if one["state"] == "pruned" and _last(one) is not None]
    if ended:
        places, last = [[one["number"] for one in ended]], [_last(one) for one in ended]
        more = {"mode": "markers", "symbol": "x-thin-open", "text": _points(ended)}
        lines.append(Line("pruned, when it was", style(2)["color"], places, last, **more))  # type: ignore[arg-type]
    note = "validation loss of each trial, by its number"
    return plot("History", note, [Axis("trial")], Axis("nats per token"), lines)


def _curves(results: dict[str, Any]) -> str:
    lines = []
    for one in results["trials"]:
        steps, losses = _finite(one)
        if losses:
            look = style(0 if one["state"] == "finished" else 2)
            dash = "solid" if one["state"] == "finished" else "dot"
            name = f"trial {one['number']}, {one['state']}"
            lines.append(
                Line(name, look["color"], [steps], losses, dash=dash, text=_points([one]) * len(steps))
            )
    note = "validation loss of every trial by step; dotted: not finished"
    return plot("Curves", note, [Axis("step")], Axis("nats per token"), lines)


def _slice(results: dict[str, Any], key: str) -> str:
    """The loss of the finished trials against the value of one key; later ones are larger."""
    given, whole = results["search"][key], ranked(results)
    listed = "values" in given
    places = [_shown(one["setting"][key]) if listed else one["setting"][key] for one in whole]
    losses = [one["loss"] for one in whole]
    format: dict[str, Any] = {}
    if listed:
        order = [_shown(value) for value in given["values"]]
        format = {"type": "category", "categoryorder": "array", "categoryarray": order}
    axis = Axis(key, log=not listed and given.get("log", False), format=format)
    lines = [
        Line("finished", style(0)["color"], [places], losses, mode="markers", text=_points(whole)),
        Line("the best", style(1)["color"], [places[:1]], losses[:1], mode="markers", symbol="star"),
    ]
    return plot(key, "each point a finished trial", [axis], Axis("nats per token"), lines)


def _importances(results: dict[str, Any]) -> str:
    found = results["importances"]
    if found is None:
        return paragraph("Too few finished trials, or keys, to tell.")
    note = (
        "Share of what tells the best tenth of the finished trials from the others (PED-ANOVA, arXiv"
        " 2304.10255). Pruned trials do not count, and with few trials the shares are rough."
    )
    rows = [[html.escape(key), f"{share:.0%}"] for key, share in found.items()]
    return paragraph(note) + study_page.table(("key", "share"), rows)


def _table(space: dict[str, Any], trials: Sequence[Told]) -> str:
    rows = [
        [
            str(one["number"]),
            *(html.escape(_shown(one["setting"][key])) for key in space),
            f"{one['loss']:.4f}",
            duration(one["curve"]["elapsed_s"][-1]) if one["curve"]["elapsed_s"] else NONE,
            html.escape(str(one["directory"])),
        ]
        for one in trials
    ]
    head = ("trial", *map(html.escape, space), "validation loss", "time", "directory")
    return study_page.table(head, rows)


def _others(results: dict[str, Any]) -> str:
    others = [one for one in results["trials"] if one["state"] != "finished"]
    if not others:
        return paragraph("All trials have finished.")
    rows = [
        [str(one["number"]), one["state"], html.escape(one["said"] or NONE), html.escape(_points([one])[0])]
        for one in others
    ]
    return study_page.table(("trial", "state", "why", "point"), rows)


def _limits() -> list[str]:
    return [
        "Each point was trained with one seed. The lowest loss was chosen for being low: train its point with"
        " new seeds before it is compared with anything.",
        "A pruned run was worse than the median early on; with a long warm-up, or a high learning rate, it"
        " might have caught up.",
        "What is best here is best for this model, this batch and this number of steps.",
    ]


def _points(trials: Sequence[Told]) -> list[str]:
    return [
        f"trial {one['number']}: "
        + ", ".join(f"{key}={_shown(value)}" for key, value in one["setting"].items())
        for one in trials
    ]


def _finite(one: Told) -> tuple[list[int], list[float]]:
    """The steps of a trial's evaluations, and their losses, without those that are not finite."""
    pairs = [
        pair for pair in zip(one["curve"]["step"], one["curve"]["loss"], strict=True) if pair[1] is not None
    ]
    return [step for step, _ in pairs], [loss for _, loss in pairs]


def _last(one: Told) -> float | None:
    losses = _finite(one)[1]
    return losses[-1] if losses else None


def _share(value: float, low: float, high: float, log: bool) -> float:
    """Where in a range a value lies, from 0 to 1."""
    if log:
        value, low, high = (math.log(one) for one in (value, low, high))
    return (value - low) / (high - low)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else spelled(value)
