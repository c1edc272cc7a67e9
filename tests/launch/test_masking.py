"""The masking study's arithmetic, and the whole of it at the smallest size."""

from __future__ import annotations

import html
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from launch.masking import MASKINGS, differences, interval, page
from tests.tiny import ROOT, corpus, overrides
from tests.train.test_run import SMALL


def test_the_interval_is_students() -> None:
    centre, half = interval([1.0, 2.0, 3.0])
    assert centre == 2.0
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t at 97.5 % with 2 degrees of freedom


def test_differences_are_paired_by_seed() -> None:
    losses = {"random": [3.0, 2.0], "whole word": [2.5, 2.25], "knowledge": [1.0, 1.0]}
    assert differences(losses) == {"whole word": [-0.5, 0.25], "knowledge": [-2.0, -1.0]}


def test_the_page_shows_every_seed_and_each_mean() -> None:
    losses = {"random": [3.0, 2.0], "knowledge": [1.0, 1.5]}
    whole = page({"losses": losses, "overrides": ["seed=<1>"]})
    assert "seed=&lt;1&gt;" in whole and "seed=<1>" not in whole
    text = html.unescape(whole)
    assert '"y": [3.0, 2.0, 1.0, 1.5]' in text and '"y": [2.5, 1.25]' in text
    half = interval(losses["random"])[1]
    assert f"<th>random</th><td>2.5000 ± {half:.4f}</td><td></td>" in text
    assert "<th>knowledge</th><td>1.2500 ± " in text and "<td>-1.2500 ± " in text


def test_the_whole_study(tmp_path: Path) -> None:
    corpus(tmp_path / "text")
    tiny = [one for one in overrides(tmp_path, "experiment=ernie-tiny", *SMALL) if "horizon.steps" not in one]
    command = [sys.executable, "-m", "launch.masking", "--seeds", "2", "--directory", str(tmp_path / "study")]
    settings = ["horizon.steps=2", "engine.ranks=1", "engine.threads=1", "data.validation.share=0.5"]
    done = subprocess.run([*command, *tiny, *settings], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert {name: len(values) for name, values in results["losses"].items()} == dict.fromkeys(MASKINGS, 2)
    assert len({count for counts in results["labels"].values() for count in counts}) == 1  # one task for all
    assert "plotly" in (tmp_path / "study" / "report.html").read_text()
    assert "knowledge" in done.stdout
