"""The comparison of optimizers: its statistics by simulation, its search, and the whole of it, killed too."""

from __future__ import annotations

import io
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console
from scipy.stats import binom, ttest_ind

from data.cli import one_line
from launch.compare import OWN, TUNING_SEED, study, table
from launch.compare_page import finding, page
from launch.overrides import refuse
from launch.statistics import LEVEL, compared, holm, winner
from launch.tuning import Point, best, edges, following
from tests.tiny import ROOT, corpus
from train.config import load
from train.records import read_metrics

SIMULATED = 1500


def simulated(
    means: list[float], deviations: list[float], seeds: int, shared: float = 0.0
) -> tuple[int, int]:
    """In how many comparisons of made-up losses a winner is named, and two of the same mean are told apart.

    shared: standard deviation of what the same seed adds to the loss of each.
    """
    random = np.random.default_rng(0)
    named = wrong = 0
    for _ in range(SIMULATED):
        seed = shared * random.standard_normal(seeds)
        samples = {
            str(number): mean + deviation * random.standard_normal(seeds) + seed
            for number, (mean, deviation) in enumerate(zip(means, deviations, strict=True))
        }
        pairs = compared(samples)
        named += winner(pairs) is not None
        wrong += any(pair.apart and means[int(pair.first)] == means[int(pair.second)] for pair in pairs)
    return named, wrong


@pytest.mark.parametrize(
    ("means", "deviations", "seeds", "shared"),
    [
        ([3.0, 3.0], [0.01, 0.01], 5, 0.0),
        ([3.0, 3.0], [0.01, 0.01], 2, 0.0),
        ([3.0, 3.0], [0.01, 0.05], 5, 0.0),
        ([3.0, 3.0], [0.01, 0.01], 5, 0.02),
        ([3.0] * 5, [0.01, 0.02, 0.03, 0.01, 0.05], 5, 0.0),
        ([3.0, 3.0, 3.5, 3.6, 3.7], [0.01] * 5, 5, 0.0),  # the best two are equal, the others are not
    ],
)
def test_without_a_difference_a_winner_is_named_in_one_of_twenty_at_most(
    means: list[float], deviations: list[float], seeds: int, shared: float
) -> None:
    named, wrong = simulated(means, deviations, seeds, shared)
    most = binom.ppf(0.999, SIMULATED, LEVEL)  # of which a rate of LEVEL stays below in 999 of 1000
    assert named <= most and wrong <= most
    if (means, shared, seeds) == ([3.0, 3.0], 0.0, 5):  # nor is the test more careful than it says
        assert named >= binom.ppf(0.001, SIMULATED, 0.75 * LEVEL)


def test_a_difference_of_five_deviations_is_found() -> None:
    named, _ = simulated([3.0, 3.05, 3.05, 3.05, 3.05], [0.01] * 5, 5)
    assert named > 0.95 * SIMULATED


