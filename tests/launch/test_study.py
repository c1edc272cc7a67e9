"""Many runs as one study: which are trained, what is said of them, and the commands that they are given."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from data.cli import one_line
from launch.overrides import as_typed, composing, exactly, refuse, spelled, top
from launch.study import OUTPUT, Job, Planned, Trained, at_a_time, run_all
from tests.tiny import ROOT, corpus, overrides
from train.config import Horizon, from_hydra, load
from train.lock import Lock
from train.records import read_metrics


def said(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def listening() -> Console:
    return Console(file=io.StringIO(), highlight=False, width=80)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study")
    corpus(path / "text", documents=12)
    return path


def planned(folder: Path, name: str, *more: str) -> Planned:
    short = "horizon.steps=3", "evaluation.every=null", "checkpoint.every=null", "divergence.nonfinite=stop"
    return Planned(name, tuple(overrides(folder, *short, *more)))


def both(folder: Path) -> list[Planned]:
    """One run, planned twice in different words, and one that diverges."""
    words = ("optim.learning_rate=1e-3", "optim.learning_rate=0.001")
    return [
        *(planned(folder, f"low-{number}", word) for number, word in enumerate(words)),
        planned(folder, "high", "optim.learning_rate=1e30"),
    ]


@pytest.fixture(scope="module")
def first(folder: Path) -> tuple[list[str], list[Trained]]:
    """What is said of a study with a run that fails, and of its runs without that."""
    console = listening()
    wrong = planned(folder, "wrong", "evaluation.prompt=a", "model.vocabulary_size=100")
    with pytest.raises(
        ValueError, match="^1 of 4 runs failed, see above; the same command tries them again$"
    ):
        run_all([wrong, *both(folder)], folder / "trials", console)
    return said(console), run_all(both(folder), folder / "trials", console)


def test_each_run_ends_in_a_line_and_a_failed_one_does_not_keep_the_others(
    folder: Path, first: tuple[list[str], list[Trained]]
) -> None:
    lines, _ = first
    told = dict(sorted(line.split(" ", 1)[1].split(": ", 1) for line in lines))
    assert list(told) == ["high", "low-0", "wrong"] and {line[:4] for line in lines} == {
        "1/3 ",
        "2/3 ",
        "3/3 ",
    }
    assert told["high"].startswith("diverged: the loss at step 1 is nan")
    assert told["low-0"].startswith("validation loss 5.")
    assert told["wrong"].startswith("failed with exit code 1: error: model.vocabulary_size: 100 is smaller")
    assert f"/{OUTPUT})" in told["wrong"]


def test_the_same_settings_are_the_same_run(first: tuple[list[str], list[Trained]]) -> None:
    _, (low, again, high) = first
    assert low.directory == again.directory and again.planned.name == "low-1"
    assert low.diverged is None and low.loss == again.loss == low.records("eval")[-1]["loss"] < 6
    assert (
        high.loss == float("inf") and high.diverged and high.diverged.startswith("the loss at step 1 is nan")
    )
    config = load(low.directory / "config.yaml")
    assert (config.engine.ranks, config.engine.threads, config.name) == (1, 1, low.directory.name)


def test_what_has_ended_is_not_trained_again(folder: Path, first: tuple[list[str], list[Trained]]) -> None:
    metrics = [trained.directory / "metrics.jsonl" for trained in first[1]]
    before = [path.stat().st_mtime_ns for path in metrics]
    console = listening()
    assert run_all(both(folder), folder / "trials", console) == first[1]
    assert said(console) == ["3 of 3 runs: trained before"]
    assert [path.stat().st_mtime_ns for path in metrics] == before


def test_another_corpus_is_another_run(
    folder: Path, first: tuple[list[str], list[Trained]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "text" / "012.txt").write_text("one more")
    monkeypatch.setattr("launch.study.Pool.work", lambda pool: None)
    with pytest.raises(ValueError, match="^3 of 3 runs failed"):
        run_all(both(folder), folder / "trials", listening())
    (folder / "text" / "012.txt").unlink()
    assert len(run_all(both(folder), folder / "trials", listening())) == 3


def test_a_run_that_another_process_holds_is_not_trained(folder: Path, tmp_path: Path) -> None:
    one, console = planned(folder, "held"), listening()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "launch.study.Pool.work",
            lambda pool: [task.directory.mkdir(parents=True) for task in pool.waiting],
        )
        with pytest.raises(ValueError, match="^1 of 1 runs failed"):
            run_all([one], tmp_path, console)
    (directory,) = tmp_path.iterdir()
    lock = Lock(directory)
    with pytest.raises(ValueError, match="^1 of 1 runs failed"):
        run_all([one], tmp_path, console)
    lock.release()
    assert "held: failed with exit code 1: error: directory: another process trains in" in said(console)[0]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ("optim.learning_rat=1", "optim.learning_rat: no such key; did you mean optim.learning_rate?"),
        ("optim.learning_rate=-1", "optim.learning_rate: -1 is not positive; give a number above 0"),
        ("schedule.final=2", "schedule.final: 2 is not between 0 and 1"),
        ("model.heads=3", "model"),
        ("global_batch=0", "global_batch: 0 is not a positive number; give one"),
        ("engine.ranks=3", "global_batch: 8 cannot be shared by 3 ranks"),
    ],
)
def test_a_wrong_config_is_said_before_anything_is_trained(
    folder: Path, tmp_path: Path, more: str, line: str
) -> None:
    console = listening()
    with pytest.raises((ValueError, HydraException)) as caught:
        run_all([planned(folder, "right"), planned(folder, "wrong", more)], tmp_path / "trials", console)
    assert one_line(caught.value).startswith(line)
    assert not (tmp_path / "trials").exists() and said(console) == []


def test_as_many_at_a_time_as_the_cores_have_threads_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    config = planned(folder, "one").config()
    assert at_a_time(config) == 8
    wide = replace(config, engine=replace(config.engine, ranks=2, threads=3))
    assert at_a_time(wide) == 1
    assert at_a_time(replace(config, engine=replace(config.engine, threads=99))) == 1
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert at_a_time(config) == 4 and at_a_time(wide) == 2


def test_each_run_has_gpus_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gpus(job: Job) -> list[str | None]:
        return [job.environment(slot).get("CUDA_VISIBLE_DEVICES") for slot in range(3)]

    one = planned(folder, "one")
    two = Planned("two", (*one.overrides, "engine.ranks=2"))
    single, double = (Job(each, each.config(), folder) for each in (one, two))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert gpus(single) == [None] * 3
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert gpus(single) == ["0", "1", "2"] and gpus(double) == ["0,1", "2,3", "0,1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,a,b")
    assert gpus(single) == ["5", "7", "a"] and gpus(double) == ["5,7", "a,b", "5,7"]


STRANGE = [
    "a\\b",
    'it\'s "x" \\',
    '\\"',
    "é {x: 1}, [",
    "",
    " lead",
    "\\d+\\.\\s$",
    "null",
    "True",
    "1e3",
    "/a/b.txt",
]


@pytest.mark.parametrize("value", [*STRANGE, 1e-07, True, None, [1, "a,b"], {"a-b": {"c": [None]}, 3: "x"}])
def test_a_value_is_what_it_was_after_hydra_has_read_it(value: object) -> None:
    with composing():
        found = compose("config", overrides=[f"+data.value={spelled(value)}"])
    assert OmegaConf.to_container(found, resolve=False)["data"]["value"] == value  # type: ignore[index, call-overload]


def composed(name: str, *given: str) -> DictConfig:
    with composing():
        return compose(name, overrides=list(given))


@pytest.mark.parametrize(
    "given",
    [
        (),
        ("model=t5-tiny", "objective=span-corruption", "tokenizer=unigram"),
        ("data=web", "data.source.inputs.crawl.source.paths=a b/*.gz"),
        ("experiment=demo", "optim=muon", "schedule=wsd"),
        ("curriculum={0:{sequence_length:64}}", "mixture.weights={a-b:1}", "name=some"),
        ("+data.source.parts.notes={_target_:data.sources.TextFiles,paths:notes/*.md}",),
    ],
)
def test_overrides_compose_the_same_config(given: tuple[str, ...]) -> None:
    node = composed("config", *given)
    typed = as_typed(node, without=("name",))
    again = composed("config", *typed, f"name={node.name}")
    assert OmegaConf.to_container(again) == OmegaConf.to_container(node)
    assert not any(one.startswith("name") for one in typed) and (given or not typed)
    if "data=web" not in given:
        config = from_hydra(node)
        assert config.horizon in (Horizon(epochs=1), Horizon(steps=600))


@pytest.mark.parametrize(
    ("typed", "group", "choice"),
    [
        (["experiment=bert-cramming"], "optim", "lion"),
        (["experiment=demo", "optim.eps=1", "seed=3"], "optim", "adamw"),
        (["schedule=linear", "schedule.final=0.5", "schedule.warmup=0.3"], "schedule", "constant"),
        (["~schedule", "+schedule={_target_:train.optim.schedules.Linear,final:0}"], "schedule", "wsd"),
    ],
)
def test_a_group_is_as_it_stands_in_conf(typed: list[str], group: str, choice: str) -> None:
    given = exactly(typed, group, choice, warmup=7)
    own = OmegaConf.load(ROOT / "conf" / group / f"{choice}.yaml")
    if group == "schedule":
        own.warmup = 7
    assert composed("config", *given)[group] == own
    assert {one for one in typed if top(one) != group} < set(given)


def test_keys_of_the_study_are_refused() -> None:
    refuse(["model=gpt-nano", "steps=3"], {"seed": "seeds"})
    with pytest.raises(ValueError, match=r"^seed: is set by the study .*; set seeds instead"):
        refuse(["+seed=3"], {"seed": "seeds"})


def test_records_are_read_from_the_directory(first: tuple[list[str], list[Trained]]) -> None:
    low = first[1][0]
    assert low.records("event") == [
        record for record in read_metrics(low.directory / "metrics.jsonl") if record["kind"] == "event"
    ]
