"""The transfer certificate: where an optimum is, what is said of its shift, and all of it on tiny runs."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from launch import transfer
from launch.study import Planned, Trained
from launch.transfer import Optimum, Plan, interval, optimum, study, verdict
from launch.transfer_page import finding, page
from tests.tiny import ROOT, corpus

OCTAVES = [-1.0, 0.0, 1.0, 2.0, 3.0]
PLAN: dict[str, Any] = {
    "parametrizations": ["mup", "standard"],
    "widths": [16, 32],
    "depths": None,
    "octaves": OCTAVES,
    "steps": 4,
    "seeds": 1,
    "parallel": 1,
    "trials": "trials",
}


def test_the_vertex_of_a_parabola() -> None:
    found = optimum(OCTAVES, [(octave - 1.3) ** 2 + 2 for octave in OCTAVES])
    assert found.bracketed and found.octave == pytest.approx(1.3)
    uneven = [0.0, 1.0, 3.0]
    assert optimum(uneven, [(octave - 1.3) ** 2 for octave in uneven]).octave == pytest.approx(1.3)


def test_an_optimum_at_the_edge_is_not_bracketed() -> None:
    assert optimum(OCTAVES, [1.0, 2.0, 3.0, 4.0, 5.0]) == Optimum(-1.0, bracketed=False)
    assert optimum(OCTAVES, [5.0, 4.0, 3.0, 2.0, math.inf]) == Optimum(2.0, bracketed=True)


def test_the_interval_is_student_s() -> None:
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        _, low, high = interval(list(random.normal(0.4, 0.2, 4)))
        inside += low <= 0.4 <= high
    assert 930 <= inside <= 970
    assert interval([0.4]) == (0.4, -math.inf, math.inf)


@pytest.mark.parametrize(
    ("shift", "bracketed", "expected"),
    [
        ((0.1, -0.4, 0.6), True, "stays"),
        ((-2.0, -2.5, -1.5), True, "moves"),
        ((0.8, 0.5, 1.1), True, "open"),
        ((0.0, -math.inf, math.inf), True, "open"),
        ((0.1, -0.4, 0.6), False, "not bracketed"),
    ],
)
def test_what_is_said_of_a_shift(shift: tuple[float, float, float], bracketed: bool, expected: str) -> None:
    assert verdict(shift, bracketed) == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"widths": [64]}, r"^widths: \[64\] are not 2 or more different ones"),
        ({"octaves": [0.0, 1.0]}, r"^octaves: .* are not 3 or more"),
        ({"parametrizations": ["wide"]}, "^parametrizations: wide is none of completep, mup, standard"),
        ({"depths": [2, 4]}, "^parametrizations: muP keeps the depth"),
        ({"seeds": 0}, "^seeds: 0 is not positive"),
    ],
)
def test_what_is_no_plan(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**(PLAN | changed))


def composed(folder: Path, *more: str) -> Any:
    given = [
        *("model=gpt-nano", "model.heads=2", "tokenizer=bytes", "data=text"),
        *(f"data.source.paths={folder}/text/*.txt", f"data.directory={folder}/prepared"),
        *("data.validation.share=0.2", "sequence_length=16", "global_batch=4", "schedule.warmup=1"),
        *("widths=[16,32]", "octaves=[0,1,2]", "steps=4", "seeds=1", f"trials={folder}/trials"),
        f"directory={folder}/out",
        *more,
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("transfer", overrides=given)


def test_the_base_is_trained_once_and_the_others_are_scaled_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With planted losses: under standard the optimum falls with the width, under muP it does not."""
    corpus(tmp_path / "text")
    made: list[Planned] = []

    def planted(planned: list[Planned], *_: Any) -> list[Trained]:
        made.extend(planned)
        return [Planted(one, tmp_path, None) for one in planned]

    class Planted(Trained):
        @property
        def loss(self) -> float:
            config = self.planned.config()
            octave = math.log2(config.optim["learning_rate"] / 6e-4)
            width, scaled = config.model["width"], "MuP" in config.parametrization["_target_"]
            best = 3.2 if scaled else 3.2 - 1.5 * math.log2(width / 16)
            return 2 + (octave - best + 0.05 * config.seed) ** 2

    monkeypatch.setattr(transfer, "run_all", planted)
    node = composed(tmp_path, "widths=[16,32,64]", "octaves=[-1,0,1,2,3,4]", "seeds=2")
    results = study(node, Console(file=io.StringIO()))
    assert len(set(made)) == 2 * 6 * (1 + 2 * 2)
    configs = [one.config() for one in set(made)]
    wide = [config for config in configs if "MuP" in config.parametrization["_target_"]]
    assert {config.model["width"] for config in wide} == {32, 64}
    assert all(config.parametrization["base"] == {"width": 16} for config in wide)
    mup, standard = results["parametrizations"]
    assert mup["shift"]["mean"] == pytest.approx(0, abs=1e-6) and mup["verdict"] == "stays"
    assert standard["shift"]["mean"] == pytest.approx(-3) and standard["verdict"] == "moves"
    assert "+0.00" in finding(results)[0] and "moves by more than an octave" in finding(results)[1]
    assert "Learning-rate transfer: mup, standard" in page(results)


def test_depths_have_a_base_of_both_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Planned] = []

    def stop(planned: list[Planned], *_: Any) -> list[Trained]:
        made.extend(planned)
        raise ValueError("seen")

    monkeypatch.setattr(transfer, "run_all", stop)
    corpus(tmp_path / "text")
    node = composed(tmp_path, "depths=[1,3]", "parametrizations=[completep]", "model.width=32")
    with pytest.raises(ValueError, match="^seen"):
        study(node, Console(file=io.StringIO()))
    deep = [one.config() for one in made if "layers3" in one.name]
    assert all(config.parametrization["base"] == {"width": 32, "layers": 1} for config in deep)


def test_the_whole_of_it(tmp_path: Path) -> None:
    corpus(tmp_path / "text")
    given = [
        *("model=gpt-nano", "model.heads=2", "tokenizer=bytes", "data=text"),
        *(f"data.source.paths={tmp_path}/text/*.txt", f"data.directory={tmp_path}/prepared"),
        *("data.validation.share=0.2", "sequence_length=16", "global_batch=4", "schedule.warmup=1"),
        *("widths=[16,32]", "octaves=[0,2,4]", "parametrizations=[mup]", "steps=4", "seeds=1"),
        *(f"trials={tmp_path}/trials", f"directory={tmp_path}/out", "parallel=2"),
    ]
    command = [sys.executable, "-m", "launch.transfer", *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (mup,) = results["parametrizations"]
    losses = np.array([one["losses"] for one in mup["sizes"]])
    assert losses.shape == (2, 1, 3) and np.isfinite(losses).all()
    assert len(set(losses.flatten())) == 6
    assert "<html" in (tmp_path / "out" / "report.html").read_text()[:200]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "6 of 6 runs: trained before" in again.stdout
    wrong = subprocess.run(
        [*command, "parametrization=mup"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert wrong.returncode != 0 and wrong.stderr.startswith("error: parametrization: is set by the study")