def test_pairs_are_those_of_scipy_and_holm() -> None:
    samples = {"b": [3.2, 3.21, 3.25], "a": [3.0, 3.1, 3.2], "c": [3.5, 3.6, 3.7]}
    pairs = compared(samples)
    assert [(pair.first, pair.second) for pair in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    for pair in pairs:
        test = ttest_ind(samples[pair.second], samples[pair.first], equal_var=False)
        assert pair.p == pytest.approx(test.pvalue)
        assert (pair.low, pair.high) == pytest.approx(tuple(test.confidence_interval()))
        assert pair.difference == pytest.approx(np.mean(samples[pair.second]) - np.mean(samples[pair.first]))
    assert [pair.adjusted for pair in pairs] == pytest.approx(holm([pair.p for pair in pairs]))
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == pytest.approx([1.0, 1.0])


def test_without_noise_or_company_there_is_no_winner() -> None:
    (pair,) = compared({"a": [1.0, 1.0], "b": [2.0, 2.0]})
    assert (pair.p, pair.low, pair.high) == (1.0, 1.0, 1.0) and winner([pair]) is None
    assert compared({"a": [1.0, 2.0]}) == [] and winner([]) is None


def searched(loss: Callable[[float, float], float], runs: int, decays: bool = True) -> dict[Point, float]:
    losses: dict[Point, float] = {}
    while points := following(losses, runs, 5, decays):
        assert not losses.keys() & set(points)
        losses |= {point: loss(*point) for point in points}
    assert len(losses) == runs
    return losses


def test_the_search_begins_with_a_row_and_goes_on_around_the_best() -> None:
    found = list(searched(lambda x, y: (x - 1) ** 2 + y**2, 12))
    assert found[:5] == [(-2, 0), (-1, 0), (0, 0), (1, 0), (2, 0)]
    assert found[5:7] == [(1, -1), (1, 1)]
    assert found[7:11] == [(0.5, 0), (1.5, 0), (1, -0.5), (1, 0.5)]
    assert found[11] == (0.75, 0)


def test_the_search_leaves_the_edge_within_the_same_number_of_runs() -> None:
    inside = searched(lambda x, y: abs(x) + abs(y), 12)
    outside = searched(lambda x, y: abs(x - 4) + abs(y) / 9, 12)
    far = searched(lambda x, y: -x, 12)
    assert len(inside) == len(outside) == len(far)
    assert (best(inside), edges(inside)) == ((0, 0), [])
    assert (best(outside), edges(outside)) == ((4, 0), []) and edges(far) == ["highest learning rate"]


def test_without_a_weight_decay_only_the_learning_rate_is_searched_for() -> None:
    found = searched(lambda x, y: x**2, 9, decays=False)
    assert {y for _, y in found} == {0} and edges(found) == []


def test_where_all_diverges_the_search_goes_down() -> None:
    found = searched(lambda x, y: math.inf, 8)
    assert best(found) == (-5, 0) and edges(found)[0] == "lowest learning rate"


def arguments(folder: Path, name: str) -> list[str]:
    """Of the smallest comparison: 2 optimizers, 2 learning rates, 2 seeds."""
    data = f"data.source.paths={folder}/text/*.txt", f"data.directory={folder}/prepared"
    split = "data.validation._target_=data.split.ByDocument", "data.validation.share=0.2"
    small = "tokenizer=bytes", "model.layers=1", "model.width=32", "model.heads=2", "sequence_length=32"
    few = "steps=4", "seeds=2", "tuning.runs=2", "tuning.learning_rates=2", "evaluation.every=2"
    own = f"directory={folder}/{name}", f"trials={folder}/{name}/trials", "checkpoint.every=1"
    return [
        "data=text",
        *data,
        *split,
        *small,
        *few,
        *own,
        "global_batch=4",
        "optimizers=[adamw,schedule-free]",
    ]


def begun(*given: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.compare", *given]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare")
    corpus(path / "text", documents=12)
    return path


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    process = begun(*arguments(folder, "whole"))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "2 optimizers x (2 runs to tune + 2 seeds) = 8 runs of 4 steps, " in out
    assert str(folder / "whole" / "report.html") in out
    found = json.loads((folder / "whole" / "results.json").read_text())
    assert " ".join(finding(found).split()) in " ".join(out.split())
    assert "Optimizers: adamw, schedule-free" in (folder / "whole" / "report.html").read_text()
    return found


def test_the_figures_are_those_of_the_runs(results: dict[str, Any]) -> None:
    assert [own["name"] for own in results["optimizers"]] == ["adamw", "schedule-free"]
    for own, rate, schedule in zip(
        results["optimizers"], (6e-4, 2.5e-3), ("Cosine", "Constant"), strict=True
    ):
        assert [run["learning_rate"] for run in own["tuning"]] == [float(f"{rate / 3:.3g}"), rate]
        assert {run["weight_decay"] for run in own["tuning"]} == {0.1}
        lowest = min(own["tuning"], key=lambda run: run["loss"])
        assert own["best"] == {key: lowest[key] for key in ("learning_rate", "weight_decay")}
        for run in (*own["tuning"], *own["runs"]):
            records = [
                r for r in read_metrics(Path(run["directory"]) / "metrics.jsonl") if r["kind"] == "eval"
            ]
            assert run["loss"] == records[-1]["loss"] and records[-1]["step"] == 4
        for run in own["runs"]:
            config = load(Path(run["directory"]) / "config.yaml")
            assert config.optim["learning_rate"] == own["best"]["learning_rate"]
            assert config.schedule["_target_"].endswith(schedule) and config.schedule["warmup"] == 0.1
            assert run["curve"]["step"] == [2, 4] and run["curve"]["tokens"] == [256, 512]
    pairs = compared({own["name"]: [run["loss"] for run in own["runs"]] for own in results["optimizers"]})
    assert results["winner"] == winner(pairs) and results["pairs"][0]["adjusted"] == pairs[0].adjusted


def test_no_seed_that_is_compared_was_tuned_with(results: dict[str, Any]) -> None:
    for own in results["optimizers"]:
        seeds = [
            [load(Path(run["directory"]) / "config.yaml").seed for run in own[part]]
            for part in ("tuning", "runs")
        ]
        assert set(seeds[0]) == {TUNING_SEED} and seeds[1] == [1, 2]


def without_time(results: dict[str, Any], name: str) -> str:
    """What two studies have in common that differ in their speed and their directories."""
    for own in results["optimizers"]:
        for run in own["runs"]:
            del run["curve"]["elapsed_s"]
    return json.dumps(results).replace(f"/{name}/", "/")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_study_that_was_killed_and_stopped_ends_with_the_same_table(
    folder: Path, results: dict[str, Any]
) -> None:
    """Two of its runs are still to be made: it is killed in the one, and stopped in the other."""
    trials = folder / "killed" / "trials"
    shutil.copytree(folder / "whole" / "trials", trials)
    left = [
        trials / Path(run["directory"]).name
        for run in (results["optimizers"][0]["tuning"][1], results["optimizers"][1]["runs"][1])
    ]
    for run in left:
        shutil.rmtree(run)
    given = [*arguments(folder, "killed"), "parallel=1"]
    for run, number, code in zip(left, (signal.SIGKILL, signal.SIGTERM), (-signal.SIGKILL, 75), strict=True):
        process = begun(*given)
        try:
            wait_for(lambda run=run: bool(read_metrics(run / "metrics.jsonl")))  # type: ignore[misc]
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == code, err
        assert ("stopped; the same command goes on from here" in out) == (code == 75)
    process = begun(*given)
    assert process.wait() == 0
    again = json.loads((folder / "killed" / "results.json").read_text())
    assert again.pop("parallel") == 1 and again["settings"].pop("parallel") == 1
    assert again["settings"].pop("trials") == str(trials)
    expected = json.loads(json.dumps(results))
    del expected["parallel"], expected["settings"]["parallel"], expected["settings"]["trials"]
    assert without_time(again, "killed") == without_time(expected, "whole")


def made(name: str, losses: Sequence[float | None]) -> dict[str, Any]:
    curve = {key: [1.0, 2.0] for key in ("step", "tokens", "flops", "elapsed_s")}
    runs: list[dict[str, Any]] = [
        {
            "seed": seed,
            "loss": loss,
            "diverged": None if loss else "the loss is nan",
            "directory": f"runs/{name}",
            "curve": {**curve, "loss": [loss + 1, loss]} if loss else {key: [] for key in (*curve, "loss")},
        }
        for seed, loss in enumerate(losses, 1)
    ]
    setting = {"learning_rate": 1e-3, "weight_decay": 0.1}
    outcome = {"diverged": None, "directory": f"runs/{name}"}
    return {
        "name": name,
        "best": setting,
        "edges": ["highest learning rate"] if name == "lion" else [],
        "tuning": [
            {**setting, **outcome, "loss": 3.0},
            {**setting, **outcome, "learning_rate": 1.0, "loss": None, "diverged": "the loss is nan"},
        ],
        "runs": runs,
    }


def made_results(*optimizers: dict[str, Any]) -> dict[str, Any]:
    seeds = len(optimizers[0]["runs"])
    losses = {own["name"]: [run["loss"] for run in own["runs"]] for own in optimizers}
    whole = {name: values for name, values in losses.items() if None not in values}
    pairs = compared(whole) if seeds > 1 else []
    return {
        "settings": {
            "optimizers": list(losses),
            "overrides": {"soap": ["optim.<b>=1"]},
            "steps": 1000,
            "seeds": seeds,
            "tuning": {"runs": 12, "learning_rates": 5, "ratio": 3.0},
        },
        "run": ["model=gpt-nano"],
        "parallel": 2,
        "optimizers": list(optimizers),
        "pairs": [{**vars(pair), "apart": pair.apart} for pair in pairs],
        "winner": winner(pairs),
    }


NEAR, FAR = [3.0, 3.01, 3.02], [4.0, 4.01, 4.02]


@pytest.mark.parametrize(
    ("optimizers", "words"),
    [
        (
            [made("soap", NEAR), made("lion", FAR)],
            "soap wins: it has the lowest mean validation loss, 3.0100 nats",
        ),
        ([made("soap", NEAR), made("lion", FAR)], "The nearest is lion, 1.0000 above it"),
        (
            [made("soap", NEAR), made("lion", [3.0, 3.02, 3.03]), made("adamw", FAR)],
            "No winner: soap has the lowest mean validation loss, 3.0100 nats per token after 1,000 steps,"
            " but its seeds do not tell it apart from lion (p = 0.57). It is better than adamw.",
        ),
        ([made("soap", [3.0]), made("lion", [4.0])], "No winner: soap has the lowest validation loss"),
        ([made("soap", [3.0]), made("lion", [4.0])], "so nothing says how much of a difference is chance"),
        (
            [made("soap", NEAR), made("lion", FAR), made("adamw", [2.0, None, 2.0])],
            "Left out, for a seed at its best setting diverged: adamw.",
        ),
        ([made("soap", NEAR), made("adamw", [2.0, None, 2.0])], "No winner: there are no two optimizers"),
    ],
)
def test_the_finding(optimizers: list[dict[str, Any]], words: str) -> None:
    assert words in finding(made_results(*optimizers))


def test_the_page_escapes_and_shows_what_diverged_and_stood_at_the_edge() -> None:
    fell = made("adamw", [2.0, None, 2.0])
    text = page(made_results(made("soap", NEAR), made("lion", FAR), fell))
    shown = text.split("<script>")[0]
    assert "1 of 3 seeds diverged" in shown and "12, 1 diverged" not in shown and "2, 1 diverged" in shown
    assert "At the edge of what was tried: highest learning rate." in shown
    assert "soap: optim.&lt;b&gt;=1" in shown and "<b>=1" not in shown
    assert "with seeds 1 to 3" in shown and "in at most 5% of all comparisons" in shown
    assert "https://" not in shown and "plotly" in text
    assert (
        page(made_results(made("soap", [3.0]), made("lion", [None]))).count("There was nothing to test.") == 1
    )


def test_the_table_has_a_row_for_each_optimizer() -> None:
    console = Console(width=90, record=True, file=io.StringIO())
    console.print(table(made_results(made("soap", NEAR), made("lion", [3.0, None, 3.0]))))
    text = console.export_text()
    assert "3.0100 ± 0.0100" in text and "1 of 3 seeds diverged" in text


def composed(*given: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("compare", overrides=list(given))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("optimizers=[adamw]", "optimizers: ['adamw'] are not two or more; name each once"),
        ("optimizers=[adamw,adamw]", "optimizers: ['adamw', 'adamw'] are not two or more; name each once"),
        ("optimizers=[adamw,lions]", "optimizers: lions is none of adabound, adafactor, adamw, "),
        ('+overrides.lions=["optim.eps=1"]', "overrides: lions is none of adabound, adafactor, adamw, "),
        (
            '+overrides.lion=["seed=1"]',
            "overrides.lion: seed=1 is neither a setting of the optimizer (optim.…) nor",
        ),
        ('+overrides.lion=["optim=sgd"]', "overrides.lion: optim=sgd is neither a setting"),
        ('+overrides.lion=["optim.beta=1"]', "optim.beta: no such key; did you mean optim.betas?"),
        ("steps=0", "steps: 0 is not positive; give a larger number"),
        ("seeds=many", "seeds: Value 'many' of type 'str' could not be converted to Integer"),
        ("parallel=0", "parallel: 0 is not positive; give a larger number"),
        ("tuning.runs=3", "tuning.learning_rates: 5 is not from 1 to tuning.runs, 3"),
        ("tuning.ratio=1", "tuning.ratio: 1.0 is not above 1; give for example 3"),
        ("model.width=0", "model.width: 0"),
    ],
)
def test_a_wrong_key_is_one_line(given: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(Exception) as caught:
        study(composed(given, f"trials={tmp_path}/trials", f"data.directory={tmp_path}"), Console(quiet=True))
    assert one_line(caught.value).startswith(line)
    assert not (tmp_path / "trials").exists()


@pytest.mark.parametrize(
    ("given", "instead"),
    [("optim=lion", "optimizers and overrides"), ("seed=3", "seeds"), ("horizon.steps=3", "steps")],
)
def test_keys_are_refused_that_the_study_sets(given: str, instead: str) -> None:
    with pytest.raises(ValueError, match=rf"^{given.split('=')[0]}: is set by .*; set {instead} instead$"):
        refuse([given], OWN)


def test_the_command_says_what_is_wrong_in_one_line() -> None:
    process = begun("seed=3")
    out, err = process.communicate()
    assert (process.returncode, out) == (1, "")
    assert err == "error: seed: is set by the study for each of its runs; set seeds instead\n"
