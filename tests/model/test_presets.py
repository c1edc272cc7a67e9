"""Every preset builds, and those with a published size have it."""

from pathlib import Path

import pytest
import torch
import yaml

from model.bert import BERT
from model.flops import count
from model.gpt import GPT
from model.t5 import T5

FOLDER = Path(__file__).parents[2] / "conf" / "model"
PUBLISHED = {  # preset: (vocabulary, positions, parameters)
    "gpt2-124m": (50257, 1024, 124_439_808),  # the Hub's gpt2
    "gpt2-355m": (50257, 1024, 354_823_168),  # gpt2-medium
    "gpt2-774m": (50257, 1024, 774_030_080),  # gpt2-large
    "gpt2-1.5b": (50257, 1024, 1_557_611_200),  # gpt2-xl
    "gpt-1.3b": (50257, 2048, 1_315_723_264),  # cerebras/Cerebras-GPT-1.3B has this shape
    "llama-7b": (32000, 2048, 6_738_415_616),  # meta-llama/Llama-2-7b
    "llama-1b": (128256, 8192, 1_235_814_400),  # meta-llama/Llama-3.2-1B
    "llama-8b": (128256, 8192, 8_030_261_248),  # meta-llama/Meta-Llama-3-8B
    "bert-base": (30522, 512, 109_514_298),  # google-bert/bert-base-uncased
    "bert-large": (30522, 512, 335_174_458),  # google-bert/bert-large-uncased
    "bert-cramming": (32768, 128, 119_589_889),  # by our count: no exact one is published
    "ernie-base": (18000, 513, 99_885_648),  # nghuyong/ernie-1.0-base-zh
    "t5-small": (32128, 512, 60_506_624),  # google-t5/t5-small
    "t5-base": (32128, 512, 222_903_552),  # google-t5/t5-base
    "t5-1.1-small": (32128, 512, 76_961_152),  # google/t5-v1_1-small
    "transformer-base": (37000, 512, 63_082_496),  # by our count: the paper says 65 million
}
WITH_PAIR_HEAD = {"bert-base": 110_106_428, "bert-large": 336_226_108, "ernie-base": 100_477_778}
WITHOUT_EMBEDDINGS = {
    "gpt-nano": 100_096,
    "gpt-char": 787_584,
    "gpt-mini": 10_621_824,
    "llama-tiny": 2_951_424,
    "bert-tiny": 3_225_956,
    "ernie-tiny": 3_225_956,
    "t5-tiny": 5_509_376,
}
FAMILIES = {"model.gpt.GPT": GPT, "model.bert.BERT": BERT, "model.t5.T5": T5}


def build(name: str, vocabulary_size: int, sequence_length: int, **others: bool) -> GPT | BERT | T5:
    options = yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) | others
    family = FAMILIES[options.pop("_target_")]
    assert options.pop("vocabulary_size") is None
    assert options.pop("sequence_length") == "${sequence_length}"
    with torch.device("meta"):
        return family(vocabulary_size=vocabulary_size, sequence_length=sequence_length, **options)


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


@pytest.mark.parametrize("name", sorted(WITH_PAIR_HEAD))
def test_pair_head_adds_what_was_published(name: str) -> None:
    vocabulary_size, sequence_length, _ = PUBLISHED[name]
    model = build(name, vocabulary_size, sequence_length, pair_head=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == WITH_PAIR_HEAD[name]
    assert f"{WITH_PAIR_HEAD[name]:,}" in (FOLDER / f"{name}.yaml").read_text()
