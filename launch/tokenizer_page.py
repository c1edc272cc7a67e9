"""The HTML of a tokenizer study."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

import yaml

from launch import study_page
from launch.report_page import NONE, count, si, style
from launch.study_page import Axis, Line, bullets, chip, folded, paragraph, plot, plots, section

LEAST_SHARE = 0.01  # of the held-out bytes, below which a source or language is not shown by itself

Own = dict[str, Any]  # what results.json says of one tokenizer


def page(results: dict[str, Any]) -> str:
    """The whole page about what `launch.tokenizers.study` gives."""
    tokenizers = results["tokenizers"]
    settings = yaml.safe_dump({key: results[key] for key in ("settings", "run")}, sort_keys=False)
    body = [
        paragraph(finding(results), "lead"),
        plots(_plots(tokenizers)),
        section("Tokenizers", _table(tokenizers)),
        _equal(results),
        _groups(results, "source", "By source"),
        _groups(results, "language", "By language"),
        section("Settings", folded("of the study and its runs", settings)),
    ]
    title = f"Tokenizers on {results['run']['data']['name']}"
    return study_page.page(title, "tokenizer study", "".join(body))


def bits(own: Own) -> list[float]:
    """Bits per byte of each seed."""
    return [run["bits_per_byte"] for run in own["runs"]]


def finding(results: dict[str, Any]) -> str:
    """In a sentence or two: which tokenizer that loses no text came first, and whether the seeds tell it
    apart from the second."""
    ranked = sorted(
        (own for own in results["tokenizers"] if own["lossless"]), key=lambda own: mean(bits(own))
    )
    if not ranked:
        return "Every tokenizer here loses part of the text, so their bits per byte cannot be compared."
    first = f"Fewest bits per byte: {ranked[0]['name']}, {mean(bits(ranked[0])):.4f}."
    if results["settings"]["seeds"] == 1:
        return f"{first} There was one seed, so nothing says how much of a difference is chance."
    if not ranked[1:]:
        return first
    second = ranked[1]
    apart = max(bits(ranked[0])) < min(bits(second))
    said = "each of its seeds is below each of" if apart else "its seeds overlap those of"
    return f"{first} Second is {second['name']}, {mean(bits(second)):.4f}: {said} the second's."


def lines(tokenizers: Sequence[Own]) -> dict[str, list[Line]]:
    """Against the vocabulary a line for each algorithm: bits per byte, from the lowest seed to the highest,
    and bytes per token."""
    drawn: dict[str, list[Line]] = {"bits": [], "bytes": []}
    for index, algorithm in enumerate(dict.fromkeys(own["algorithm"] for own in tokenizers)):
        found = [own for own in tokenizers if own["algorithm"] == algorithm]
        found.sort(key=lambda own: own["vocabulary_size"])
        lossless = all(own["lossless"] for own in found)
        line = Line(
            algorithm if lossless else f"{algorithm} (loses text)",
            style(index)["color"],
            [[own["vocabulary_size"] for own in found]],
            [own["bytes_per_token"] for own in found],
            dash="solid" if lossless else "dot",
            symbol="circle" if lossless else "circle-open",
        )
        drawn["bytes"].append(line)
        of_seeds = [bits(own) for own in found]
        low, high = [min(seeds) for seeds in of_seeds], [max(seeds) for seeds in of_seeds]
        drawn["bits"].append(replace(line, y=[mean(seeds) for seeds in of_seeds], low=low, high=high))
    return drawn


def _plots(tokenizers: Sequence[Own]) -> list[str]:
    drawn, sizes = lines(tokenizers), sorted({own["vocabulary_size"] for own in tokenizers})
    apart = [size for i, size in enumerate(sizes) if i == 0 or size > 1.15 * sizes[i - 1]]  # to be legible
    ticks = {"tickmode": "array", "tickvals": apart, "ticktext": [f"{size:,}" for size in apart]}
    vocabulary = [Axis("vocabulary", log=True, format=ticks)]
    of_bits = "Of a small model. Mean of the seeds, and from the lowest to the highest; lower is better."
    of_bytes = "Higher: the same text in fewer tokens."
    from_zero = Axis("bytes per token", format={"rangemode": "tozero"})
    return [
        plot("Bits per byte of held-out text", of_bits, vocabulary, Axis("bits per byte"), drawn["bits"]),
        plot("Bytes per token of held-out text", of_bytes, vocabulary, from_zero, drawn["bytes"]),
    ]


def _table(tokenizers: Sequence[Own]) -> str:
    algorithms = list(dict.fromkeys(own["algorithm"] for own in tokenizers))
    colors = {algorithm: style(index)["color"] for index, algorithm in enumerate(algorithms)}
    columns: dict[str, Callable[[Own], str]] = {
        "vocabulary": lambda own: f"{own['vocabulary_size']:,}",
        "bits per byte": _bits_cell,
        "bytes per token": lambda own: f"{own['bytes_per_token']:.3f}",
        "bytes spelled": lambda own: _share(own["spelled_share"]),
        "unknown tokens": lambda own: _share(own["unknown_share"]),
        "vocabulary used": lambda own: f"{own['used_share']:.1%}",
        "encoding, MB/s": lambda own: f"{own['megabytes_per_s']:.1f}",
        "times the first": lambda own: f"{own['relative_speed']:.2f}",
        "tokens a sequence": lambda own: f"{own['sequence_length']:,}",
        "parameters": lambda own: count(own["runs"][0]["parameters"]),
        "without tables": lambda own: count(own["runs"][0]["parameters_without_embeddings"]),
        "training compute": lambda own: si(own["runs"][0]["flops"], "FLOP"),
    }
    rows = []
    for own in tokenizers:
        rows.append([chip(colors[own["algorithm"]], own["name"]), *(cell(own) for cell in columns.values())])
    note = (
        '<p class="faint">* loses part of the text, and has less to predict: its bits per byte do not'
        " compare. Bytes spelled: those in whose place a token stands that spells just them. Vocabulary used:"
        " what the training text holds of it. Encoding: on all cores of this machine, the tokenizers taking"
        " turns; the best turn, and the median ratio to the first.</p>"
    )
    return study_page.table(["", *columns], rows) + note


def _bits_cell(own: Own) -> str:
    values = bits(own)
    star = "" if own["lossless"] else "*"
    range_ = f"{min(values):.4f} to {max(values):.4f}" if values[1:] else "one seed"
    return f'{mean(values):.4f}{star}<br><span class="range">{range_}</span>'


def _share(share: float) -> str:
    """A share that reads as 0 or 100 % only where it is."""
    if 0 < share < 0.00005:
        return "&lt;0.01%"
    return "&gt;99.99%" if 0.99995 <= share < 1 else f"{share:.2%}"


def _equal(results: dict[str, Any]) -> str:
    plan, run, tokenizers = results["settings"], results["run"], results["tokenizers"]
    seen = [own["bytes_seen"] for own in tokenizers]
    evaluated = {run["bytes_evaluated"] for own in tokenizers for run in own["runs"]}
    without = {run["parameters_without_embeddings"] for own in tokenizers for run in own["runs"]}
    context, batch = plan["context_bytes"], run["global_batch"]
    held = [
        f"{plan['steps']:,} steps of {batch} sequences, each of about {context:,} bytes of text: in a run"
        f" {si(min(seen), 'B')} to {si(max(seen), 'B')}, which differ by {max(seen) / min(seen) - 1:.2%}"
        " because sequences are whole tokens. So contexts are equally long in bytes, not in tokens.",
        f"The model without its token table: {' or '.join(map(count, sorted(without)))} parameters; the"
        " learning rate, its schedule, the optimizer and the seeds.",
        f"The held-out text that is scored: {' or '.join(si(n, 'B') for n in sorted(evaluated))}, and with"
        " each document the end-of-text token that it costs.",
    ]
    unequal = [
        "Vocabularies, and with them the token table that is also the head, parameters and compute.",
        "Tokens in a sequence and in a run: a tokenizer with longer tokens takes less compute.",
    ]
    noise = "One seed each: nothing here says how large the noise is."
    if plan["seeds"] > 1:
        noise = (
            f"Each was trained with {plan['seeds']} seeds. The range is from the lowest to the highest of"
            " them: a rough picture of the noise. Models are small and briefly trained, and which vocabulary"
            " is best changes with model and data."
        )
    equal, other = section("What was held equal", bullets(held)), section("What was not", bullets(unequal))
    return equal + other + section("Noise", paragraph(noise))


def _groups(results: dict[str, Any], kind: str, title: str) -> str:
    """Bytes per token of every source or language that is more than a trace; the best in bold."""
    tokenizers, whole = results["tokenizers"], results["held_out"]["bytes"]
    sizes = sorted(results["held_out"][f"by_{kind}"].items(), key=lambda item: (-item[1], item[0]))
    rows, left_out = [], 0
    for name, size in sizes:
        if size < LEAST_SHARE * whole:
            left_out += 1
            continue
        values = [own[f"by_{kind}"][name] for own in tokenizers]
        most = max((v for v, own in zip(values, tokenizers, strict=True) if own["lossless"]), default=None)
        cells = (f"<b>{value:.3f}</b>" if value == most else f"{value:.3f}" for value in values)
        rows.append([html.escape(name), f"{size / whole:.1%}", *cells])
    note = "Bytes per token; in bold the highest of those that lose no text. * loses part of the text."
    if left_out:
        note += f" {left_out} with less than {LEAST_SHARE:.0%} of the held-out text each are left out."
    if kind == "language":
        guessed = results["held_out"]["languages_guessed"]
        note += " A language that documents do not tell is guessed." if guessed else ""
    names = (html.escape(own["name"]) + ("" if own["lossless"] else "*") for own in tokenizers)
    head = [kind, "held-out text", *names]
    return section(title, paragraph(note, "faint"), study_page.table(head, rows)) if rows else NONE
