"""Masked language modelling with knowledge masking."""

from __future__ import annotations

from pathlib import Path

from data.collate.knowledge import LEVELS, Knowledge
from data.tokenizer import load_tokenizer
from data.units.base import Units
from train.objective.masked import MaskedLM


class KnowledgeMaskedLM(MaskedLM):
    """Cross-entropy of the masked tokens given all others, where words, phrases and entities are masked whole
    (ERNIE 1.0: Sun et al. 2019, arXiv 1904.09223, section 3.2).

    stages: by level (word, phrase, entity) the training step from which it takes part; in evaluation all do
    but those without a step (null). With {entity: 0} alone nothing but entities is masked and scored. words,
    phrases, entities: what finds the units of a level, out of data.units; the tokenizer's text has words of
    its own. rate, mask_share and random_share: as in MaskedLM.
    Raises ValueError where an argument cannot be.
    """

    def __init__(
        self,
        seed: int,
        stages: dict[str, int | None],
        rate: float = 0.15,
        mask_share: float = 0.8,
        random_share: float = 0.1,
        words: Units | None = None,
        phrases: Units | None = None,
        entities: Units | None = None,
    ) -> None:
        super().__init__(seed, rate, mask_share, random_share, unit="word")
        given = {"word": words, "phrase": phrases, "entity": entities}
        self.units = {level: units for level, units in given.items() if units is not None}
        self.stages = {level: step for level, step in stages.items() if step is not None}
        self._check()

    def collator(self, prepared: Path, sequence_length: int, isolate: bool) -> Knowledge:
        """As of Objective. Looks at the beginning of the training text, which costs seconds where phrases are
        mined for the first time. Raises ValueError where units match nothing in it."""
        return Knowledge(
            load_tokenizer(prepared / "tokenizer"),
            sequence_length,
            stages=self.stages,
            finders={level: units.in_use(prepared, _key(level)) for level, units in self.units.items()},
            seed=self.seed,
            rate=self.rate,
            mask_share=self.mask_share,
            random_share=self.random_share,
            isolate=isolate,
        )

    def inputs(self, prepared: Path) -> dict[str, str]:
        return {_key(level): units.identity(prepared) for level, units in self.units.items()}

    def _check(self) -> None:
        for level, step in self.stages.items():
            if level not in LEVELS:
                raise ValueError(f"objective.stages.{level}: no such level; there are {', '.join(LEVELS)}")
            if not isinstance(step, int) or isinstance(step, bool) or step < 0:
                raise ValueError(f"objective.stages.{level}: {step!r} is not a training step, 0 or later")
            if level not in self.units and level != "word":
                raise ValueError(f"objective.stages.{level}: nothing finds its units; set {_key(level)}")
        if not self.stages or min(self.stages.values()) > 0:
            raise ValueError("objective.stages: nothing is masked at step 0; let one level begin there")
        for level, units in self.units.items():
            if not isinstance(units, Units):
                raise ValueError(f"{_key(level)}: {units!r} finds no units; set {_key(level)}._target_")
            if level not in self.stages:
                raise ValueError(f"{_key(level)}: is never used; give objective.stages.{level} a step")
            units.check(_key(level))


def _key(level: str) -> str:
    """The place of a level's units in the configuration."""
    return {"word": "objective.words", "phrase": "objective.phrases", "entity": "objective.entities"}[level]
