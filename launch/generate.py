"""Text from a run's model, streamed to the terminal.

    python -m launch.generate run=runs/demo prompt="def main(" max_new_tokens=200 temperature=0.8 seed=1
    python -m launch.generate run=runs/bert-tiny prompt="import [MASK] as np"
    python -m launch.generate run=runs/t5-tiny prompt="for i in <extra_id_0>(10):"

A decoder continues the prompt, an encoder fills its masks, an encoder-decoder says what its sentinels hide.
On a GPU the model computes in the run's precision, on a CPU in fp32.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from tokenizers import Tokenizer
from torch import nn

from data.cli import main_guard, one_line_errors
from data.tokenizer import load_tokenizer, vocabulary_size
from launch.request import CONF, checked, step_of
from train.checkpoint import load_weights
from train.config import load
from train.eval.sample import respond
from train.hardware import DTYPES
from train.rundir import RunDir
from train.start import build_model


@dataclass(frozen=True)
class Request:
    """The keys of conf/generate.yaml. The sampling ones mean what they mean to model.generate.generate."""

    run: str
    prompt: str
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    checkpoint: int | str  # a step, or "latest"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="generate")
@one_line_errors
def main(node: DictConfig) -> None:
    request = from_hydra(node)
    pieces = stream(request)
    print(request.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def from_hydra(node: DictConfig) -> Request:
    """The checked request. Raises ValueError with one line that begins with the key."""
    request = checked(node, Request)
    if not math.isfinite(request.temperature):
        raise ValueError(f"temperature: {request.temperature} is not a finite number")
    if not 0 <= request.seed < 2**63:
        raise ValueError(f"seed: {request.seed} is not between 0 and 2^63")
    return request


def stream(request: Request) -> Iterator[str]:
    """The model's answer to the prompt, piece by piece. Everything is loaded and checked before it returns.

    Raises ValueError in one line for a run without a checkpoint, or a number that cannot be.
    """
    model, tokenizer = load_model(Path(request.run), step_of(request.checkpoint))
    return respond(
        model,
        tokenizer,
        request.prompt,
        max_new_tokens=request.max_new_tokens,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        seed=request.seed,
    )


def load_model(directory: Path, step: int | None = None) -> tuple[nn.Module, Tokenizer]:
    """The model and the tokenizer of a run, on the GPU if there is one.

    step: of the checkpoint; None means the newest. Raises ValueError in one line where the run, its tokenizer
    or the checkpoint is missing.
    """
    rundir = RunDir(directory)
    config = load(rundir.config)
    if not (rundir.tokenizer / "tokenizer.json").is_file():
        raise ValueError(f"{rundir.tokenizer}: holds no tokenizer; the run has not started training")
    tokenizer = load_tokenizer(rundir.tokenizer)
    on_gpu = torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        model = build_model(config, vocabulary_size(tokenizer))
    model.to(DTYPES[config.engine.precision] if on_gpu else torch.float32)
    load_weights(model, rundir.checkpoints, step)
    return model.eval(), tokenizer


def quoted(argument: str) -> str:
    """A command line's prompt=TEXT as Hydra has to read it so that TEXT arrives as it stands.

    Hydra gives quotes, commas, brackets and `${` a meaning of their own.
    """
    if not argument.startswith("prompt="):
        return argument
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", argument.removeprefix("prompt="))
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    trailing = len(text) - len(text.rstrip("\\"))
    return f"prompt='{text}{trailing * chr(92)}'"


if __name__ == "__main__":
    sys.argv[1:] = [quoted(argument) for argument in sys.argv[1:]]
    main_guard(main)
