"""What happens before there are ranks: all checks, the data, the frozen config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.tiny import begun, config, corpus
from train.config import load
from train.start import begin, build_model


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    corpus(folder / "text", documents=12)
    return folder


def test_a_run_begins_with_its_config_and_its_data(text: Path) -> None:
    directory = begun(text, "whole", 2)
    expected = config(text, f"directory={directory}", "name=whole")
    assert load(directory / "config.yaml") == expected
    prepared = Path(json.loads((directory / "data.json").read_text())["prepared"])
    assert (prepared / "manifest.json").is_file() and prepared.is_absolute()
    assert sorted(path.name for path in directory.iterdir()) == ["config.yaml", "data.json", "lock"]
    assert begun(text, "whole", 2, "horizon.steps=9") == directory
    assert load(directory / "config.yaml").horizon.steps == 9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("global_batch=9", "global_batch: 9 cannot be shared by 2 ranks"),
        ("model.heads=5", "model.width: 64 is not divisible by heads 5"),
        ("model.width=wide", "model.width: 'wide' is not int"),
        ("+model.widht=3", "model.widht: unknown key; model.gpt.GPT knows vocabulary_size, sequence_length"),
        ("model.vocabulary_size=100", "model.vocabulary_size: 100 is smaller than the tokenizer's 257"),
        ("optim.learning_rate=0", "optim.learning_rate: 0 is not positive"),
        ("schedule.final=2", "schedule.final: 2 is not between 0 and 1"),
        ("+objective.smoothing=1", "objective.smoothing: unknown key"),
        ("+data.size=1", "data.size: unknown key"),
        ("data.source.paths=/absent/*.txt", "data.source.paths: /absent/*.txt matches no file"),
        ("evaluation.prompt='a <|fim_middle|> b'", "evaluation.prompt: holds <|fim_middle|>, but tokenizer."),
        ("model.init_from=/absent", "model.init_from: /absent"),
        ("packing.method=best", "packing.method: best is none of chunk, best_fit"),
        ("sequence_length=1000000", "sequence_length: a sample takes 1000000 tokens"),
    ],
)
def test_a_mistake_leaves_no_run_directory(text: Path, override: str, message: str) -> None:
    before = sorted((text / "prepared").glob("*"))
    with pytest.raises(ValueError) as caught:
        begun(text, "mistaken", 2, override)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not (text / "runs" / "mistaken").exists()
    assert [path for path in (text / "prepared").glob("*") if not (path / "manifest.json").exists()] == []
    if override.startswith("model.heads"):  # found before any data is made
        assert sorted((text / "prepared").glob("*")) == before


def test_a_resume_on_a_changed_corpus_is_refused(tmp_path: Path) -> None:
    directory = begun(tmp_path, "run", 1)
    frozen = (directory / "config.yaml").read_text()
    (tmp_path / "text" / "000.txt").write_text("other words, many of them\n" * 50)
    with pytest.raises(ValueError, match="^data: the corpus has changed since .*/run was started"):
        begin(config(tmp_path, f"directory={directory}", "name=run", "horizon.steps=9"), 1)
    assert (directory / "config.yaml").read_text() == frozen


def test_the_model_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    first, again, other = (build_model(config(tmp_path, f"seed={seed}"), 300) for seed in (1, 1, 2))
    weights = [dict(model.named_parameters()) for model in (first, again, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["embedding.weight"], weights[2]["embedding.weight"])
    assert weights[0]["embedding.weight"].shape[0] == 300


def test_a_larger_vocabulary_may_be_set(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = build_model(config(tmp_path, "model.vocabulary_size=320"), 300)
    assert model.get_parameter("embedding.weight").shape[0] == 320
    assert model.get_parameter("embedding.weight").is_meta


ENCODER = ["experiment=bert-tiny", "model.layers=1", "model.width=32", "model.heads=2"]
SEQ2SEQ = ["experiment=t5-tiny", "model.layers=1", "model.width=32", "model.heads=2"]
KNOWLEDGE = [*ENCODER, "objective=knowledge", "objective.entities._target_=data.units.Lexicon"]
LEXICON = "+objective.entities.path="


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=masked"], "objective: MaskedLM trains a model of family encoder, and model GPT is of"),
        (
            [*ENCODER, "objective=causal"],
            "objective: Causal trains a model of family decoder, and model BERT",
        ),
        ([*ENCODER, "objective.rate=0"], "objective.rate: 0 is not above 0 and at most 1"),
        ([*ENCODER, "objective.rate=1.5"], "objective.rate: 1.5 is not above 0 and at most 1"),
        ([*ENCODER, "tokenizer.special=[]"], "tokenizer.special: "),
        ([*ENCODER, "objective=masked-next-sentence"], "objective.pairs: next_sentence needs a model with a"),
        ([*ENCODER, "evaluation.prompt=item"], "evaluation.prompt: holds no [MASK]"),
        ([*SEQ2SEQ, "tokenizer.special=[masking]"], "tokenizer.special: "),
        ([*SEQ2SEQ, "packing.isolate=true"], "packing.isolate: denoising objectives run over documents"),
        ([*SEQ2SEQ, "model.target_length=4"], "model.target_length: 4 is below the"),
        ([*SEQ2SEQ, "evaluation.prompt=" + "item" * 40], "evaluation.prompt: "),
        (
            [*KNOWLEDGE, LEXICON + "{0}/none.txt"],
            "objective.entities.path: {0}/none.txt",
        ),
        (
            [*KNOWLEDGE, LEXICON + "{0}/other.txt"],
            "objective.entities.path: {0}/other.txt",
        ),
    ],
)
def test_what_does_not_fit_is_refused(text: Path, overrides: list[str], message: str) -> None:
    (text / "other.txt").write_text("Timbuktu\n")
    with pytest.raises(ValueError) as caught:
        begun(text, "unfit", 1, *(one.replace("{0}", str(text)) for one in overrides))
    assert str(caught.value).startswith(message.replace("{0}", str(text)))
    assert "\n" not in str(caught.value)
    assert not (text / "runs" / "unfit").exists()


def test_a_lexicon_may_not_change_under_a_run(text: Path) -> None:
    lexicon = text / "lexicon.txt"
    lexicon.write_text("item\n")
    stages = ["objective.phrases=null", "objective.stages={word:0,phrase:null,entity:1}"]
    knowledge = [*KNOWLEDGE, f"{LEXICON}{lexicon}", *stages]
    begun(text, "ernie", 1, *knowledge)
    begun(text, "ernie", 1, *knowledge)
    lexicon.write_text("item\nfollows\n")
    with pytest.raises(
        ValueError, match="^objective.entities: finds something else than when .* was started"
    ):
        begun(text, "ernie", 1, *knowledge)
