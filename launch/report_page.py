"""The HTML of a report. All text that comes from a run is escaped here."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plotly.offline import get_plotlyjs

from launch import report_events

if TYPE_CHECKING:
    from launch.report import RunRecord

TEMPLATE = Path(__file__).with_name("report_template.html")
NONE = "–"

# Okabe and Ito's colour-blind-safe palette without black and yellow, which vanish on one of the backgrounds.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("solid", "dash", "dot", "dashdot")


def page(
    labels: list[str],
    charts: list[dict[str, Any]],
    summaries: list[dict[str, Any]],
    runs: Sequence[RunRecord],
) -> str:
    """The whole page; the four arguments go run by run."""
    title = labels[0] if len(labels) == 1 else f"{len(labels)} runs"
    parts = {
        "title": html.escape(title),
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "summary": _summary_table(labels, summaries, runs),
        "differences": _differences(labels, runs),
        "samples": "".join(_samples(label, run) for label, run in zip(labels, runs, strict=True)),
        "events": _events(labels, runs),
        "configs": "".join(_config(label, run) for label, run in zip(labels, runs, strict=True)),
        "data": _script_json([chart | style(i) for i, chart in enumerate(charts)]),
        "plotly": get_plotlyjs(),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def style(index: int) -> dict[str, str]:
    """Colour and dash of a run: the dash changes where the colours begin again."""
    return {"color": COLORS[index % len(COLORS)], "dash": DASHES[index // len(COLORS) % len(DASHES)]}


def count(value: float | None) -> str:
    """A number of things: 804352 -> "804 k", 1.23e6 -> "1.23 M", 7e9 -> "7 B"."""
    return _prefixed(value, ("", "k", "M", "B", "T"))


def si(value: float | None, unit: str) -> str:
    """A quantity with an SI prefix: 4.5e15, "FLOP" -> "4.5 PFLOP"."""
    text = _prefixed(value, ("", "k", "M", "G", "T", "P", "E", "Z", "Y"))
    if value is None:
        return text
    return f"{text}{unit}" if text[-1].isalpha() else f"{text} {unit}"


def duration(seconds: float | None) -> str:
    """218.0 -> "3 min 38 s"."""
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole // 60 % 60} min"
    return f"{whole // 86400} d {whole // 3600 % 24} h"


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one of dotted keys."""
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    return {
        key: value
        for name, part in config.items()
        for key, value in flat(part, f"{prefix}.{name}".lstrip(".")).items()
    }


