"""Starting from the weights of a Hugging Face directory: config.json and safetensors, sharded or not."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

from model.hf import check_state, import_state, matches
from model.hf_dialects import DIALECTS
from model.hf_options import hf_config, model_arguments

KEY = "model.init_from"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
STRETCHING = ("rotary_base", "rotary_scaling")
# Saved with a model of one kind, though only another kind reads it.
UNREAD = {"BertForMaskedLM": ("bert.pooler.", "cls.seq_relationship.")}


def check_pretrained(model: nn.Module, directory: Path, tokenizer: Tokenizer | None = None) -> None:
    """Whether `load_pretrained` can be: from the config and the headers alone, `model` on any device.

    tokenizer: the run's, which has to give every token of the directory's own the same id.

    Raises ValueError in one line that names what differs, or the file that is missing or cannot be read.
    """
    config = _read_json(directory, CONFIG)
    _compare(model, config, directory)
    if tokenizer is not None:
        _compare_tokens(tokenizer, directory)
    shapes: dict[str, list[int]] = {}
    for path in _files(directory):
        with _opened(path) as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.offset_keys()}
    shortened = _shortened(model, shapes)
    shapes |= {name: [length, *shapes[name][1:]] for name, length in shortened.items()}
    try:
        check_state(model, {name: shapes[name] for name in _read(model, config, shapes)})
    except ValueError as error:
        raise ValueError(f"{KEY}: {directory}: {error}") from None


def load_pretrained(model: nn.Module, directory: Path) -> None:
    """Fill `model` with the weights of the directory; its dtype stays. Of a longer table of learned positions
    the first are taken.

    Raises ValueError as `check_pretrained`, and where tensors that have to be equal or zero are not.
    """
    check_pretrained(model, directory)
    config, state = _read_json(directory, CONFIG), dict[str, Tensor]()
    for path in _files(directory):
        with _opened(path) as file:
            state |= {name: file.get_tensor(name) for name in file.offset_keys()}
    shortened = _shortened(model, {name: tensor.shape for name, tensor in state.items()})
    state |= {name: state[name][:length] for name, length in shortened.items()}
    try:
        import_state(model, {name: state[name] for name in _read(model, config, state)})
    except ValueError as error:
        raise ValueError(f"{KEY}: {directory}: {error}") from None


def _compare(model: nn.Module, config: dict[str, Any], directory: Path) -> None:
    """Refuse a directory whose model computes something else, or that has too few positions."""
    own = hf_config(model)
    kind = config.get("model_type", "")
    ignored = DIALECTS[kind].dropouts if kind in DIALECTS else ()  # dropout is for every run to choose
    try:
        theirs = model_arguments({key: value for key, value in config.items() if key not in ignored})
    except (ValueError, TypeError) as error:  # such as text where a number should be
        raise ValueError(f"{KEY}: {directory / CONFIG}: {error}") from None
    ours = model_arguments({key: value for key, value in own.items() if key not in ignored})
    if theirs["_target_"] != ours["_target_"]:
        held = ", ".join(config.get("architectures") or [DIALECTS[kind].architecture])
        raise ValueError(f"{KEY}: {directory} holds a {held}, the model is a {type(model).__name__}")
    if theirs["vocabulary_size"] != ours["vocabulary_size"]:
        size = theirs["vocabulary_size"]
        raise ValueError(
            f"model.vocabulary_size: {ours['vocabulary_size']} here, {size} in {directory}; set"
            f" model.vocabulary_size={size}, with a tokenizer of at most that many tokens"
        )
    free = {"sequence_length", "vocabulary_size", "dropout"}
    if ours.get("pair_head"):
        free.add("pair_head")  # the files say whether they have one; the config need not
    if kind != "t5":  # whose positions are only distances
        free |= _compare_lengths(ours, theirs, directory)
    keys = [key for key in sorted((ours.keys() & theirs.keys()) - free) if ours[key] != theirs[key]]
    if keys:
        first, advice = keys[0], " ".join(f"model.{key}={_in_yaml(theirs[key])}" for key in keys)
        here, there = _in_yaml(ours[first]), _in_yaml(theirs[first])
        raise ValueError(f"model.{first}: {here} here, {there} in {directory}; set {advice}")


def _compare_tokens(tokenizer: Tokenizer, directory: Path) -> None:
    """Refuse a directory whose weights have learnt other tokens than the run's tokenizer makes."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return
    ours, theirs = tokenizer.get_vocab(), Tokenizer.from_file(str(path)).get_vocab()
    differ = [token for token, id_ in theirs.items() if ours.get(token) != id_]
    if differ:
        raise ValueError(
            f"{KEY}: {directory} has another tokenizer than the run ({len(differ)} of its {len(theirs)}"
            f" tokens have another id here); set tokenizer=existing tokenizer.path={path}"
        )


def _in_yaml(value: Any) -> str:
    """As a command line takes it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_in_yaml(part)}" for key, part in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _compare_lengths(ours: dict[str, Any], theirs: dict[str, Any], directory: Path) -> set[str]:
    """The keys that may differ, as rotary positions do where they are stretched over longer texts."""
    length, most = ours["sequence_length"], theirs["sequence_length"]
    if length <= most:
        return set()
    rotary = ours["position"] == theirs["position"] == "rotary"
    if rotary and any(ours[key] != theirs[key] for key in STRETCHING):
        return set(STRETCHING)
    advice = ", or stretch them by model.rotary_scaling or model.rotary_base" if rotary else ""
    raise ValueError(
        f"model.sequence_length: {length} exceeds the {most} positions of {directory}; set at most"
        f" {most}{advice}"
    )


def _shortened(model: nn.Module, shapes: dict[str, Any]) -> dict[str, int]:
    """The tensors of which only the first rows are taken, and how many: learned positions."""
    tables = [match for match in matches(model) if match.ours == "positions.weight"]
    return {
        name: match.shape[0]
        for match in tables
        for name in shapes
        if match.theirs[0].endswith(name) and shapes[name][0] > match.shape[0]
    }


def _read(model: nn.Module, config: dict[str, Any], names: Iterable[str]) -> list[str]:
    """The names without those that the directory's own architecture does not read either."""
    unread: tuple[str, ...] = ()
    if not getattr(model, "pair_head", None):
        unread = UNREAD.get((config.get("architectures") or [""])[0], ())
    return [name for name in names if not name.startswith(unread)]


def _files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if not (directory / INDEX).is_file():
        raise ValueError(
            f"{KEY}: {directory} has neither {WEIGHTS} nor {INDEX}; save the model as safetensors"
        )
    try:
        names = sorted(set(_read_json(directory, INDEX)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError):
        raise ValueError(f"{KEY}: {directory / INDEX} has no weight_map") from None
    return [directory / name for name in names]


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{KEY}: {path} cannot be read: {str(error).splitlines()[0]}") from None


def _read_json(directory: Path, name: str) -> dict[str, Any]:
    path = directory / name
    if not path.is_file():
        raise ValueError(f"{KEY}: {path} is not a file; name a directory of a Hugging Face model")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{KEY}: {path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{KEY}: {path} holds no mapping")
    return content
