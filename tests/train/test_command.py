"""`python -m train …` as a person types it: what it refuses, in which words, and what it leaves."""

from __future__ import annotations

import json
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny import ROOT, corpus, overrides
from train.checkpoint import steps
from train.records import read_metrics
from train.stop import current

BIN = Path(sys.executable).parent
CHOICES = sorted((path.parent.name, path.stem) for path in (ROOT / "conf").glob("*/*.yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the corpus, the prepared data and the runs of this module lie."""
    path = tmp_path_factory.mktemp("command")
    corpus(path / "text", documents=12)
    (path / "empty.txt").touch()
    (path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    (path / "short.txt").write_text("a few words\n" * 4)
    return path


def arguments(folder: Path, name: str, *more: str) -> list[str]:
    short = ("horizon.steps=3", "evaluation.every=null", "checkpoint.every=null", "engine.threads=1")
    return [*overrides(folder), f"name={name}", f"directory={folder}/runs/{name}", *short, *more]


def start(command: list[str | Path]) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, with nothing of ours in its environment."""
    launcher = re.compile("RANK|LOCAL_|WORLD_SIZE|MASTER_|HYDRA_|OMP_")
    environment = {key: value for key, value in os.environ.items() if not launcher.match(key)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def train(*given: str) -> subprocess.CompletedProcess[str]:
    return start([sys.executable, "-m", "train", *given])


def train_here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *given: str
) -> tuple[object, str, str]:
    """The same in this process, for what ends before a run begins: exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["train", *given])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(os, "_exit", sys.exit)  # how the command ends its process
    monkeypatch.chdir(ROOT)
    capfd.readouterr()
    code: object = None
    with current():
        try:
            runpy.run_module("train", run_name="__main__", alter_sys=False)
        except SystemExit as left:
            code = left.code
    return (code, *capfd.readouterr())


def left_behind(folder: Path) -> set[Path]:
    """Runs, and prepared folders that are not whole; and what Hydra would leave in the checkout."""
    prepared = {path for path in (folder / "prepared").glob("*") if not (path / "manifest.json").exists()}
    hydras = {ROOT / name for name in ("outputs", "multirun", "multirun.yaml", ".hydra", "train.log")}
    return {*(folder / "runs").glob("*"), *prepared, *(path for path in hydras if path.exists())}


MISTAKES = [
    ("sequence_lenght=3", "sequence_lenght: no such key; did you mean sequence_length?"),
    ("model.widht=3", "model.widht: no such key; did you mean model.width?"),
    ("+model.widht=3", "model.widht: unknown key; model.gpt.GPT knows"),
    ("+engine.zero=1", "engine.zero: no such key; it has"),
    ("model.kv_heads=2", "model.kv_heads: is not set in the YAML; to set it, write +model.kv_heads=..."),
    ("sequence_length=long", "sequence_length: "),
    ("model.width=wide", "model.width: 'wide' is not int"),
    ("optim.learning_rate=fast", "optim.learning_rate: 'fast' is not float"),
    ("seed=-1", "seed: -1 is not between 0 and 2**63"),
    ("model.heads=5", "model.width: 64 is not divisible by heads 5; choose a multiple"),
    ("global_batch=9 micro_batch=2", "global_batch: 9 is not divisible by micro_batch 2 x 1 ranks"),
    ("engine.ranks=3", "global_batch: 8 cannot be shared by 3 ranks; choose a number of ranks that divides"),
    ("data.source.paths=???", "data.source.paths: must be set, for example data.source.paths=..."),
    ("data.source.paths={0}/absent.txt", "data.source.paths: {0}/absent.txt matches no file"),
    ("data.source.paths={0}/empty.txt", "data.source: the corpus is empty"),
    ("data.source.paths={0}/latin.txt", "{0}/latin.txt: not UTF-8 at byte 1 (0xe9)"),
    ("data.source.paths={0}/short.txt", "sequence_length: a sample takes 32 tokens"),
    ("directory={0}/empty.txt/run", "directory: cannot write to {0}/empty.txt/run"),
    ("experiment=dmo", "experiment=dmo: no such choice; there are bert-cramming,"),
    ("model=gpt3", "model=gpt3: no such choice; there are"),
    ("horizon=null", "horizon: must not be null; give a value"),
    ("horizon.epochs=1", "horizon: steps and epochs are set; set exactly one"),
    ("sequence_length", "Error parsing override 'sequence_length'"),
    ("name=${{nope}}", "name: interpolation key 'nope' not found"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES)
def test_a_mistake_ends_in_one_line(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    mistake: str,
    message: str,
) -> None:
    extra = ["data.validation.share=0.5"] if "short" in mistake else []
    given = arguments(folder, "mistaken", *extra, *mistake.format(folder).split())
    before = left_behind(folder)
    code, out, err = train_here(monkeypatch, capfd, *given)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {message.format(folder)}")
    assert err.count("\n") == 1 and err.endswith("\n")
    assert left_behind(folder) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has fp16")
def test_fp16_without_support_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given = arguments(folder, "half", "engine.precision=fp16")
    assert train_here(monkeypatch, capfd, *given) == (
        1,
        "",
        "error: engine.precision: fp16 needs a GPU, and this machine has none; use bf16 or fp32\n",
    )


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("model.widht=3", "model.widht: no such key; did you mean model.width?"),
        ("engine.ranks=2 model.heads=5", "model.width: 64 is not divisible by heads 5; choose a multiple"),
        ("engine.ranks=2 data.source.paths={0}/latin.txt", "{0}/latin.txt: not UTF-8 at byte 1 (0xe9)"),
    ],
)
def test_a_mistake_ends_in_one_line_in_its_own_process(folder: Path, mistake: str, message: str) -> None:
    before = left_behind(folder)
    done = train(*arguments(folder, "mistaken", *mistake.format(folder).split()))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {message.format(folder)}")
    assert done.stderr.count("\n") == 1
    assert left_behind(folder) == before


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def three_ways(folder: Path) -> dict[str, Path]:
    """The run directories of the same job on two ranks, by what started them."""
    launchers: dict[str, list[str | Path]] = {
        "python": [sys.executable, "-m", "train"],
        "torchrun": [BIN / "torchrun", "--nproc_per_node=2", f"--master_port={free_port()}", "-m", "train"],
        "deepspeed": [BIN / "deepspeed", "--num_gpus=2", f"--master_port={free_port()}", "--module", "train"],
    }
    for name, launcher in launchers.items():
        done = start([*launcher, *arguments(folder, name, "engine.ranks=2")])
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert f"run directory: {folder}/runs/{name}" in done.stdout
    return {name: folder / "runs" / name for name in launchers}


def test_the_same_job_three_ways_has_the_same_losses(three_ways: dict[str, Path]) -> None:
    found = [read_metrics(directory / "metrics.jsonl") for directory in three_ways.values()]
    losses = [[(r["kind"], r["step"], r["loss"]) for r in records if "loss" in r] for records in found]
    assert [(kind, step) for kind, step, _ in losses[0]] == [
        ("train", 1),
        ("train", 2),
        ("train", 3),
        ("eval", 3),
    ]
    assert losses[0] == losses[1] == losses[2]
    assert losses[0][0][2] > losses[0][2][2]
    for directory in three_ways.values():
        assert steps(directory / "checkpoints") == [3]
        assert '"world_size": 2' in (directory / "environment.json").read_text()
        assert " -m train " in json.loads((directory / "environment.json").read_text())["command"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.width=32", "model.width: differs from what"),
        ("data.validation.share=0.3", "data.validation.share: differs from what"),
        ("tokenizer=characters", "tokenizer._target_: differs from what"),
        ("seed=3", "seed: differs from what"),
    ],
)
def test_a_changed_run_is_refused(
    three_ways: dict[str, Path],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    change: str,
    message: str,
) -> None:
    directory = three_ways["python"]
    before = stamps(directory)
    code, out, err = train_here(monkeypatch, capfd, *arguments(folder, "python", "engine.ranks=2", change))
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {message.format(directory)}") and err.count("\n") == 1
    assert stamps(directory) == before


