"""The HTML of a comparison of optimizers, and its finding in words."""

from __future__ import annotations

import html
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import yaml

from launch import study_page
from launch.report import X_AXES
from launch.report_page import NONE, duration, style
from launch.statistics import LEVEL
from launch.study_page import Axis, Line, bullets, chip, folded, paragraph, plot, plots, section

Own = dict[str, Any]  # what results.json says of one optimizer

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "star")


def page(results: dict[str, Any]) -> str:
    """The whole page about what `launch.compare.study` gives."""
    optimizers = results["optimizers"]
    settings = {key: results[key] for key in ("settings", "run", "parallel")}
    body = [
        paragraph(finding(results), "lead"),
        _table(results),
        section("Curves", plots([_curves(results), _ends(results)])),
        section("Tuning", _tuning_note(results), plots(map(_tuning, optimizers))),
        section("Pairs", _pairs(results)),
        section("How they were compared", bullets(_method(results))),
        section("What this does not say", bullets(_limits(results))),
        section("Settings", folded("of the study and its runs", yaml.safe_dump(settings, sort_keys=False))),
    ]
    names = ", ".join(own["name"] for own in optimizers)
    return study_page.page(f"Optimizers: {names}", "optimizer comparison", "".join(body))


def finding(results: dict[str, Any]) -> str:
    """In a few sentences: who won, or why nobody did."""
    whole = _ranked(results)
    fell = [own["name"] for own in results["optimizers"] if not _whole(own)]
    out = f" Left out, for a seed at its best setting diverged: {', '.join(fell)}." if fell else ""
    if len(whole) < 2:
        return f"No winner: there are no two optimizers to compare.{out}"
    first, steps = whole[0]["name"], results["settings"]["steps"]
    lowest = f"{mean(losses(whole[0])):.4f} nats per token after {steps:,} steps"
    pairs = [pair for pair in results["pairs"] if pair["first"] == first]
    if not pairs:
        said = f"No winner: {first} has the lowest validation loss, {lowest}, but there was one seed of each,"
        return f"{said} so nothing says how much of a difference is chance.{out}"
    if results["winner"]:
        least = min(pairs, key=lambda pair: pair["difference"])
        return (
            f"{first} wins: it has the lowest mean validation loss, {lowest}, and its seeds tell it apart"
            f" from every other. The nearest is {least['second']}, {least['difference']:.4f} above it"
            f" (p {_p(max(pair['adjusted'] for pair in pairs))} at most, corrected).{out}"
        )
    near = ", ".join(f"{pair['second']} (p {_p(pair['adjusted'])})" for pair in pairs if not pair["apart"])
    far = [pair["second"] for pair in pairs if pair["apart"]]
    better = f" It is better than {', '.join(far)}." if far else ""
    return (
        f"No winner: {first} has the lowest mean validation loss, {lowest}, but its seeds do not tell it"
        f" apart from {near}.{better}{out}"
    )


def spread(own: Own) -> str:
    """Mean and standard deviation of an optimizer's seeds, or how many diverged."""
    found, count = losses(own), len(own["runs"])
    if not _whole(own):
        return f"{count - len(found)} of {count} seeds diverged"
    return f"{mean(found):.4f}" + (f" ± {stdev(found):.4f}" if count > 1 else "")


def _whole(own: Own) -> bool:
    return len(losses(own)) == len(own["runs"])


def _ranked(results: dict[str, Any]) -> list[Own]:
    """The optimizers of which no seed diverged, the lowest mean first."""
    return sorted(filter(_whole, results["optimizers"]), key=lambda own: mean(losses(own)))


def losses(own: Own) -> list[float]:
    """Of an optimizer's seeds, those that did not diverge."""
    return [run["loss"] for run in own["runs"] if run["loss"] is not None]


