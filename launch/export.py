"""A run's model as a directory that Hugging Face transformers loads with nothing else.

    python -m launch.export run=runs/demo format=hf

It holds config.json, model.safetensors, the tokenizer, which puts around a text what the model was trained
with there, and for models that generate text generation_config.json.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import nn

from data.cli import main_guard, one_line_errors
from data.tokenizer import CLS, END_OF_TEXT, PAD, SEP, load_tokenizer, save_tokenizer, vocabulary_size
from launch.request import CONF, checked, step_of
from model.bert import BERT
from model.hf import export_state
from model.hf_options import hf_config
from model.t5 import T5
from train.checkpoint import load_weights
from train.config import load
from train.rundir import RunDir
from train.start import build_model, parametrization_of

FORMATS = ("hf",)


@dataclass(frozen=True)
class Request:
    """The keys of conf/export.yaml."""

    run: str
    format: str
    directory: str | None  # None: hf in the run's
    checkpoint: int | str  # a step, or "latest"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="export")
@one_line_errors
def main(node: DictConfig) -> None:
    directory, step = export(from_hydra(node))
    print(f"step {step} is in {directory}")


def from_hydra(node: DictConfig) -> Request:
    """The checked request. Raises ValueError with one line that begins with the key."""
    request = checked(node, Request)
    if request.format not in FORMATS:
        raise ValueError(f"format: {request.format} is not known; choose one of {', '.join(FORMATS)}")
    return request


def export(request: Request) -> tuple[Path, int]:
    """Write the directory, whole or not at all; returns it, and the step of the checkpoint.

    Raises ValueError in one line where it exists, the run or its checkpoint does not, or the model has an
    option that transformers has no equal for.
    """
    rundir = RunDir(request.run)
    config = load(rundir.config)
    directory = Path(request.directory) if request.directory else rundir.path / request.format
    if directory.exists():
        raise ValueError(f"directory: {directory} exists; remove it, or name another with directory=…")
    if not (rundir.tokenizer / "tokenizer.json").is_file():
        raise ValueError(f"{rundir.tokenizer}: holds no tokenizer; the run has not started training")
    tokenizer = load_tokenizer(rundir.tokenizer)
    if parametrization_of(config).base:
        raise ValueError(
            f"parametrization: {rundir.path} has multipliers of its own, for which transformers has no equal"
        )
    model = build_model(config, vocabulary_size(tokenizer))
    content = hf_config(model, **token_ids(model, tokenizer))  # refuses a model before its weights are read
    asked = step_of(request.checkpoint)
    step = load_weights(model, rundir.checkpoints, asked)
    aside = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        write(model, tokenizer, content, aside)
        os.rename(aside, directory)
    except OSError as error:
        raise ValueError(f"directory: cannot write {directory} ({error.strerror}); choose another") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return directory, step


def token_ids(model: nn.Module, tokenizer: Tokenizer) -> dict[str, int | None]:
    """The ids that begin, end and pad a text. T5 needs one to pad with: END_OF_TEXT, if there is no PAD."""
    end, pad = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(PAD)
    return {"bos": end, "eos": end, "pad": end if pad is None and isinstance(model, T5) else pad}


def write(model: nn.Module, tokenizer: Tokenizer, config: dict[str, Any], directory: Path) -> None:
    """Fill a new directory; `config` is the content of its config.json."""
    tokenizer.post_processor = around(model, tokenizer)
    save_tokenizer(tokenizer, directory)
    path = directory / "tokenizer_config.json"
    inputs = ["input_ids", "attention_mask"]
    if isinstance(model, BERT) and model.segments is not None:
        inputs.insert(1, "token_type_ids")
    settings = json.loads(path.read_text(encoding="utf-8"))
    _write_json(path, settings | {"model_max_length": model.sequence_length, "model_input_names": inputs})
    _write_json(directory / "config.json", config)
    if not isinstance(model, BERT):
        keys = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        generation = {key: config[key] for key in keys if key in config}
        if generation["pad_token_id"] is None:
            generation["pad_token_id"] = config["eos_token_id"]
        _write_json(directory / "generation_config.json", generation)
    weights = directory / "model.safetensors"
    save_file(export_state(model), weights, metadata={"format": "pt"})
    weights.chmod(path.stat().st_mode)  # safetensors writes for the owner alone


def around(model: nn.Module, tokenizer: Tokenizer) -> TemplateProcessing | None:
    """What the tokenizer has to put around a text: what the model's training samples had there."""
    if isinstance(model, T5):
        tokens, single, pair = [END_OF_TEXT], f"$A {END_OF_TEXT}", f"$A $B {END_OF_TEXT}"
    elif isinstance(model, BERT):
        tokens, single, pair = [CLS, SEP], f"{CLS} $A {SEP}", f"{CLS} $A {SEP} $B:1 {SEP}:1"
    else:
        return None
    ids = [(token, tokenizer.token_to_id(token)) for token in tokens]
    if any(id_ is None for _, id_ in ids):
        return None
    return TemplateProcessing(single=single, pair=pair, special_tokens=ids)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main_guard(main)
