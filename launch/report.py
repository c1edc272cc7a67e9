"""One self-contained HTML page about one run or several: curves, figures, differences, samples.

    python -m launch.report runs/a runs/b [--output FILE]

It is written to <run>/report.html; of several runs, to report.html in the folder that holds them all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data.cli import one_line, one_line_errors
from data.files import write
from launch.report_events import mark, marks, tokens_after
from launch.report_page import page
from train.records import read_metrics
from train.rundir import RunDir

X_AXES = ("step", "tokens", "flops", "elapsed_s")
NUMBERS = {
    "train": (
        "loss",
        "learning_rate",
        "gradient_norm",
        "tokens_per_s",
        "flops_per_s",
        "peak_share",
        "memory_bytes",
        "data_wait_share",
    ),
    "eval": ("loss", "perplexity", "bits_per_byte"),
    "noise": ("scale",),
}
SHARE = "share/"  # begins the keys of a train record that hold a part's share of the samples so far


@dataclass(frozen=True)
class RunRecord:
    """What a run's directory tells. `label` names it on the page; `config_text` is the file itself."""

    label: str
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    model: dict[str, Any]
    records: list[dict[str, Any]]

    def kind(self, kind: str) -> list[dict[str, Any]]:
        """The records of one kind, in the order in which they were written."""
        return [record for record in self.records if record["kind"] == kind]

    def columns(self, kind: str) -> dict[str, list[float | None]]:
        """The numbers of one kind of record as columns, beside the four x axes."""
        return {key: [record.get(key) for record in self.kind(kind)] for key in (*X_AXES, *NUMBERS[kind])}

    def shares(self) -> dict[str, list[float | None]]:
        """Of each part of a mixture its share of the samples so far, as a column beside those of "train"."""
        records = self.kind("train")
        keys = dict.fromkeys(key for record in records for key in record if key.startswith(SHARE))
        return {key.removeprefix(SHARE): [record.get(key) for record in records] for key in keys}


class NoMeasurement(ValueError):
    """A run that has not come to its first log line."""


def report(directories: list[Path], output: Path | None = None) -> Path:
    """Write the page about the runs in `directories`; returns its path.

    Raises ValueError in one line where a directory is not a run's, a file cannot be read, or the page cannot
    be written. Nothing is written then.
    """
    directories = list({directory.resolve(): directory for directory in directories}.values())
    for directory in directories:
        if not directory.is_dir():
            raise ValueError(f"{directory}: no such directory; name directories of runs")
    parent = Path(os.path.commonpath([directory.resolve().parent for directory in directories]))
    if output is None:
        output = RunDir(directories[0]).report if len(directories) == 1 else _shown(parent) / "report.html"
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"{output}: cannot be written; name a file in a folder that exists with --output")
    runs = []
    for directory in directories:
        try:
            runs.append(read_run(directory, str(directory.resolve().relative_to(parent))))
        except NoMeasurement as error:
            if len(directories) == 1:
                raise
            print(f"{error}; left out", file=sys.stderr)
    if not runs:
        raise ValueError("no run holds a measurement yet; report one that has trained for some steps")
    text = page([run.label for run in runs], chart_data(runs), [summary(run) for run in runs], runs)
    try:
        write(output, text)
    except OSError as error:
        raise ValueError(f"{output}: cannot be written ({error.strerror}); choose another --output") from None
    return output


def read_run(directory: Path, label: str) -> RunRecord:
    """Read a run's directory; the files that a run writes only when training starts may be missing.

    Raises ValueError in one line that begins with the path of what is wrong.
    """
    rundir = RunDir(directory)
    if not rundir.config.is_file():
        raise ValueError(
            f"{directory}: not a run's directory, for it holds no config.yaml; name one such as runs/demo"
        )
    config_text = _text(rundir.config)
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError as error:
        raise ValueError(f"{rundir.config}: is not YAML: {one_line(error)}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{rundir.config}: is not the config of a run")
    return RunRecord(
        label, config, config_text, _json(rundir.environment), _json(rundir.model), _records(rundir.metrics)
    )