def _p(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"= {p:.2g}"


def seconds(own: Own) -> float | None:
    """Of a run, on average over those that have finished; None where none has."""
    found = [run["curve"]["elapsed_s"][-1] for run in own["runs"] if run["loss"] is not None]
    return mean(found) if found else None


def _table(results: dict[str, Any]) -> str:
    optimizers = results["optimizers"]
    fastest = min((s for own in optimizers if (s := seconds(own)) is not None), default=None)
    above = {
        pair["second"]: pair for pair in results["pairs"] if pair["first"] == results["pairs"][0]["first"]
    }
    rows = []
    for own in (*_ranked(results), *(own for own in optimizers if not _whole(own))):
        index = optimizers.index(own)
        found, pair, time = losses(own), above.get(own["name"]), seconds(own)
        range_ = f'<br><span class="range">{min(found):.4f} to {max(found):.4f}</span>' if found else ""
        diverged = sum(run["diverged"] is not None for run in own["tuning"])
        name = chip(style(index)["color"], own["name"])
        rows.append(
            [
                f"<b>{name}</b>" if own["name"] == results["winner"] else name,
                html.escape(spread(own)) + range_,
                f"+{pair['difference']:.4f}" if pair else NONE,
                html.escape(_p(pair["adjusted"]).removeprefix("= ")) if pair else NONE,
                f"{own['best']['learning_rate']:g}",
                f"{own['best']['weight_decay']:g}",
                f"{len(own['tuning'])}" + (f", {diverged} diverged" if diverged else ""),
                "<br>".join(map(html.escape, own["edges"])) or NONE,
                duration(time),
                f"{time / fastest:.2f}" if time and fastest else NONE,
            ]
        )
    head = ["", "validation loss", "above the lowest", "p, corrected", "learning rate", "weight decay"]
    head += ["runs to tune", "best at the edge", "time of a run", "times the fastest"]
    note = (
        "Validation loss in nats per token: mean and standard deviation of the new seeds, and their range. p:"
        " chance of a difference from the lowest as large as this, were there none. Best at the edge: of all"
        " that was tried, so that more tuning may find better."
    )
    return study_page.table(head, rows) + paragraph(note, "faint")


def _curves(results: dict[str, Any]) -> str:
    """The validation loss of each optimizer, averaged over its seeds, against each axis."""
    longest = max((s for own in results["optimizers"] if (s := seconds(own)) is not None), default=0.0)
    unit, scale = ("minutes", 60.0) if longest > 120 else ("seconds", 1.0)
    large = {"exponentformat": "B", "rangemode": "tozero"}
    xs = [
        Axis("optimizer steps", "steps", format=large),
        Axis("training tokens", "tokens", format=large),
        Axis(
            "training compute (FLOP, of the model)",
            "FLOP",
            format={"tickformat": "~s", "rangemode": "tozero"},
        ),
        Axis(f"wall-clock ({unit})", "time", format={"rangemode": "tozero"}),
    ]
    lines = []
    for index, own in enumerate(results["optimizers"]):
        found = [run["curve"] for run in own["runs"] if run["loss"] is not None]
        together = {
            key: list(zip(*(curve[key] for curve in found), strict=True)) for key in (*X_AXES, "loss")
        }
        average = {key: list(map(mean, values)) for key, values in together.items()}
        average["elapsed_s"] = [value / scale for value in average["elapsed_s"]]
        edges = list(map(min, together["loss"])), list(map(max, together["loss"]))
        x, look = [average[key] for key in X_AXES], style(index)
        lines.append(
            Line(own["name"], look["color"], x, average["loss"], look["dash"], low=edges[0], high=edges[1])
        )
    note = (
        "Mean of the new seeds, and from the lowest to the highest. Time: on this machine, with"
        f" {results['parallel']} runs beside each other, evaluations and checkpoints included. A double click"
        " shows the beginning too."
    )
    return plot("Validation loss", note, xs, Axis("nats per token", format=_later(lines)), lines)


def _later(lines: Sequence[Line]) -> dict[str, Any]:
    """The range of the losses but for the first quarter of each line, and some room."""
    edges = [edge for line in lines for edge in (line.low, line.high)]
    shown = [value for edge in edges for value in edge[len(edge) // 4 :]]
    if not shown:
        return {}
    room = 0.05 * (max(shown) - min(shown))
    return {"range": [min(shown) - room, max(shown) + room]}


def _ends(results: dict[str, Any]) -> str:
    """The last validation loss of every new seed."""
    lines = []
    for index, own in enumerate(results["optimizers"]):
        runs = [run for run in own["runs"] if run["loss"] is not None]
        x, y = [own["name"]] * len(runs), [run["loss"] for run in runs]
        text = [f"seed {run['seed']}" for run in runs]
        color = style(index)["color"]
        lines.append(Line(own["name"], color, [x], y, mode="markers", symbol="line-ew-open", text=text))
    note = "Each new seed at the end: what is compared. Their distances within a column are the noise."
    return plot("Every seed", note, [Axis("")], Axis("nats per token"), lines)


def _tuning(own: Own) -> str:
    """An optimizer's losses against the learning rate, a line for each weight decay."""
    tuning, chosen = own["tuning"], own["best"]
    lines = []
    for index, decay in enumerate(sorted({run["weight_decay"] for run in tuning})):
        runs = sorted(
            (run for run in tuning if run["weight_decay"] == decay and run["loss"] is not None),
            key=lambda run: run["learning_rate"],
        )
        rates = [run["learning_rate"] for run in runs]
        symbol = SYMBOLS[index % len(SYMBOLS)]
        y = [run["loss"] for run in runs]
        look = style(index)
        lines.append(Line(f"weight decay {decay:g}", look["color"], [rates], y, look["dash"], symbol=symbol))
    top = max(run["loss"] for run in tuning if run["loss"] is not None)
    fell = [run for run in tuning if run["loss"] is None]
    if fell:
        rates = [run["learning_rate"] for run in fell]
        text = [f"weight decay {run['weight_decay']:g}" for run in fell]
        lines.append(
            Line(
                "diverged",
                "#808080",
                [rates],
                [top] * len(fell),
                mode="markers",
                symbol="x-thin-open",
                text=text,
            )
        )
    low = min(run["loss"] for run in tuning if run["loss"] is not None)
    best = Line("best", "#808080", [[chosen["learning_rate"]]], [low], mode="markers", symbol="circle-open")
    note = f"Best: learning rate {chosen['learning_rate']:g}, weight decay {chosen['weight_decay']:g}."
    if own["edges"]:
        note += f" At the edge of what was tried: {', '.join(own['edges'])}."
    return plot(own["name"], note, [Axis("learning rate", log=True)], Axis("nats per token"), [*lines, best])


def _tuning_note(results: dict[str, Any]) -> str:
    tuning = results["settings"]["tuning"]
    return paragraph(
        f"Validation loss after {results['settings']['steps']:,} steps with one seed. Each optimizer had"
        f" {tuning['runs']} runs, no more and no less: {tuning['learning_rates']} learning rates around the"
        f" one in conf/optim, each {tuning['ratio']:g} times the one before; then the neighbours of the best"
        " so far in learning rate, outside where it stood at the edge; then those in weight decay; then those"
        " at half the distance, and so on."
    )


def _pairs(results: dict[str, Any]) -> str:
    if not results["pairs"]:
        return paragraph("There was nothing to test.")
    rows = [
        [
            f"{html.escape(pair['first'])} and {html.escape(pair['second'])}",
            f"{pair['difference']:.4f}",
            f"{pair['low']:.4f} to {pair['high']:.4f}",
            html.escape(_p(pair["p"]).removeprefix("= ")),
            html.escape(_p(pair["adjusted"]).removeprefix("= ")),
            "apart" if pair["apart"] else "not told apart",
        ]
        for pair in results["pairs"]
    ]
    head = [
        "the lower mean first",
        "difference",
        f"{1 - LEVEL:.0%} interval, alone",
        "p, alone",
        "p, corrected",
        "",
    ]
    return study_page.table(head, rows)


def _method(results: dict[str, Any]) -> Sequence[str]:
    plan = results["settings"]
    return [
        f"Held equal: model, data and their order, {plan['steps']:,} steps of the same batches, number of"
        f" runs to tune ({plan['tuning']['runs']}, with seed 0). So the axes of steps, tokens and the model's"
        " compute are one up to scale; what an optimizer computes itself shows in the time alone.",
        f"Compared are {plan['seeds']} new runs of each at its best setting, with seeds 1 to {plan['seeds']},"
        " none of which the tuning has seen: the lowest of the runs to tune was chosen for being low, and is"
        " lower than what the setting reaches on average.",
        "Welch's t-test of every pair, two-sided, Holm's correction for all pairs. A winner is named where"
        f" the lowest mean is told apart from every other at the level of {LEVEL:g}: among optimizers that"
        f" are equally good, one is named in at most {LEVEL:.0%} of all comparisons.",
        "The test takes a seed's deviation to be normal, and seeds of two optimizers to be independent. They"
        " are the same seeds, thus the same batches and initial weights: where these move two optimizers the"
        " same way, the test is more careful than it says.",
    ]


def _limits(results: dict[str, Any]) -> Sequence[str]:
    plan = results["settings"]
    extra = {name: plan["overrides"][name] for name in plan["optimizers"] if name in plan["overrides"]}
    own = "; ".join(f"{name}: {', '.join(typed)}" for name, typed in extra.items())
    but = f", but for {own}" if own else ""
    return [
        "The noise is that of seeds at one setting. That another search, or the same with another seed, would"
        " have ended at another setting is not in it.",
        f"Tuned were learning rate and weight decay; all else is as in conf/optim{but}.",
        "What holds for this model, this batch and so few steps need not hold for larger ones.",
        "Loss at an equal time before the end is that of runs whose schedule has not come down yet.",
    ]
