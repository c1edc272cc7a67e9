"""Text from a run's model, streamed to the terminal.

    python -m launch.generate run=runs/demo prompt="def main(" max_new_tokens=200 temperature=0.8 seed=1

On a GPU the model computes in the run's precision, on a CPU in fp32.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tokenizers import Tokenizer

from data.cli import main_guard, one_line_errors
from data.tokenizer import END_OF_TEXT, load_tokenizer, vocabulary_size
from model.generate import generate
from model.gpt import GPT
from train.checkpoint import load_weights
from train.config import load
from train.hardware import DTYPES
from train.rundir import RunDir
from train.start import build_model

CONF = Path(__file__).resolve().parent.parent / "conf"
LATEST = "latest"
BROKEN = "\N{REPLACEMENT CHARACTER}"  # what bytes that are not (yet) a character decode to


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
    if OmegaConf.is_missing(node, "run"):
        raise ValueError("run: must be set to a run's directory, for example run=runs/demo")
    try:
        request = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Request), node))
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    assert isinstance(request, Request)
    if isinstance(request.checkpoint, str) and request.checkpoint != LATEST:
        raise ValueError(f"checkpoint: {request.checkpoint} is neither a step nor {LATEST}")
    if not math.isfinite(request.temperature):
        raise ValueError(f"temperature: {request.temperature} is not a finite number")
    if not 0 <= request.seed < 2**63:
        raise ValueError(f"seed: {request.seed} is not between 0 and 2^63")
    return request


def stream(request: Request) -> Iterator[str]:
    """The text that continues the prompt, piece by piece. Everything is loaded and checked before it returns.

    Raises ValueError in one line for a run without a checkpoint, or a number that cannot be.
    """
    model, tokenizer = load_model(
        Path(request.run), None if request.checkpoint == LATEST else int(request.checkpoint)
    )
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    assert end_of_text is not None, "every tokenizer that data.tokenizer saves has it"
    prompt = tokenizer.encode(request.prompt, add_special_tokens=False).ids or [end_of_text]
    tokens = generate(
        model,
        prompt,
        max_new_tokens=request.max_new_tokens,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        seed=request.seed,
        end_of_text=end_of_text,
    )
    return decoded(tokenizer, prompt, tokens)


def load_model(directory: Path, step: int | None = None) -> tuple[GPT, Tokenizer]:
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
    if not isinstance(model, GPT):
        raise ValueError(f"{rundir.config}: model {type(model).__name__} does not generate text")
    model.to(DTYPES[config.engine.precision] if on_gpu else torch.float32)
    load_weights(model, rundir.checkpoints, step)
    return model, tokenizer


def decoded(tokenizer: Tokenizer, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of `tokens` after a prompt, in pieces that hold whole characters.

    Their concatenation is decode(prompt + tokens) without its beginning, decode(prompt). A token may end amid
    the bytes of a character, and what it decodes to depends on the token before (a space, say). So tokens are
    decoded together with the piece before them, and held back until they end with a whole character.
    """
    pending = list(prompt)
    shown = text = tokenizer.decode(pending)
    context = len(pending)
    for token in tokens:
        pending.append(token)
        text = tokenizer.decode(pending)
        if text == shown or text.endswith(BROKEN):
            continue
        yield text[len(shown) :]
        pending = pending[context:]
        context = len(pending)
        shown = text = tokenizer.decode(pending)
    if text != shown:
        yield text[len(shown) :]  # the last bytes are no whole character


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
