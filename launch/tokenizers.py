"""Which tokenizer, and of what size? Several are trained on a sample of a corpus, and compared on held-out
text.

    python -m launch.tokenizers data=python-library [algorithms=[bpe,unigram]] [sizes=[1024,4096]]
        [sample_bytes=20_000_000] [steps=400] [seeds=2] [context_bytes=512] [key=value …]

How short each makes the text (bytes per token, by source and language too), what it cannot spell, how much of
its vocabulary is used, how fast it is; and what a small model reaches with it in bits per byte, trained and
evaluated by `train`, as many runs at a time as there are cores. Held equal are the model without its token
table, the number of steps, and the bytes of text in a sequence and so in a step and a run: a tokenizer that
makes text shorter gets a shorter sequence_length. Vocabularies differ, and with them parameters and compute,
which are reported.

A run that is there is not trained again. Writes results.json and report.html into the directory.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from data.cli import instantiate, main_guard, one_line_errors
from data.prepare import prepare
from data.shards import TokenStream
from data.tokenizer import load_tokenizer
from launch.overrides import as_typed, refuse, split
from launch.report_page import count
from launch.request import CONF
from launch.study import Planned, Trained, run_all
from launch.study_page import written
from launch.tokenizer_page import bits, page
from launch.tokenizer_text import Piece, guesses_languages, held_out, measure, speeds
from train.config import load
from train.ranks import end_with
from train.rundir import RunDir

# Keys of a run that the study sets by itself, and what to set instead.
OWN = {
    "tokenizer": "algorithms and sizes",
    "sequence_length": "context_bytes",
    "seed": "seeds",
    "horizon": "steps",
}


@dataclass(frozen=True)
class Study:
    """The keys of conf/tokenizers.yaml that are not a run's."""

    algorithms: list[str]
    sizes: list[int]
    sample_bytes: int
    steps: int
    seeds: int
    context_bytes: int

    def __post_init__(self) -> None:
        for key in ("sample_bytes", "steps", "seeds", "context_bytes"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)} is not positive; give a larger number")
        for key in ("algorithms", "sizes"):
            values = getattr(self, key)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{key}: {values} is empty or names one twice; name each once")


@dataclass(frozen=True)
class Candidate:
    """A tokenizer to compare. size: what its vocabulary may have at most; None where that is not chosen."""

    algorithm: str
    size: int | None
    node: DictConfig
    lossless: bool

    @property
    def name(self) -> str:
        return self.algorithm if self.size is None else f"{self.algorithm}-{self.size}"


def study(node: DictConfig, console: Console) -> dict[str, Any]:
    """Everything that a composed conf/tokenizers.yaml asks for, as written to results.json.

    Raises ValueError in one line on what is wrong with a key, the text, or a run.
    """
    plan, run_node = split(node, Study)
    candidates = _candidates(plan)
    if not instantiate(run_node.objective, "objective").predicts_text:
        raise ValueError("objective: does not predict the text, so it has no bits per byte; choose causal")
    data = _sampled(run_node.data, plan.sample_bytes)
    folders = []
    for candidate in candidates:
        console.rule(f"tokenizer {candidate.name}")
        folders.append(prepare(data, candidate.node))
    pieces = _held_out(data, plan.sample_bytes)
    results = _measured(candidates, folders, pieces, console)
    planned = []
    for candidate, folder, result in zip(candidates, folders, results, strict=True):
        stream = TokenStream(folder, "train")
        length = max(1, round(plan.context_bytes * stream.tokens / stream.bytes))
        seen = plan.steps * run_node.global_batch * length
        result |= {"sequence_length": length, "bytes_seen": seen * stream.bytes / stream.tokens}
        planned += _planned(plan, run_node, data, candidate, length)
    console.rule("training")
    runs = [_figures(trained) for trained in run_all(planned, Path(node.directory), console)]
    for number, result in enumerate(results):
        result["runs"] = runs[number * plan.seeds : (number + 1) * plan.seeds]
    run: Any = OmegaConf.to_container(run_node)
    return {
        "settings": dataclasses.asdict(plan),
        "run": {key: run[key] for key in run if key not in (*OWN, "name", "directory")},
        "held_out": _text_shares(pieces),
        "tokenizers": results,
    }


def _candidates(plan: Study) -> list[Candidate]:
    """Each algorithm at each size; once where it has no size to choose."""
    found = []
    for algorithm in plan.algorithms:
        path = CONF / "tokenizer" / f"{algorithm}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(path.stem for path in path.parent.glob("*.yaml")))
            raise ValueError(f"algorithms: {algorithm} is none of {known}")
        node = OmegaConf.load(path)
        assert isinstance(node, DictConfig)
        if "training_bytes" in node:
            node.training_bytes = plan.sample_bytes
        for size in plan.sizes if "vocabulary_size" in node else [None]:
            own = node.copy()
            if size is not None:
                own.vocabulary_size = size
            recipe = instantiate(own, "tokenizer")
            found.append(Candidate(algorithm, size, own, recipe.lossless))
    return found


