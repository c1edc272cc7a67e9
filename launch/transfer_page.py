"""The page of a transfer certificate: what was found, the losses by learning rate, the best ones."""

from __future__ import annotations

import html
from collections.abc import Sequence
from statistics import mean
from typing import Any

import yaml

from launch import study_page
from launch.report_page import style
from launch.study_page import Axis, Line, bullets, folded, paragraph, plot, plots, section

Own = dict[str, Any]  # of one parametrization, in results.json

WORDS = {
    "stays": "it stays within an octave.",
    "moves": "it moves by more than an octave.",
    "open": "whether it stays within an octave is open; more seeds would tell.",
    "not bracketed": "a bound, for it lies at the edge of what was tried; give more octaves.",
}
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")


def spread(found: dict[str, float | None]) -> str:
    """A mean and its interval."""
    if found["low"] is None:
        return f"{found['mean']:+.2f}"
    return f"{found['mean']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f})"


def finding(results: dict[str, Any]) -> list[str]:
    """A sentence for each parametrization."""
    key, sizes = results["key"], results["sizes"]
    return [
        f"{own['name']}: from {key} {sizes[0]} to {sizes[-1]} the best learning rate shifts by"
        f" {spread(own['shift'])} octaves: {WORDS[own['verdict']]}"
        for own in results["parametrizations"]
    ]


def page(results: dict[str, Any]) -> str:
    """The whole page."""
    names = [own["name"] for own in results["parametrizations"]]
    settings = {"settings": results["settings"], "run": results["run"]}
    body = [
        *(paragraph(line, "lead") for line in finding(results)),
        study_page.table(_head(results), [_row(own) for own in results["parametrizations"]]),
        plots([*(_losses(results, own) for own in results["parametrizations"]), _optima(results)]),
        section("How it was measured", bullets(_method(results["settings"]))),
        section("Settings", folded("of the study and its runs", yaml.safe_dump(settings, sort_keys=False))),
    ]
    title = f"Learning-rate transfer: {', '.join(names)}"
    return study_page.page(title, "transfer certificate", "".join(body))


def _method(plan: dict[str, Any]) -> list[str]:
    return [
        f"Validation loss after {plan['steps']:,} steps, {plan['seeds']} seeds. Of each seed the best"
        " learning rate is the vertex of the parabola, over octaves, through its lowest loss and the two"
        " beside it; shifts are taken seed by seed.",
        "Intervals are Student's at 95 % over seeds. What another grid of learning rates, more steps or other"
        " data would have given is not in them.",
        f"An octave is a factor of 2; 0 is a learning rate of {plan['learning_rate']:g}. The smallest size is"
        " the base of every parametrization, and the same runs in each.",
    ]


def _head(results: dict[str, Any]) -> Sequence[str]:
    sizes = (f"best at {results['key']} {size} (octave)" for size in results["sizes"])
    return ["", *sizes, "shift (octaves)", ""]


def _row(own: Own) -> Sequence[str]:
    best = (spread(one["optimum"]) + ("" if one["bracketed"] else ", at the edge") for one in own["sizes"])
    return [html.escape(own["name"]), *best, spread(own["shift"]), own["verdict"]]


def _losses(results: dict[str, Any], own: Own) -> str:
    """Losses by learning rate, a line for each size, with its seeds from the lowest to the highest."""
    rate, lines = results["settings"]["learning_rate"], []
    for index, one in enumerate(own["sizes"]):
        columns = list(zip(results["octaves"], zip(*one["losses"], strict=True), strict=True))
        columns = [(octave, values) for octave, values in columns if None not in values]
        x = [rate * 2**octave for octave, _ in columns]
        y, low, high = ([of(values) for _, values in columns] for of in (mean, min, max))
        name, look = f"{results['key']} {one['size']}", style(index)
        symbol = SYMBOLS[index % len(SYMBOLS)]
        lines.append(Line(name, look["color"], [x], y, look["dash"], symbol=symbol, low=low, high=high))
    note = "Mean of the seeds, and from the lowest to the highest; where a seed diverged there is no point."
    axis = Axis("learning rate of the base", log=True)
    return plot(own["name"], note, [axis], Axis("validation loss (nats per token)"), lines)


def _optima(results: dict[str, Any]) -> str:
    """The best learning rate by size, a line for each parametrization, with its interval."""
    rate, lines = results["settings"]["learning_rate"], []
    for index, own in enumerate(results["parametrizations"]):
        found = [one["optimum"] for one in own["sizes"]]
        y, low, high = (
            [rate * 2 ** (one[key] if one[key] is not None else one["mean"]) for one in found]
            for key in ("mean", "low", "high")
        )
        look, symbol = style(index), SYMBOLS[index % len(SYMBOLS)]
        x = [results["sizes"]]
        lines.append(Line(own["name"], look["color"], x, y, look["dash"], symbol=symbol, low=low, high=high))
    ticks = {"tickmode": "array", "tickvals": results["sizes"]}
    axis = Axis(results["key"], log=True, format=ticks)
    note = "Level where it transfers. Bands are 95 % intervals over seeds."
    return plot("Best learning rate", note, [axis], Axis("learning rate of the base", log=True), lines)
