"""RunConfig: everything that defines a run, and every check that needs no file, process group or GPU.

Hydra composes YAML into a DictConfig; `from_hydra` turns it into a frozen `RunConfig` or raises `ValueError`
with one line that names the key. Slots that select code (`_target_`) stay plain dictionaries: their
constructors check their own arguments when they are instantiated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from data.curriculum import Curriculum
from data.loader import METHODS
from data.order import EqualSteps

PRECISIONS = ("bf16", "fp16", "fp32")
WANDB_MODES = ("offline", "online", "disabled")
ACTIONS = ("stop", "skip", "rollback")  # on divergence

# What a resumed run may change: nothing that alters the parameters, the data or the arithmetic of a step.
MAY_CHANGE = (
    *("name", "directory", "horizon", "evaluation", "checkpoint", "log", "noise", "track", "stop"),
    *("divergence", "micro_batch", "data.directory", "data.address", "data.cache", "data.cache_bytes"),
    *(f"engine.{key}" for key in ("ranks", "zero_stage", "offload_optimizer", "activation_checkpointing")),
    *("engine.compile", "engine.threads", "engine.hang_timeout"),
)


@dataclass(frozen=True)
class Horizon:
    """How long to train: exactly one of the three is set. `epochs` may be fractional."""

    steps: int | None = None
    tokens: float | None = None
    epochs: float | None = None


@dataclass(frozen=True)
class PackingConfig:
    """Which stretches of the corpus share a sequence, and how far they are shuffled."""

    method: str = "chunk"  # "chunk": windows cut off one after the other; "best_fit": documents kept whole
    isolate: bool = False  # documents in one sequence do not see each other, and positions restart
    block: int | None = None  # samples that are shuffled with each other; null: all of an epoch


@dataclass(frozen=True)
class MixtureConfig:
    """How much of each part of the data is trained on; at most one of weights, temperature and budgets."""

    weights: dict[str, Any] | None = None  # share of the samples by part; null: in proportion to their sizes
    temperature: float | None = None  # in proportion to size ** (1 / temperature)
    budgets: dict[str, Any] | None = None  # in proportion to tokens to train on
    epochs: dict[str, Any] | None = None  # how often a part is seen at most
    stages: dict[int, dict[str, Any]] | None = None  # weights from a step on


@dataclass(frozen=True)
class EngineConfig:
    """How a step is computed. But for gradient_clipping, none of it changes more than rounding."""

    ranks: int | None = None  # processes that `python -m train` starts; null: one per GPU, else one
    zero_stage: int = 2
    precision: str = "bf16"
    gradient_clipping: float = 1.0  # global norm; 0 turns it off
    offload_optimizer: bool = False  # optimizer states and step in host memory
    activation_checkpointing: bool = False
    compile: bool = False  # torch.compile of each block
    threads: int | None = None  # CPU threads per rank; null: cores / local ranks
    hang_timeout: float = 900.0  # seconds without progress after which the rank that hangs is named


@dataclass(frozen=True)
class EvaluationConfig:
    every: int | None = 200  # steps; null: only at the end
    prompt: str | None = None  # sampled after every evaluation; null: no samples
    sample_tokens: int = 100


@dataclass(frozen=True)
class CheckpointConfig:
    every: int | None = 500  # steps; null: only at the end
    keep: int = 2  # newest checkpoints kept
    keep_every: int | None = None  # steps; checkpoints at its multiples are kept besides; null: none
    asynchronous: bool = True  # training goes on while a snapshot in memory is written


@dataclass(frozen=True)
class StopConfig:
    """When a run saves and ends before its horizon, to be continued by the same command."""

    time_limit: float | None = None  # minutes of wall-clock for one start of the run; null: none
    grace: float = 25.0  # seconds from a signal to the end at the latest: a step and a save must fit in


@dataclass(frozen=True)
class DivergenceConfig:
    """What happens on a loss or gradient that is not finite, and on a loss that jumps up."""

    nonfinite: str = "rollback"
    spike: str = "report"
    threshold: float = 10.0  # a spike: the loss, in robust standard deviations above the window's median
    window: int = 100  # steps before, which the loss is compared with
    pass_over: int = 4  # batches that a rollback leaves out: the offending one and those before it
    limit: int = 5  # skips and rollbacks within one window, after which the run stops


@dataclass(frozen=True)
class ForkConfig:
    """Another run to go on from, instead of from the start."""

    run: str | None = None  # its directory
    step: int | None = None  # of its checkpoint; null: the newest


@dataclass(frozen=True)
class LogConfig:
    every: int = 10  # steps between lines of metrics.jsonl; each averages the steps since the line before


@dataclass(frozen=True)
class NoiseConfig:
    every: int | None = None  # steps between measurements of the gradient noise scale; null: none


@dataclass(frozen=True)
class TrackConfig:
    wandb: str = "offline"
    project: str = "isoflop"


@dataclass(frozen=True)
class RunConfig:
    name: str = "run"
    directory: str = "runs/run"
    seed: int = 0
    sequence_length: int = 256  # tokens
    global_batch: int = 16  # sequences per optimizer step, over all ranks
    micro_batch: int | None = None  # sequences per rank and forward pass; null: global_batch / ranks
    horizon: Horizon = field(default_factory=Horizon)
    data: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    packing: PackingConfig = field(default_factory=PackingConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    curriculum: dict[int, dict[str, Any]] | None = None  # sequence_length, global_batch from a step on
    optim: dict[str, Any] = field(default_factory=dict)
    parametrization: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    engine: EngineConfig = field(default_factory=EngineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    fork: ForkConfig = field(default_factory=ForkConfig)
    log: LogConfig = field(default_factory=LogConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    track: TrackConfig = field(default_factory=TrackConfig)


def from_hydra(node: DictConfig | dict[str, Any]) -> RunConfig:
    """The frozen config of a composed Hydra node (or of a loaded config.yaml).

    Raises:
        ValueError: unknown key, wrong type or a check that fails; one line that names the key.
    """
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(node), resolve=True)
        schema = OmegaConf.structured(RunConfig)
        for part in (schema, *(schema[f.name] for f in fields(RunConfig))):
            if OmegaConf.is_config(part):
                OmegaConf.set_readonly(part, False)  # frozen dataclasses make read-only nodes
        config = OmegaConf.to_object(OmegaConf.merge(schema, resolved))
    except OmegaConfBaseException as error:
        raise ValueError(_one_line(error)) from None
    assert isinstance(config, RunConfig)
    check(config)
    return config


def to_container(config: RunConfig) -> dict[str, Any]:
    """Nested plain dictionaries, as written to config.yaml."""
    container = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def load(path: Path) -> RunConfig:
    """The frozen config in a run directory's config.yaml.

    Raises:
        ValueError: the file is missing or is not a run's config.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; is {path.parent} the directory of a run?")
    node = OmegaConf.load(path)
    assert isinstance(node, DictConfig)
    return from_hydra(node)


