"""A run's loss on its validation text under an objective, its own or another one of its family.

    python -m launch.evaluate run=runs/demo
    python -m launch.evaluate run=runs/ernie-tiny objective=knowledge-entities seed=1

On a GPU the model computes in the run's precision, on a CPU in fp32.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track

from data.cli import instantiate, main_guard, one_line_errors
from data.loader import evaluation_batches, pack
from data.shards import TokenStream
from launch.generate import load_model
from launch.request import CONF, require_run, step_of
from train.config import load
from train.eval.evaluate import Evaluation, evaluate
from train.rundir import RunDir


def evaluate_run(directory: Path, objective: Any = None, step: int | None = None) -> Evaluation:
    """Evaluate a run's checkpoint (the newest, or that of `step`) on its whole validation split.

    objective: one of train.objective; None means the run's own. Raises ValueError in one line where the run
    has no checkpoint, or the objective does not fit its model or tokenizer.
    """
    config = load(RunDir(directory).config)
    objective = objective or instantiate(config.objective, "objective")
    model, _ = load_model(directory, step)
    prepared = RunDir(directory).prepared()
    try:
        objective.check_model(model)
        collate = objective.collator(prepared, config.sequence_length, config.packing.isolate)
    except ValueError as error:  # whose advice is for a run that has not begun
        raise ValueError(f"objective: {directory} cannot be scored on it: {error}") from None
    validation = TokenStream(prepared, "validation")
    packing = pack(validation, config.packing.method, collate, training=False)
    size = config.micro_batch or config.global_batch
    batches = evaluation_batches(packing, collate, micro_batch=size, rank=0, world_size=1)
    device = next(model.parameters()).device

    @torch.no_grad()
    def score(batch: dict[str, torch.Tensor]) -> Any:
        return objective(model, {key: tensor.to(device) for key, tensor in batch.items()})

    def floats(*values: torch.Tensor) -> list[float]:
        return [float(value) for value in values]

    total = -(-packing.samples // size)
    shown = track(batches, "evaluate", total, transient=True, console=Console(stderr=True))
    return evaluate(score, floats, shown, validation.bytes, objective.predicts_text)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="evaluate")
@one_line_errors
def main(node: DictConfig) -> None:
    require_run(node)
    step = step_of(node.checkpoint)
    objective = instantiate(node.objective, "objective") if node.get("objective") else None
    result = dataclasses.asdict(evaluate_run(Path(node.run), objective, step))
    metrics = result.pop("metrics")
    for name, value in (result | metrics).items():
        if value is not None:
            print(f"{name}: {value:,.6g}" if isinstance(value, float) else f"{name}: {value:,}")


if __name__ == "__main__":
    main_guard(main)