def _sampled(data: DictConfig, size: int) -> DictConfig:
    """A data configuration with no more than about `size` bytes of its text."""
    instantiate(data.source, "data.source")  # what is wrong with it is said here, by its own keys
    source = {"_target_": "launch.tokenizer_text.Sample", "source": data.source, "bytes": size}
    return OmegaConf.create({**data, "source": source})


def _held_out(data: DictConfig, most: int) -> list[Piece]:
    rule = instantiate(data.validation, "data.validation")
    return held_out(instantiate(data.source, "data.source"), rule, most)


def _measured(
    candidates: list[Candidate], folders: list[Path], pieces: list[Piece], console: Console
) -> list[dict[str, Any]]:
    """What there is to know of every tokenizer without a model."""
    tokenizers = [load_tokenizer(folder / "tokenizer") for folder in folders]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measure", total=len(folders))
        measures = []
        for folder in folders:
            measures.append(measure(folder, pieces))
            progress.advance(task)
        task = progress.add_task("speed", total=None)
        rates = speeds(tokenizers, pieces, lambda: progress.advance(task))
    return [
        {
            "name": candidate.name,
            "algorithm": candidate.algorithm,
            "size": candidate.size,
            "vocabulary_size": TokenStream(folder, "train").vocabulary_size,
            "lossless": candidate.lossless and own.spelled_share == 1,
            **dataclasses.asdict(own),
            "megabytes_per_s": speed,
            "relative_speed": ratio,
        }
        for candidate, folder, own, (speed, ratio) in zip(candidates, folders, measures, rates, strict=True)
    ]


def _planned(
    plan: Study, node: DictConfig, data: DictConfig, candidate: Candidate, length: int
) -> list[Planned]:
    """The runs of a tokenizer, one for each seed, whose sequences are `length` tokens long."""
    whole = node.copy()
    whole.sequence_length = length
    whole.horizon = {"steps": plan.steps, "tokens": None, "epochs": None}
    whole.data, whole.tokenizer = data, candidate.node
    whole.engine.ranks = 1
    typed = as_typed(whole, without=("name", "directory", "seed"))
    return [Planned(f"{candidate.name}-{seed}", (*typed, f"seed={seed}")) for seed in range(plan.seeds)]


def _figures(trained: Trained) -> dict[str, Any]:
    """The last evaluation of a run, and the counts of its model. Raises ValueError where it has diverged."""
    if trained.diverged:
        raise ValueError(
            f"optim.learning_rate: {trained.planned.name} diverged ({trained.diverged}); choose a lower one"
        )
    rundir = RunDir(trained.directory)
    last, counts = trained.records("eval")[-1], json.loads(rundir.model.read_text())
    return {
        "seed": load(rundir.config).seed,
        "directory": str(trained.directory),
        **{key: last[key] for key in ("bits_per_byte", "bytes_evaluated", "flops")},
        **{key: counts[key] for key in ("parameters", "parameters_without_embeddings")},
    }


def _text_shares(pieces: list[Piece]) -> dict[str, Any]:
    """How many bytes of the held-out text belong to what."""
    shares: dict[str, Any] = {"bytes": 0, "by_source": {}, "by_language": {}}
    for piece in pieces:
        shares["bytes"] += piece.bytes
        for key, group in (("by_source", piece.source), ("by_language", piece.language)):
            shares[key][group] = shares[key].get(group, 0) + piece.bytes
    return shares | {"languages_guessed": guesses_languages()}


def table(results: dict[str, Any]) -> Table:
    """A row for each tokenizer."""
    shown = Table(box=None, padding=(0, 1, 0, 0), caption=NOTE, caption_justify="left")
    shown.add_column("tokenizer", no_wrap=True)
    for column in ("tokens", "bytes/token", "spelled", "used", "speed", "params", "bits per byte"):
        shown.add_column(column, justify="right", no_wrap=True)
    for own in results["tokenizers"]:
        values = bits(own)
        shown.add_row(
            own["name"],
            f"{own['vocabulary_size']:,}",
            f"{own['bytes_per_token']:.3f}",
            f"{own['spelled_share']:.2%}",
            f"{own['used_share']:.0%}",
            f"{own['relative_speed']:.2f}",
            count(own["runs"][0]["parameters"]),
            f"{mean(values):.3f}{'' if own['lossless'] else '*'} ± {(max(values) - min(values)) / 2:.3f}",
        )
    return shown


NOTE = (
    "± half the range of the seeds. * loses part of the text: not comparable. speed: of encoding, times that"
    " of the first."
)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="tokenizers")
@one_line_errors
def main(node: DictConfig) -> None:
    refuse(HydraConfig.get().overrides.task, OWN)
    console = Console(highlight=False)
    results = study(node, console)
    report = written(Path(node.directory), results, page(results))
    console.print(table(results))
    console.print(str(report), soft_wrap=True)


if __name__ == "__main__":
    end_with(lambda: main_guard(main))