def _one_line(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None)
    message = str(error).splitlines()[0]
    if not key:
        return message
    if isinstance(error, MissingMandatoryValue):
        return f"{key}: must be set, for example {key}=... on the command line"
    if "not in" in message and key.split(".")[-1] in message:
        known = getattr(error, "object_type", None)
        names = ", ".join(f.name for f in fields(known)) if is_dataclass(known) else ""
        return f"{key}: no such key{names and '; it has ' + names}"
    return f"{key}: {message[:1].lower()}{message[1:]}"


def check(config: RunConfig) -> None:
    """Every check that needs only the config itself.

    Raises:
        ValueError: one line that names the key, what is wrong and what to do.
    """
    _require(bool(config.name.strip()), "name: is empty; give the run a name")
    _require(0 <= config.seed < 2**63, f"seed: {config.seed} is not between 0 and 2**63; give one that is")
    for key in ("sequence_length", "global_batch", "micro_batch"):
        _positive(key, getattr(config, key))
    given = [f.name for f in fields(Horizon) if getattr(config.horizon, f.name) is not None]
    _require(
        len(given) == 1,
        f"horizon: {' and '.join(given) or 'nothing'} {'are' if len(given) > 1 else 'is'} set; set"
        " exactly one of steps, tokens, epochs"
        " (override the others with null)",
    )
    _positive(f"horizon.{given[0]}", getattr(config.horizon, given[0]))
    for key in ("model", "objective", "optim", "schedule", "tokenizer"):
        _require("_target_" in getattr(config, key), f"{key}: has no _target_; choose one with {key}=…")
    steps(config)
    _one_of("packing.method", config.packing.method, METHODS)
    _positive("packing.block", config.packing.block)
    _check_engine(config.engine)
    _positive("evaluation.every", config.evaluation.every)
    _positive("evaluation.sample_tokens", config.evaluation.sample_tokens)
    _positive("checkpoint.every", config.checkpoint.every)
    _positive("checkpoint.keep", config.checkpoint.keep)
    _positive("checkpoint.keep_every", config.checkpoint.keep_every)
    _positive("stop.time_limit", config.stop.time_limit)
    _positive("stop.grace", config.stop.grace)
    _check_divergence(config.divergence)
    _require(
        config.fork.run is not None or config.fork.step is None,
        "fork.step: there is no fork.run; name the directory of the run to fork",
    )
    _positive("log.every", config.log.every)
    _positive("noise.every", config.noise.every)
    _one_of("track.wandb", config.track.wandb, WANDB_MODES)


def _check_divergence(divergence: DivergenceConfig) -> None:
    _one_of("divergence.nonfinite", divergence.nonfinite, ACTIONS)
    _one_of("divergence.spike", divergence.spike, ("report", *ACTIONS))
    for key in ("threshold", "window", "pass_over", "limit"):
        _positive(f"divergence.{key}", getattr(divergence, key))
    _require(
        divergence.limit < divergence.window,
        f"divergence.limit: {divergence.limit} in a window of {divergence.window} steps is never reached; set"
        " less than divergence.window",
    )


