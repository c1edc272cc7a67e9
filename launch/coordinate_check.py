"""Do activations and their changes keep their size as a model grows? A parametrization's coordinate check.

    python -m launch.coordinate_check [--widths 64 128 256 512] [--steps 5] [--seeds 4] [--without PART …]
        [--directory runs/coordinate-check] [experiment=… parametrization=mup key=value …]
    python -m launch.coordinate_check --depths 4 8 16 32 parametrization=completep

Trains every size for a few steps, in fp32 on one process and on the same batches, and measures at each layer
the mean magnitude of what comes out, and of what has changed of it since the start (muP, arXiv 2203.03466,
appendix D.1). The slope of its logarithm against that of the size says how it grows: it passes where every
slope after step 2 is within BOUND of 0. The smallest size is the parametrization's base.
"""

from __future__ import annotations

import json
import math
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from plotly.subplots import make_subplots
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from data.cli import instantiate, main_guard
from data.files import write
from data.loader import Loader
from data.prepare import prepare
from data.shards import read_manifest
from launch.request import CONF
from model import attention, t5_block
from model.attention import attend
from model.heads import LMHead
from train.config import RunConfig, from_hydra
from train.optim.groups import parameter_groups
from train.parametrization import ATTENTION, PARTS
from train.start import build_model, scales
from train.supply import supply

BOUND, AFTER = 0.1, 2  # of a slope; steps after which it holds
# Characters, that come back often, and a decay and an epsilon that can be seen within a few steps.
SETTLED = [
    *("model=gpt-nano", "model.position=learned", "model.heads=1", "tokenizer=characters"),
    *("sequence_length=64", "global_batch=16", "optim.learning_rate=0.002", "optim.weight_decay=20"),
]
EPS = 1e-5
KINDS = ("size", "change")
# Those of the first attention, and of them the change alone: what they start with vanishes under muP as heads
# grow wide (appendix D.2). In later layers the noise of the start is above the bound with a few seeds.
SCORES = "scores"


@dataclass(frozen=True)
class Slopes:
    """By kind, layer: the slope at every step from AFTER on."""

    by_layer: dict[str, dict[str, list[float]]]

    def worst(self) -> tuple[float, str, str]:
        """The steepest: slope, kind, layer."""
        every = [
            (slope, kind, layer)
            for kind, layers in self.by_layer.items()
            for layer, slopes in layers.items()
            for slope in slopes
        ]
        return max(every, key=lambda found: steepness(found[0]))

    @property
    def passed(self) -> bool:
        return steepness(self.worst()[0]) <= BOUND


def steepness(slope: float) -> float:
    """Infinite where there is none, for a layer that diverged or that nothing changed."""
    return abs(slope) if math.isfinite(slope) else math.inf


def check(
    overrides: Sequence[str], key: str, values: Sequence[int], steps: int, seeds: int, without: Sequence[str]
) -> tuple[dict[str, Any], Slopes]:
    """Measure every size: {kind: {layer: [sizes, steps + 1]}}, the mean over seeds; and the slopes."""
    found: dict[str, dict[str, list[np.ndarray]]] = {kind: {} for kind in KINDS}
    for value in track(values, description=f"{key}: {', '.join(map(str, values))}", transient=True):
        runs = [
            measure(sized(overrides, key, value, min(values), without, seed), steps) for seed in range(seeds)
        ]
        for kind in KINDS:
            for layer in runs[0][kind]:
                name = named(layer, value) if key == "layers" else layer
                if name is not None:
                    mean = np.mean([run[kind][layer] for run in runs], axis=0)
                    found[kind].setdefault(name, []).append(mean)
    sizes = {
        kind: {layer: np.array(rows) for layer, rows in layers.items()} for kind, layers in found.items()
    }
    x = np.log2(values)
    slopes = {
        kind: {
            layer: [float(np.polyfit(x, np.log2(rows[:, step]), 1)[0]) for step in range(AFTER, steps + 1)]
            for layer, rows in layers.items()
        }
        for kind, layers in sizes.items()
    }
    return sizes, Slopes(slopes)


