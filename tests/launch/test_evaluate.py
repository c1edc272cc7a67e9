"""A run's checkpoint evaluated outside of training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.evaluate import evaluate_run
from tests.distributed import run_ranks
from tests.tiny import ROOT, begun
from tests.train.test_run import SMALL, train_all
from train.objective.masked import MaskedLM
from train.records import read_metrics

EXACT = ["engine.precision=fp32", "evaluation.every=null", "checkpoint.every=3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("evaluated")
    gpt = begun(folder, "gpt", 1, *EXACT, "packing.method=best_fit", "packing.isolate=true")
    bert = begun(folder, "bert", 1, *EXACT, "experiment=bert-tiny", *SMALL)
    run_ranks(train_all, 1, [gpt, bert])
    return {"gpt": gpt, "bert": bert}


def evaluated(run: Path) -> dict[str, Any]:
    return [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "eval"][-1]


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_the_result_is_that_of_training(runs: dict[str, Path], family: str) -> None:
    result, record = evaluate_run(runs[family]), evaluated(runs[family])
    assert result.loss == pytest.approx(record["loss"], rel=1e-4)
    assert result.tokens_evaluated == record["tokens_evaluated"]
    assert (result.bits_per_byte is None) == (record["bits_per_byte"] is None) == (family == "bert")
    earlier = evaluate_run(runs[family], step=3)
    assert earlier.loss != pytest.approx(result.loss, rel=1e-4)


def test_another_objective_of_the_family(runs: dict[str, Path]) -> None:
    more = evaluate_run(runs["bert"], MaskedLM(seed=0, rate=0.5))
    assert more.tokens_evaluated > 2 * evaluated(runs["bert"])["tokens_evaluated"]
    with pytest.raises(
        ValueError,
        match="^objective: .* cannot be scored on it: objective: MaskedLM trains a model of family encoder",
    ):
        evaluate_run(runs["gpt"], MaskedLM(seed=0))


def test_the_command(runs: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "launch.evaluate", f"run={runs['bert']}"]
    done = subprocess.run(
        [*command, "objective=masked-whole-word"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    printed = dict(line.split(": ") for line in done.stdout.splitlines())
    assert float(printed["loss"]) > 0 and int(printed["tokens_evaluated"].replace(",", "")) > 0
    assert int(printed["masked_word"]) == int(printed["tokens_evaluated"].replace(",", ""))
    wrong = subprocess.run([*command, "checkpoint=7"], capture_output=True, text=True, cwd=ROOT)
    assert wrong.returncode and "no checkpoint of step 7" in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1