def _check_engine(engine: EngineConfig) -> None:
    _positive("engine.ranks", engine.ranks)
    _positive("engine.threads", engine.threads)
    _positive("engine.hang_timeout", engine.hang_timeout)
    _one_of("engine.zero_stage", engine.zero_stage, (0, 1, 2, 3))
    _one_of("engine.precision", engine.precision, PRECISIONS)
    _require(engine.gradient_clipping >= 0, "engine.gradient_clipping: is negative; 0 turns clipping off")
    _require(
        not (engine.offload_optimizer and engine.zero_stage == 0),
        "engine.offload_optimizer: needs ZeRO; set engine.zero_stage to 1, 2 or 3",
    )
    _require(
        not (engine.compile and engine.zero_stage == 3),
        "engine.compile: cannot be combined with engine.zero_stage=3, which swaps parameters in and out"
        " between the blocks' operations; turn one of them off",
    )


def check_world(config: RunConfig, world_size: int) -> None:
    """The checks that need the number of ranks.

    Raises:
        ValueError: the global batch does not divide into micro batches over the ranks.
    """
    size = micro_batch(config, world_size)
    if config.curriculum:
        steps(config).check(size or 1, world_size)
    elif config.micro_batch is None:
        _require(
            config.global_batch % world_size == 0,
            f"global_batch: {config.global_batch} cannot be shared by {world_size} ranks; choose a number of"
            f" ranks that divides it, or for a new run a multiple of {world_size}",
        )
    else:
        EqualSteps(config.global_batch).check(size, world_size)
    smallest = min(stage.samples for stage in steps(config).stages)
    _require(
        config.noise.every is None or smallest > size,
        f"noise.every: compares a step with a part of its micro batches, and there is one, of {size}"
        " sequences; set a smaller micro_batch",
    )
    engine = config.engine
    accumulates = accumulation(config, world_size) > 1
    _require(
        not (accumulates and engine.zero_stage == 0 and engine.precision != "fp32"),
        f"engine.zero_stage: 0 would add up micro batches in {engine.precision}; set 1, which adds in fp32",
    )


def check_device(config: RunConfig) -> None:
    """What this machine can compute in.

    Raises:
        ValueError: a precision that its GPU or CPU lacks.
    """
    if config.engine.precision == "fp16":
        _require(
            torch.cuda.is_available(),
            "engine.precision: fp16 needs a GPU, and this machine has none; use bf16 or fp32",
        )
    if config.engine.precision == "bf16" and torch.cuda.is_available():
        _require(
            torch.cuda.is_bf16_supported(including_emulation=False),
            "engine.precision: this GPU has no bf16; use fp16 or fp32",
        )


def steps(config: RunConfig) -> Curriculum:
    """What each step is made of.

    Raises:
        ValueError: a stage of the curriculum that is not one.
    """
    return Curriculum(config.sequence_length, config.global_batch, config.curriculum or {})


def micro_batch(config: RunConfig, world_size: int) -> int:
    """Sequences of sequence_length per rank and forward pass; 0 where a step has fewer than ranks."""
    return config.micro_batch or steps(config).micro_batch(world_size)


def accumulation(config: RunConfig, world_size: int) -> int:
    """Most forward passes of a rank in one step."""
    return steps(config).most // (micro_batch(config, world_size) * world_size)


def total_steps(config: RunConfig, samples: int) -> int:
    """Optimizer steps of the horizon over a training set of `samples` sequences, each of sequence_length."""
    horizon = config.horizon
    if horizon.steps is not None:
        return horizon.steps
    if horizon.tokens is not None:
        return steps(config).steps(math.ceil(horizon.tokens / config.sequence_length))
    assert horizon.epochs is not None
    return steps(config).steps(math.ceil(Fraction(str(horizon.epochs)) * samples))


def changed(before: RunConfig, after: RunConfig) -> list[str]:
    """Dotted keys that differ and that a resumed run may not change."""
    old, new = to_container(before), to_container(after)
    return [
        key
        for top in old
        if top not in MAY_CHANGE
        for key in differences(top, old[top], new[top])
        if key not in MAY_CHANGE
    ]


def differences(key: str, old: Any, new: Any) -> list[str]:
    """Dotted keys, beginning with `key`, at which two containers differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            d
            for k in sorted(old.keys() | new.keys())
            for d in differences(f"{key}.{k}", old.get(k), new.get(k))
        ]
    return [] if old == new else [key]


def at(container: Any, key: str) -> Any:
    """What stands at a dotted key; None where nothing does."""
    for part in key.split("."):
        if not isinstance(container, dict):
            return None
        container = container.get(int(part) if part.isdigit() else part)  # steps are numbers
    return container


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _positive(key: str, value: float | None) -> None:
    _require(value is None or 0 < value < math.inf, f"{key}: {value} is not a positive number; give one")


def _one_of(key: str, value: Any, choices: tuple[Any, ...]) -> None:
    _require(value in choices, f"{key}: {value} is none of {', '.join(map(str, choices))}")