def chart_data(runs: list[RunRecord]) -> list[dict[str, Any]]:
    """What the page's curves are drawn from: one dictionary a run."""
    return [
        {
            "label": run.label,
            "train": run.columns("train"),
            "eval": run.columns("eval"),
            "noise": run.columns("noise"),
            "shares": run.shares(),
            "baseline": _last(run, "baseline"),
            "marks": marks(run.kind("event"), X_AXES),
        }
        for run in runs
    ]


def summary(run: RunRecord) -> dict[str, Any]:
    """The figures of a run in the units of metrics.jsonl; None where they were not recorded."""
    train, evaluation, baseline = run.kind("train"), _last(run, "eval"), _last(run, "baseline")
    # What a divergence was found in was not trained on, and may have been rolled back.
    trained = [record for record in run.records if mark(record) != "divergence"]
    return {
        "steps": max(record["step"] for record in trained),
        "planned_steps": run.environment.get("total_steps") or (run.config.get("horizon") or {}).get("steps"),
        "evaluated_at": evaluation.get("step"),
        "loss": evaluation.get("loss"),
        "perplexity": evaluation.get("perplexity"),
        "bits_per_byte": evaluation.get("bits_per_byte"),
        "unigram_loss": baseline.get("unigram_loss"),
        "gzip_bits_per_byte": baseline.get("gzip_bits_per_byte"),
        "xz_bits_per_byte": baseline.get("xz_bits_per_byte"),
        "noise_scale": _last(run, "noise").get("scale"),
        "training_loss": train[-1].get("loss") if train else None,
        "tokens": max(record["tokens"] for record in trained),
        "flops": max(record["flops"] for record in trained),
        "elapsed_s": max(record["elapsed_s"] for record in run.records),
        "memory_bytes": max((m for r in train if (m := r.get("memory_bytes")) is not None), default=None),
        **_rates(run),
    }


def _rates(run: RunRecord) -> dict[str, float | None]:
    """Means over training time, which leaves out start, evaluation and checkpoints.

    A train record is about the tokens since the one before it, or since the run was started, continued or
    rolled back.
    """
    tokens = seconds = waited = shared = peak = since = 0.0
    for record in run.records:
        rate = record.get("tokens_per_s")
        if record["kind"] == "train" and rate:
            window = (record["tokens"] - since) / rate
            tokens, seconds = tokens + record["tokens"] - since, seconds + window
            waited += window * (record.get("data_wait_share") or 0)
            if record.get("peak_share") is not None:
                shared, peak = shared + window, peak + window * record["peak_share"]
        if record["kind"] == "train":
            since = record["tokens"]
        elif record["kind"] == "event" and (begun := tokens_after(record)) is not None:
            since = begun
    return {
        "tokens_per_s": tokens / seconds if seconds else None,
        "peak_share": peak / shared if shared else None,
        "data_wait_share": waited / seconds if seconds else None,
    }


def _last(run: RunRecord, kind: str) -> dict[str, Any]:
    return next((record for record in reversed(run.records) if record["kind"] == kind), {})


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        records = read_metrics(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {one_line(error)}") from None
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or not all(_is_number(record.get(key)) for key in X_AXES):
            raise ValueError(
                f"{path}: line {number} is not a record of a run; it lacks one of {', '.join(X_AXES)}"
            )
    if not any(record.get("kind") in NUMBERS for record in records):
        raise NoMeasurement(f"{path}: holds no measurement yet; report a run that has trained for some steps")
    return records


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: is not JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is not what a run writes")
    return content


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {one_line(error)}") from None


def _shown(path: Path) -> Path:
    """Relative to the working directory where it lies below it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m launch.report", description="One self-contained HTML page about one run or several."
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's directory, such as runs/demo"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="default: RUN/report.html; of several runs, report.html in the folder that holds them all",
    )
    arguments = parser.parse_args()
    print(f"report: {report(arguments.runs, arguments.output)}")


if __name__ == "__main__":
    main()