def sized(
    overrides: Sequence[str], key: str, value: int, base: int, without: Sequence[str], seed: int
) -> RunConfig:
    """The config of one size. Raises ValueError in one line."""
    own = [f"model.{key}={value}", f"seed={seed}", "engine.precision=fp32", "name=coordinate-check"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("config", overrides=[*SETTLED, *overrides, *own])
    if node.parametrization.get("base"):
        deep = "layers" in node.parametrization.base
        if key == "layers" and not deep:
            raise ValueError("--depths: muP keeps the depth; choose parametrization=completep")
        sizes = ("width", "layers") if deep else ("width",)
        node.parametrization.base = {size: node.model[size] for size in sizes} | {key: base}
        OmegaConf.update(node, "parametrization.without", list(without), force_add=True)
    if "eps" in node.optim:
        node.optim.eps = EPS
    return from_hydra(node)


def measure(config: RunConfig, steps: int) -> dict[str, dict[str, np.ndarray]]:
    """By kind and layer, the mean magnitudes before training and after each step [steps + 1]."""
    objective, rule = instantiate(config.objective, "objective"), instantiate(config.optim, "optim")
    prepared = prepare(OmegaConf.create(config.data), OmegaConf.create(config.tokenizer), progress=False)
    plan = supply(config, objective, prepared)
    vocabulary = read_manifest(prepared)["vocabulary_size"]
    model = build_model(config, vocabulary)
    optimizers = rule.optimizers(parameter_groups(model, rule, scales(config, model, vocabulary, rule)))
    batch_size: dict[str, Any] = {"micro_batch": config.global_batch, "rank": 0, "world_size": 1}
    loader = Loader(plan.packing, plan.order, plan.collate, ahead=0, **batch_size)
    (probe,) = loader.step(0)
    begin = outputs(model, objective, probe)
    rows: dict[str, dict[str, list[float]]] = {kind: {layer: [] for layer in begin} for kind in KINDS}
    del rows["size"][SCORES]
    for step in range(steps + 1):
        for layer, value in (outputs(model, objective, probe) if step else begin).items():
            if layer != SCORES:
                rows["size"][layer].append(value.abs().mean().item())
            rows["change"][layer].append((value - begin[layer]).abs().mean().item() or math.nan)
        (batch,) = loader.step(step)
        model.train()
        loss_sum, count, _ = objective(model, batch)
        (loss_sum / count).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    loader.close()
    return {
        kind: {layer: np.array(values) for layer, values in layers.items()} for kind, layers in rows.items()
    }


@torch.no_grad()
def outputs(model: nn.Module, objective: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What comes out of every layer: the embedding, branches before the multiplier by which a deeper model
    adds less of each, and the logits, by name; and the scores of the first attention, before its softmax."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def see(module: nn.Module, inputs: Any, output: Tensor) -> None:
            found[name] = output.detach() / getattr(getattr(module, "project", None), "multiplier", 1.0)

        return see

    def logits(module: LMHead, inputs: tuple[Any, ...], output: Any) -> None:
        found["logits"] = module.forward(inputs[0])

    hooks = [module.register_forward_hook(keep(name)) for name, module in layers(model)]
    head = next(module for module in model.modules() if isinstance(module, LMHead))
    hooks.append(head.register_forward_hook(logits))
    model.eval()
    with watched(lambda scores: found.setdefault(SCORES, scores)):
        objective(model, batch)
    for hook in hooks:
        hook.remove()
    return found


@contextmanager
def watched(see: Callable[[Tensor], object]) -> Iterator[None]:
    """A block in which `see` is given the scores of every attention, those that are not masked [B, H, …]."""

    def scored(
        q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, causal: bool, *more: Any, **own: Any
    ) -> Tensor:
        k_BSHK = k_BSGK.repeat_interleave(q_BTHK.shape[2] // k_BSGK.shape[2], dim=2)
        scores_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) * own["scale"]
        seen = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool)
        see(scores_BHTS[..., seen.tril() if causal else seen])
        return attend(q_BTHK, k_BSGK, v_BSGK, causal, *more, **own)

    for module in (attention, t5_block):
        setattr(module, "attend", scored)  # noqa: B010 - the checker of types knows its signature
    try:
        yield
    finally:
        for module in (attention, t5_block):
            setattr(module, "attend", attend)  # noqa: B010


def named(name: str, depth: int) -> str | None:
    """A layer's name at every depth: those of the first and of the last block have one, the others none."""
    match = re.search(r"\.(\d+)\.", name)
    if match is None or match[1] == "0":
        return name
    return re.sub(r"\.\d+\.", ".last.", name) if int(match[1]) == depth - 1 else None


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The token table, and the attention and feed-forward of every block."""
    for name, module in model.named_modules():
        if name == "embedding" or isinstance(module, ATTENTION) or name.endswith(".feedforward"):
            yield name, module


def figure(sizes: dict[str, Any], slopes: Slopes, key: str, values: Sequence[int], title: str) -> go.Figure:
    """Every layer's magnitude against the size, at each step, and the slopes."""
    plot = make_subplots(rows=1, cols=2, subplot_titles=["after the last step", "change since the start"])
    for column, kind in enumerate(KINDS, start=1):
        for layer, rows in sizes[kind].items():
            worst = max(slopes.by_layer[kind][layer], key=steepness)
            outside = steepness(worst) > BOUND
            plot.add_scatter(
                x=list(values), y=rows[:, -1], mode="lines+markers", row=1, col=column,
                name=f"{layer} ({worst:+.2f})", legend=f"legend{column}",
                line={"color": "#D55E00" if outside else "#0072B2"}, opacity=0.8,
            )  # fmt: skip
    plot.update_xaxes(type="log", title=key, tickvals=list(values))
    plot.update_yaxes(type="log")
    plot.update_layout(
        title=title, template="plotly_white", height=900,
        legend1={"x": 0, "y": -0.12, "yanchor": "top", "title": "steepest slope after step 2"},
        legend2={"x": 0.55, "y": -0.12, "yanchor": "top"},
    )  # fmt: skip
    return plot


def table(slopes: Slopes) -> Table:
    shown = Table("layer", *(f"steepest slope of the {kind}" for kind in KINDS), title="Coordinate check")
    for layer in slopes.by_layer["change"]:
        found = (slopes.by_layer[kind].get(layer) for kind in KINDS)
        shown.add_row(layer, *(_cell(max(own, key=steepness)) if own else "" for own in found))
    return shown


def _cell(slope: float) -> str:
    return f"{'[red]' if steepness(slope) > BOUND else ''}{slope:+.3f}"


def main() -> None:
    parser = ArgumentParser(
        prog="python -m launch.coordinate_check",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--depths", type=int, nargs="+", help="these layers, at one width")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--without", nargs="+", default=[], choices=PARTS, help="multipliers to leave out")
    parser.add_argument("--directory", type=Path, default=Path("runs/coordinate-check"))
    parser.add_argument("overrides", nargs="*", help="as of python -m train")
    arguments = parser.parse_intermixed_args()
    key, values = ("layers", arguments.depths) if arguments.depths else ("width", arguments.widths)
    if len(set(values)) < 2:
        raise ValueError(f"--{'depths' if arguments.depths else 'widths'}: give two sizes or more")
    if arguments.steps < AFTER:
        raise ValueError(f"--steps: {arguments.steps} is below {AFTER}, after which slopes are judged")
    more = (arguments.steps, arguments.seeds, arguments.without)
    sizes, slopes = check(arguments.overrides, key, values, *more)
    slope, kind, layer = slopes.worst()
    verdict = f"{'passed' if slopes.passed else 'FAILED'}: steepest slope {slope:+.3f} ({kind} of {layer})"
    content = {
        key: list(values),
        "passed": slopes.passed,
        "slopes": slopes.by_layer,
        "magnitudes": {
            kind: {name: rows.tolist() for name, rows in own.items()} for kind, own in sizes.items()
        },
    }
    arguments.directory.mkdir(parents=True, exist_ok=True)
    write(arguments.directory / "slopes.json", json.dumps(content, indent=1) + "\n")
    title = (
        f"{' '.join(arguments.overrides) or 'standard'}, without {arguments.without or 'nothing'}: {verdict}"
    )
    page = arguments.directory / "report.html"
    figure(sizes, slopes, key, values, title).write_html(page, include_plotlyjs=True)
    console = Console(highlight=False)
    console.print(table(slopes))
    console.print(f"{verdict}\n{page}")
    if not slopes.passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main_guard(main)
