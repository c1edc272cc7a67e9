"""Rules that look at whole parameters, under any sharding: each is stepped at the one rank that owns it.

The gradients, reduced and clipped, are brought together at the owners, where a library's optimizer steps
whole parameters and keeps what it knows of them; the new weights go back to where their shares lie.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

OURS = ("params", "names", "whole")  # in a group; all else is the library's


@dataclass(frozen=True)
class Piece:
    """The share of a parameter that lies on this rank.

    holder: the fp32 weights that it lies in, which the optimizer knows, of any shape. offset: where in them.
    start: where in the parameter. count: elements.
    """

    holder: Tensor
    offset: int
    start: int
    count: int

    def of(self, tensor: Tensor) -> Tensor:
        """The share [count] in a tensor that lies as the holder does."""
        return tensor.view(-1).narrow(0, self.offset, self.count)

    def within(self, whole: Tensor) -> Tensor:
        """The share [count] in the whole parameter, flat."""
        return whole.narrow(0, self.start, self.count)


def owners(sizes: dict[str, int], ranks: int) -> dict[str, int]:
    """The rank that owns each parameter: the largest first, each to the one that has least by then."""
    held = [0] * ranks
    found = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        found[name] = held.index(min(held))
        held[found[name]] += sizes[name]
    return found


class Whole:
    """Steps the parameters of some groups whole.

    Args:
        groups: the parameters that are stepped here, with their "names" and peak "lr".
        build: makes the library's optimizer of groups like these.
        counters: entries of its groups in which that counts.
        piece: what lies of a parameter, by name, on this rank.
        ranks, rank: how many there are, and which this is. device: where owners compute.
        replicated: every rank holds all gradients, whole.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        counters: tuple[str, ...],
        piece: Callable[[str], Piece | None],
        shapes: dict[str, torch.Size],
        *,
        ranks: int,
        rank: int,
        device: torch.device,
        replicated: bool,
    ) -> None:
        groups = list(groups)
        self._piece, self._shapes, self._counters = piece, shapes, counters
        self._ranks, self._rank, self._device, self._replicated = ranks, rank, device, replicated
        sizes = {name: shapes[name].numel() for group in groups for name in group["names"]}
        self.owner = owners(sizes, ranks)
        self._own = {
            name: nn.Parameter(torch.empty(shapes[name], device=device))
            for name, owner in self.owner.items()
            if owner == rank
        }
        self._groups: dict[str, dict[str, Any]] = {}  # of the library's optimizer, by their first name
        inner = []
        for group in groups:
            mine = [self._own[name] for name in group["names"] if name in self._own]
            settings = {key: value for key, value in group.items() if key not in OURS}
            if mine:
                inner.append(settings | {"params": mine, "first": group["names"][0]})
        self._optimizer = build(inner) if inner else None
        if self._optimizer is not None:
            self._groups = {group["first"]: group for group in self._optimizer.param_groups}
        self._release()

    @torch.no_grad()
    def step(self, group: dict[str, Any]) -> None:
        """One step of a group's parameters, from the gradients in their holders. All ranks call it."""
        by_owner: list[list[str]] = [[] for _ in range(self._ranks)]
        for name in group["names"]:
            by_owner[self.owner[name]].append(name)
        mine = None
        for owner, names in enumerate(by_owner):
            if names and (owner == self._rank or not self._replicated):
                weights_and_gradients = self._gathered(names, owner)
                if owner == self._rank:
                    mine = weights_and_gradients
        if mine is not None:
            self._update(group, by_owner[self._rank], *mine)
        for owner, names in enumerate(by_owner):
            if names:
                self._deal_out(names, owner, mine[0] if mine is not None and owner == self._rank else None)

    def state(self) -> dict[str, Any]:
        """What the owner keeps, in plain containers: {"states": by name, "counters": by group}."""
        if self._optimizer is None:
            return {"states": {}, "counters": {}}
        counted = {
            first: {key: group[key] for key in self._counters if key in group}
            for first, group in self._groups.items()
        }
        states = {
            name: dict(self._optimizer.state[parameter])
            for name, parameter in self._own.items()
            if parameter in self._optimizer.state
        }
        return {"states": states, "counters": counted}

    def load_state(self, saved: Iterable[dict[str, Any]]) -> None:
        """Take what is this rank's from the states of all owners, in whatever world these were."""
        for one in saved:
            for name, state in one["states"].items():
                if name in self._own:
                    assert self._optimizer is not None
                    self._optimizer.state[self._own[name]] = _on(state, self._device)
            for first, counted in one["counters"].items():
                if first in self._groups:
                    self._groups[first].update(counted)

    def count_steps(self) -> Counter[str]:
        """How often the library's optimizer steps each parameter from now on."""
        counts: Counter[str] = Counter()
        names = {id(parameter): name for name, parameter in self._own.items()}

        def step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            counts.update(names[id(p)] for group in optimizer.param_groups for p in group["params"])

        if self._optimizer is not None:
            self._optimizer.register_step_post_hook(step)
        return counts

    def tensors(self) -> list[Tensor]:
        """All that is kept from step to step."""
        states = self._optimizer.state.values() if self._optimizer is not None else ()
        return [tensor for state in states for tensor in _tensors(state)]

    def _gathered(self, names: list[str], owner: int) -> tuple[Tensor, Tensor]:
        """At the owner, the fp32 weights and gradients of its parameters, flat, one after the other."""
        both = torch.zeros(2, self._size(names), device=self._device)
        offset = 0
        for name in names:
            size = self._shapes[name].numel()
            piece = self._piece(name)
            if piece is not None:
                assert piece.holder.grad is not None
                for row, tensor in enumerate((piece.holder.data, piece.holder.grad)):
                    piece.within(both[row].narrow(0, offset, size)).copy_(piece.of(tensor))
            offset += size
        if not self._replicated and self._ranks > 1:
            dist.reduce(both, owner)  # each element comes from one rank, the others add zeros
        return both[0], both[1]

    def _update(self, group: dict[str, Any], names: list[str], weights: Tensor, gradients: Tensor) -> None:
        """Step this rank's parameters of a group; the new weights stand in the place of the old."""
        assert self._optimizer is not None
        inner = self._groups[group["names"][0]]
        inner["lr"] = group["lr"]
        offset = 0
        for name in names:
            parameter, shape = self._own[name], self._shapes[name]
            parameter.data = weights.narrow(0, offset, shape.numel()).view(shape)
            parameter.grad = gradients.narrow(0, offset, shape.numel()).view(shape)
            offset += shape.numel()
        every = self._optimizer.param_groups
        self._optimizer.param_groups = [inner]
        self._optimizer.step()
        self._optimizer.param_groups = every
        self._release()

    def _deal_out(self, names: list[str], owner: int, weights: Tensor | None) -> None:
        if weights is None:
            weights = torch.empty(self._size(names), device=self._device)
        if self._ranks > 1:
            dist.broadcast(weights, owner)
        offset = 0
        for name in names:
            size = self._shapes[name].numel()
            piece = self._piece(name)
            if piece is not None:
                piece.of(piece.holder.data).copy_(piece.within(weights.narrow(0, offset, size)))
            offset += size

    def _release(self) -> None:
        """Hold no weights between steps."""
        for parameter in self._own.values():
            parameter.data, parameter.grad = torch.empty(0, device=self._device), None

    def _size(self, names: list[str]) -> int:
        return sum(self._shapes[name].numel() for name in names)


def _on(state: Any, device: torch.device) -> Any:
    if torch.is_tensor(state):
        return state.to(device, copy=True)
    if isinstance(state, dict):
        return {key: _on(value, device) for key, value in state.items()}
    if isinstance(state, list):
        return [_on(value, device) for value in state]
    return state


def _tensors(state: Any) -> Iterable[Tensor]:
    if torch.is_tensor(state):
        yield state
    elif isinstance(state, dict | list):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors(value)
