"""Every preset builds, and those with a published size have it."""

from pathlib import Path

import pytest
import torch
import yaml

from model.flops import count
from model.gpt import GPT

FOLDER = Path(__file__).parents[2] / "conf" / "model"
PUBLISHED = {  # preset: (vocabulary, positions, parameters)
    "gpt2-124m": (50257, 1024, 124_439_808),  # the Hub's gpt2
    "gpt2-355m": (50257, 1024, 354_823_168),  # gpt2-medium
    "gpt2-774m": (50257, 1024, 774_030_080),  # gpt2-large
    "gpt2-1.5b": (50257, 1024, 1_557_611_200),  # gpt2-xl
    "gpt-1.3b": (50257, 2048, 1_315_723_264),  # cerebras/Cerebras-GPT-1.3B has this shape
    "llama-7b": (32000, 2048, 6_738_415_616),  # meta-llama/Llama-2-7b
}
WITHOUT_EMBEDDINGS = {"gpt-nano": 100_096, "gpt-char": 787_584, "gpt-mini": 10_621_824}


def build(name: str, vocabulary_size: int, sequence_length: int) -> GPT:
    options = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert options.pop("_target_") == "model.gpt.GPT"
    assert options.pop("vocabulary_size") is None
    assert options.pop("sequence_length") == "${sequence_length}"
    with torch.device("meta"):
        return GPT(vocabulary_size=vocabulary_size, sequence_length=sequence_length, **options)


def test_every_preset_has_a_known_size() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} >= PUBLISHED.keys() | WITHOUT_EMBEDDINGS.keys()


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_preset_has_its_published_size(name: str) -> None:
    vocabulary_size, sequence_length, parameters = PUBLISHED.get(name, (100, 64, None))
    counts = count(build(name, vocabulary_size, sequence_length), sequence_length)
    if parameters is not None:
        assert counts.parameters == parameters
        assert f"{parameters:,}" in (FOLDER / f"{name}.yaml").read_text().splitlines()[0]
    else:
        assert counts.parameters_without_embeddings == WITHOUT_EMBEDDINGS[name]
