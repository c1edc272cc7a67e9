"""What a rank of a run holds in memory, by part, from the shapes of its config alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from data.cli import instantiate
from launch.memory_pass import Pass, one_pass
from launch.memory_state import state_of
from train.config import RunConfig, accumulation
from train.optim.base import Rule
from train.optim.groups import parameter_groups
from train.start import build_model, scales


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank. Gradients, activations and buffers are not at their most at the same time: peak is
    what there is at the fullest moment, which phase names. least: what any ZeRO of that stage needs,
    without this engine's buckets and copies."""

    weights: int
    masters: int
    optimizer: int
    gradients: int
    activations: int
    buffers: int
    host: int
    peak: int
    phase: str
    least: int


class Planned:
    """The memory of a config's runs.

    Args:
        config: micro_batch does not matter.
        ranks: how many share the work.
        vocabulary_size: of the tokenizer; the model's, where it says one, is larger.
        gpu: the kernels of a GPU, and offloaded parts in another memory; else those of a CPU.

    Raises:
        ValueError: what is wrong with the config's model, rule or objective.
    """

    def __init__(self, config: RunConfig, ranks: int, vocabulary_size: int, gpu: bool) -> None:
        self.config, self.ranks, self.gpu = config, ranks, gpu
        self._vocabulary_size = vocabulary_size
        with torch.device("meta"):
            self.model = build_model(config, vocabulary_size)
        objective = instantiate(config.objective, "objective")
        objective.check_model(self.model)
        rule: Rule = instantiate(config.optim, "optim")
        groups = parameter_groups(self.model, rule, scales(config, self.model, vocabulary_size, rule))
        self.state = state_of(config, ranks, gpu, self.model, rule, groups)
        self._passes: dict[int, Pass] = {}

    def at(self, micro_batch: int) -> Memory:
        """With micro batches of so many sequences."""
        state, found = self.state, self._pass(micro_batch)
        always = state.bucket if self.config.engine.zero_stage == 3 else 0
        steps = accumulation(replace(self.config, micro_batch=micro_batch), self.ranks)
        before = state.left if steps > 1 else 0  # of the micro batches before this one
        forward = always + max(found.with_gradients, found.activations + before)
        backward = state.bucket + max(state.overlapped, 0 if state.kept else before) + found.backward
        phases = {
            "forward and backward": state.lasting + state.gathered + state.held + max(forward, backward),
            "reduction": state.lasting + state.bucket + state.reduction,
            "update": state.lasting + always + state.gradients + state.update,
            "building the model": state.start,
        }
        phase = max(phases, key=lambda name: phases[name])
        return Memory(
            weights=state.weights,
            masters=state.masters,
            optimizer=state.optimizer,
            gradients=state.gradients,
            activations=found.activations,
            buffers=max(state.bucket + state.gathered, always + state.update),
            host=state.host,
            peak=phases[phase],
            phase=phase,
            least=state.lasting + max(found.activations, state.own),
        )

    def largest(self, memory: float) -> int:
        """The largest micro batch whose peak is within so many bytes; 0 where one sequence is too many."""
        if self.at(1).peak > memory:
            return 0
        low, high = 1, 2  # a peak grows evenly with the micro batch, but for the loss's chunks
        while self.at(high).peak <= memory:
            each = (self.at(high).peak - self.at(low).peak) / (high - low)
            guess = high + int((memory - self.at(high).peak) / each) if each > 0 else 2 * high
            low, high = high, max(high + 1, min(guess, 64 * high))
        while high - low > 1:
            each = (self.at(high).peak - self.at(low).peak) / (high - low)
            guess = low + int((memory - self.at(low).peak) / each) if each > 0 else (low + high) // 2
            middle = min(max(guess, low + 1), high - 1)
            low, high = (middle, high) if self.at(middle).peak <= memory else (low, middle)
        return low

    def _pass(self, micro_batch: int) -> Pass:
        if micro_batch not in self._passes:
            self._passes[micro_batch] = one_pass(
                self.config, micro_batch, self._vocabulary_size, self.gpu, self.state.kept
            )
        return self._passes[micro_batch]