def stamps(directory: Path) -> dict[Path, int]:
    """When each file but the lock was last changed."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != "lock"]
    return {path: path.stat().st_mtime_ns for path in files}


HOLD = """
import sys
from train.rundir import RunDir
rundir = RunDir(sys.argv[1])
rundir.lock()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_in_a_run_directory_is_refused(folder: Path) -> None:
    directory = folder / "runs" / "held"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, directory], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin and holder.stdout
    try:
        assert holder.stdout.readline() == b"held\n"
        done = train(*arguments(folder, "held"))
    finally:
        holder.kill()
        holder.wait()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: directory: another process trains in {directory}; wait for it")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in directory.iterdir()] == ["lock"]


def test_a_sweep_trains_each_of_its_values(folder: Path) -> None:
    done = train("--multirun", *arguments(folder, "sweep", "optim.learning_rate=1e-3,2e-3"))
    assert done.returncode == 0, done.stdout + done.stderr
    directories = [folder / "runs" / "sweep" / f"optim.learning_rate={rate}" for rate in (0.001, 0.002)]
    assert [steps(directory / "checkpoints") for directory in directories] == [[3], [3]]
    last = [read_metrics(directory / "metrics.jsonl")[-1] for directory in directories]
    assert [record["event"] for record in last] == ["finish", "finish"]
    rates = [read_metrics(d / "metrics.jsonl") for d in directories]
    assert [max(r["learning_rate"] for r in rs if r["kind"] == "train") for rs in rates] == [1e-3, 2e-3]
    assert not any((ROOT / name).exists() for name in ("multirun", "multirun.yaml", "outputs", ".hydra"))


def test_the_config_is_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = train_here(monkeypatch, capfd, *arguments(folder, "shown"), "--cfg", "job")
    assert (code, err) == (0, "")
    assert "sequence_length: 32\n" in out and "_target_: model.gpt.GPT\n" in out
    assert not (folder / "runs" / "shown").exists()


def test_help_lists_every_choice(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = train_here(monkeypatch, capfd, "--help")
    assert (code, err) == (0, "")
    for group in {group for group, _ in CHOICES}:
        listed = re.search(rf"^{group}: (.*)$", out, re.MULTILINE)
        assert listed, group
        assert listed[1].split(", ") == [choice for own, choice in CHOICES if own == group]
