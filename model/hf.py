"""Weights to and from the models of Hugging Face transformers: GPT-2, Llama, GPT-NeoX, BERT and T5.

A state maps names to tensors, as in a model.safetensors there. Which tensor is which is in `model.hf_keys`;
configurations are in `model.hf_options`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from model import hf_keys
from model.hf_keys import How, Key, Table
from model.hf_options import model_type

# As BERT's first files have them.
RENAMED = ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias"))


@dataclass(frozen=True)
class Match:
    """One tensor of ours, by name and shape, and theirs. absent: we have none, and theirs is zero."""

    ours: str
    shape: torch.Size
    theirs: tuple[str, ...]
    how: How
    also: tuple[str, ...]
    copies: tuple[str, ...]
    absent: bool


def export_state(model: nn.Module) -> dict[str, Tensor]:
    """The state for transformers; a tied tensor is in it once, by the name that transformers ties others to.

    Raises ValueError in one line for an option of the model, or a parameter, that has no equal there.
    """
    own, state = dict(model.named_parameters()), dict[str, Tensor]()
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        for match in matches(model):
            ours = torch.zeros(match.shape, dtype=dtype) if match.absent else own[match.ours]
            for name, tensor in zip(match.theirs, match.how.split(ours, model), strict=True):
                state[name] = tensor.clone(memory_format=torch.contiguous_format)
            state |= {name: state[match.theirs[0]].clone() for name in match.copies}
    return state


def import_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a state of transformers into `model`; the dtype stays the model's.

    A file's older names are known, and buffers in it are passed over. Raises ValueError in one line as
    `check_state`, and for tied tensors that differ, or ones that must be zero and are not.
    """
    names = check_state(model, {name: tensor.shape for name, tensor in state.items()})
    own = dict(model.named_parameters())
    with torch.no_grad():
        for match in matches(model):
            found = [[state[names[name]] for name in same if name in names] for same in _same(match)]
            for same, tensors in zip(_same(match), found, strict=True):
                if not all(torch.equal(tensors[0], tensor) for tensor in tensors[1:]):
                    raise ValueError(f"{' and '.join(same)}: differ, but are one here; set model.tied=false")
            theirs = [tensors[0] for tensors in found]
            if not match.absent:
                own[match.ours].copy_(match.how.join(theirs, model))
            elif any(tensor.any() for tensor in theirs):
                raise ValueError(f"{match.theirs[0]}: is not zero, and this model has no {match.ours}")


def check_state(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """The names in `shapes` by their present-day name, if tensors of such shapes are just what `model` needs.

    The model may be on the meta device. Raises ValueError in one line that names both sides: a tensor that is
    missing, one that has no place, or a shape that differs.
    """
    table, names = table_of(model), {}
    for name in shapes:
        names[_present_day(name, shapes, table)] = name
    kind, read = model_type(model), set()
    for match in matches(model):
        pieces = match.how.split(torch.empty(match.shape, device="meta"), model)
        for same, piece in zip(_same(match), pieces, strict=True):
            there = [name for name in same if name in names]
            if not there:
                raise ValueError(f"{same[0]}: is missing, and {match.ours} of this model is made of it")
            for name in there:
                found = tuple(shapes[names[name]])
                if found != tuple(piece.shape):
                    raise ValueError(
                        f"{name}: has shape {list(found)}, but {match.ours} of this model, of shape"
                        f" {list(match.shape)}, needs {list(piece.shape)}"
                    )
            read.update(there)
        read.update(match.copies)
    left = [name for name in names if name not in read and not _skipped(name, table)]
    if left:
        others = f" (nor have {len(left) - 1} more)" if len(left) > 1 else ""
        raise ValueError(f"{left[0]}: has no place in this {type(model).__name__} as a {kind} model{others}")
    return names


def matches(model: Any) -> list[Match]:
    """Every parameter of the model with its tensors in transformers.

    Raises ValueError where a parameter has none.
    """
    table, own = table_of(model), dict(model.named_parameters())
    found = [match for key in table.keys for match in _expand(model, own, key, table)]
    left = own.keys() - {match.ours for match in found}
    if left:
        raise ValueError(f"{min(left)}: this parameter has no equal in transformers' {model_type(model)}")
    if not model.head.tied:
        return found
    head = next(key for key in table.keys if key.ours == "head" and "weight" in key.parts)
    tied = tuple(f"{name}.weight" for name in (*head.theirs, *head.also))
    table_index = [match.ours for match in found].index("embedding.weight")
    found[table_index] = replace(found[table_index], also=found[table_index].also + tied)
    return found


def table_of(model: Any) -> Table:
    """The key table for the model. Raises ValueError in one line for an option without equal."""
    kind = model_type(model)
    if kind == "bert":
        return hf_keys.BERT_TIED if model.head.tied else hf_keys.BERT_UNTIED
    if kind == "t5":
        return hf_keys.T5_GATED if model.blocks[0].feedforward.gated else hf_keys.T5
    return {"gpt2": hf_keys.GPT2, "llama": hf_keys.LLAMA, "gpt_neox": hf_keys.GPT_NEOX}[kind]


def _expand(model: nn.Module, own: dict[str, nn.Parameter], key: Key, table: Table) -> Iterator[Match]:
    """The matches of a key, for every layer and part that there is here, or has to be there."""
    prefix, _, rest = key.ours.partition("{layer}")
    layers = {name[len(prefix) :].split(".")[0] for name in own if name.startswith(prefix)}
    for layer in range(len(layers) if rest else 1):
        for part in key.parts:
            ours, *_ = _names((key.ours,), layer, part)
            theirs, also, copies = (_names(m, layer, part) for m in (key.theirs, key.also, key.copies))
            shape = own[ours].shape if ours in own else _absent_shape(model, ours, table)
            if shape is not None:
                yield Match(ours, shape, theirs, key.how, also, copies, absent=ours not in own)


def _names(modules: Sequence[str], layer: int, part: str) -> tuple[str, ...]:
    return tuple(f"{module}.{part}".format(layer=layer) for module in modules)


def _absent_shape(model: Any, name: str, table: Table) -> torch.Size | None:
    """Of a parameter that only they have, as zeros; None if they have none either."""
    module, _, part = name.rpartition(".")
    if name in table.zeros:  # segments: a single one, the same for all tokens
        return torch.Size((1, model.width))
    there = dict(model.named_parameters(remove_duplicate=False)).get(f"{module}.weight")
    return there.shape[:1] if part in table.zeros and there is not None else None


def _same(match: Match) -> list[tuple[str, ...]]:
    """For each tensor that ours is made of, the names that it may have."""
    return [(match.theirs[0], *match.also)] + [(name,) for name in match.theirs[1:]]


def _present_day(name: str, names: Mapping[str, Sequence[int]], table: Table) -> str:
    for old, new in RENAMED:
        if name.endswith(old):
            name = name.removesuffix(old) + new
    bare = not any(other.startswith(table.prefix) for other in names)
    return table.prefix + name if bare and not name.startswith(table.heads) else name


def _skipped(name: str, table: Table) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in table.skipped)