def differing(configs: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Dotted keys whose values are not the same in all configs, with each config's value as text.

    Left out are the keys that name a run, which always differ.
    """
    tables = [{key: json.dumps(value) for key, value in flat(config).items()} for config in configs]
    keys = dict.fromkeys(key for table in tables for key in table if key not in ("name", "directory"))
    rows = {key: [table.get(key, NONE) for table in tables] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _prefixed(value: float | None, prefixes: tuple[str, ...]) -> str:
    if value is None:
        return NONE
    power = 0
    while abs(value) >= 999.5 and power < len(prefixes) - 1:
        value, power = value / 1000, power + 1
    digits = f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"
    return f"{digits} {prefixes[power]}".rstrip()


def _number(format: str) -> Callable[[float | None], str]:
    return lambda value: NONE if value is None else f"{value:{format}}"


def _summary_table(labels: list[str], summaries: list[dict[str, Any]], runs: Sequence[RunRecord]) -> str:
    columns = [_facts(figures, run) for figures, run in zip(summaries, runs, strict=True)]
    rows = {name: [column[name] for column in columns] for name in columns[0]}
    for name in ("Lineage", "Divergence", "Gradient noise scale (tokens)"):
        if set(rows[name]) == {NONE}:
            del rows[name]
    return _table(labels, rows)


def _facts(figures: dict[str, Any], run: RunRecord) -> dict[str, str]:
    """The rows of the summary table: what a row is called, and the run's text in it."""
    machine, model, engine = run.environment, run.model, run.config.get("engine") or {}
    stale = figures["evaluated_at"] not in (None, figures["steps"])
    ranks = machine.get("world_size")
    commit = machine.get("commit") or NONE
    events = run.kind("event")
    return {
        "Status": _status(figures["steps"], figures["planned_steps"], report_events.ending(events)),
        "Lineage": report_events.lineage(events) or NONE,
        "Divergence": report_events.divergence(events) or NONE,
        "Objective": str((run.config.get("objective") or {}).get("_target_") or NONE).rpartition(".")[2],
        "Validation loss (nats per token)": _number(".4f")(figures["loss"])
        + (f" (at step {figures['evaluated_at']:,})" if stale else ""),
        "Unigram model's loss on the same labels": _number(".4f")(figures["unigram_loss"]),
        "Perplexity (per token)": _number(".2f")(figures["perplexity"]),
        "Bits per byte": _beside_gzip(figures["bits_per_byte"], figures["gzip_bits_per_byte"]),
        "gzip -9, bits per byte": _number(".3f")(figures["gzip_bits_per_byte"]),
        "xz -9, bits per byte": _number(".3f")(figures["xz_bits_per_byte"]),
        "Training loss, last logged": _number(".4f")(figures["training_loss"]),
        "Gradient noise scale (tokens)": count(figures["noise_scale"]),
        "Parameters": count(model.get("parameters")),
        "Parameters without embeddings": count(model.get("parameters_without_embeddings")),
        "Tokens trained on": count(figures["tokens"]),
        "Training compute": si(figures["flops"], "FLOP"),
        "Wall-clock": duration(figures["elapsed_s"]),
        "Mean throughput": si(figures["tokens_per_s"], "tokens/s").replace("ktokens", "k tokens"),
        "Mean share of peak": _number(".1%")(figures["peak_share"]),
        "Peak of the machine": si(machine.get("peak_flops_per_s"), "FLOP/s"),
        "Time waiting for data": _number(".2%")(figures["data_wait_share"]),
        "Peak memory, all ranks": si(figures["memory_bytes"], "B"),
        "Device": f"{machine.get('device', NONE)}, {ranks} rank{'s' * (ranks != 1)}" if ranks else NONE,
        "Engine": f"ZeRO-{engine.get('zero_stage', NONE)}, {engine.get('precision', NONE)}",
        "Commit": commit[:12] + (" with changes not committed" if machine.get("dirty") else ""),
        "Command": machine.get("command") or NONE,
    }


def _status(steps: int, planned: int | None, ending: str) -> str:
    if not planned:
        return f"{steps:,} steps, of how many is not recorded"
    if steps >= planned:
        return f"finished, {steps:,} of {planned:,} steps"
    return f"{ending}, {steps:,} of {planned:,} steps ({steps / planned:.0%})"


def _beside_gzip(bits: float | None, gzip_bits: float | None) -> str:
    if bits is None or not gzip_bits:
        return _number(".3f")(bits)
    side = "below" if bits <= gzip_bits else "above"
    return f"{bits:.3f} ({abs(1 - bits / gzip_bits):.0%} {side} gzip)"


def _table(labels: list[str], rows: dict[str, list[str]]) -> str:
    head = "".join(f"<th>{_chip(label, i)}</th>" for i, label in enumerate(labels))
    body = "".join(f"<tr><th>{html.escape(name)}</th>{_cells(values)}</tr>" for name, values in rows.items())
    return (
        f'<div class="wide"><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cells(values: list[str]) -> str:
    return "".join(f"<td>{html.escape(value)}</td>" for value in values)


def _chip(label: str, index: int) -> str:
    return f'<span class="chip" style="background:{style(index)["color"]}"></span>{html.escape(label)}'


def _differences(labels: list[str], runs: Sequence[RunRecord]) -> str:
    if len(runs) == 1:
        return ""
    rows = differing([run.config for run in runs])
    table = _table(labels, rows) if rows else "<p>Nothing: the runs have the same config.</p>"
    return f"<h2>What differs in the configs</h2>{table}"


def _samples(label: str, run: RunRecord) -> str:
    figures = [_sample(record) for record in reversed(run.kind("sample"))]
    if not figures:
        return f"<h3>{html.escape(label)}</h3><p>No samples; evaluation.prompt was not set.</p>"
    older = "".join(figures[1:])
    if older:
        older = f"<details><summary>{len(figures) - 1} earlier</summary>{older}</details>"
    return f"<h3>{html.escape(label)}</h3>{figures[0]}{older}"


def _sample(record: dict[str, Any]) -> str:
    prompt, text = (html.escape(str(record.get(key, ""))) for key in ("prompt", "text"))
    said = "in bold" if prompt.strip() else "is white space" if prompt else "is empty"
    # HTML drops a newline that a pre element begins with: give it one to drop.
    return (
        f"<figure><figcaption>Step {record['step']:,}, the prompt {said}</figcaption>"
        f"<pre>\n<b>{prompt}</b>{text}</pre></figure>"
    )


def _events(labels: list[str], runs: Sequence[RunRecord]) -> str:
    rows = "".join(
        f"<tr><th>{_chip(label, i)}</th>{_event(record)}</tr>"
        for i, (label, run) in enumerate(zip(labels, runs, strict=True))
        for record in run.kind("event")
    )
    head = "<tr><td></td><th>Time</th><th>Step</th><th>Event</th><th>Message</th></tr>"
    return f'<div class="wide"><table class="events"><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _event(record: dict[str, Any]) -> str:
    kind = report_events.mark(record)
    sign = f'<span class="mark {kind}"></span>' if kind else ""
    before = _cells([duration(record["elapsed_s"]), f"{record['step']:,}"])
    what = html.escape(report_events.words(record))
    return f"{before}<td>{sign}{what}</td>{_cells([str(record.get('message', NONE))])}"


def _config(label: str, run: RunRecord) -> str:
    environment = json.dumps(run.environment, indent=2, ensure_ascii=False)
    files = {"config.yaml": run.config_text, "environment.json": environment}
    return "".join(
        f"<details><summary>{html.escape(label)}: {name}</summary><pre>\n{html.escape(text)}</pre></details>"
        for name, text in files.items()
    )


def _script_json(value: Any) -> str:
    """JSON that can stand in a script element: nothing in it closes the element."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")
