"""A run's directory: every path in it, its lock, and the record of what the run was started with."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data.files import write
from data.shards import MANIFEST, read_manifest
from train.config import RunConfig, at, changed, load, to_container
from train.lock import Lock

COMMAND = "ISOFLOP_COMMAND"  # set by a launcher for its ranks: its own
PACKAGES = (
    "torch",
    "deepspeed",
    "hydra-core",
    "datasets",
    "tokenizers",
    "transformers",
    "gensim",
    "jieba",
    "ahocorasick_rs",
    "wandb",
    "numpy",
    "flash-attn",
)


class RunDir:
    """The paths of one run, and what may happen to them."""

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory)
        self.config = self.path / "config.yaml"
        self.data = self.path / "data.json"
        self.deepspeed = self.path / "deepspeed.json"
        self.environment = self.path / "environment.json"
        self.model = self.path / "model.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tokenizer = self.path / "tokenizer"
        self.checkpoints = self.path / "checkpoints"
        self.report = self.path / "report.html"
        self._lock: Lock | None = None

    def lock(self) -> None:
        """Make this process the only one that writes here, until it ends (see `train.lock`).

        Raises:
            ValueError: the directory cannot be written, or another process holds it.
        """
        self._lock = Lock(self.path)

    def unlock(self) -> None:
        """Let other processes write here. To be called before os._exit, which leaves no time for it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def lock_descriptor(self) -> int:
        """For child processes to inherit: the lock holds until the last process that has it ends."""
        assert self._lock is not None
        return self._lock.fileno()

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Take the lock. Where the block fails it is given back, and where there is no config then, what was
        made here goes again."""
        absent = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.lock()
            yield
        except BaseException:
            if not self.config.exists():
                if self._lock is not None:
                    (self.path / "lock").unlink(missing_ok=True)
                with suppress(OSError):  # others use it
                    for path in absent:
                        path.rmdir()
            self.unlock()
            raise

    def check_resume(self, config: RunConfig) -> None:
        """Refuse to continue this run under a config that would make it another run.

        Raises:
            ValueError: names the keys that may not change.
        """
        if not self.config.exists():
            return
        before = load(self.config)
        keys = changed(before, config)
        if keys:
            was, now = (at(to_container(one), keys[0]) for one in (before, config))
            others = (
                f" (so {'do' if len(keys) > 2 else 'does'} {', '.join(keys[1:])})" if len(keys) > 1 else ""
            )
            raise ValueError(
                f"{keys[0]}: differs from what {self.path} was started with, {was} and now {now}{others};"
                " undo the change, or choose another name=…"
            )

    def passed_over(self) -> tuple[list[int], list[int]]:
        """What rollbacks left out: positions in the order of the data, and the steps that they came at."""
        path = self.path / "passed_over.json"
        known = json.loads(path.read_text()) if path.exists() else {"positions": [], "rollbacks": []}
        return known["positions"], known["rollbacks"]

    def write_passed_over(self, positions: list[int], rollbacks: list[int]) -> None:
        """Keep what `passed_over` gives, whatever becomes of the checkpoints."""
        content = json.dumps({"positions": positions, "rollbacks": rollbacks})
        write(self.path / "passed_over.json", content + "\n")

    def lineage(self) -> dict[str, Any] | None:
        """What this run was forked from: parent, parent_step, changed (keys); None where it was not."""
        path = self.path / "fork.json"
        return json.loads(path.read_text()) if path.exists() else None

    def freeze(self, config: RunConfig, prepared: Path, inputs: dict[str, str]) -> None:
        """Write the config and the place of the prepared data that every rank works from.

        inputs: what else batches depend on, by key (see `train.objective.base`).

        Raises:
            ValueError: the run was started on other data or other inputs.
        """
        tokens = hashlib.sha256(json.dumps(_tokens_of(prepared)).encode()).hexdigest()
        known = {"prepared": str(prepared.resolve()), "tokens": tokens, "inputs": inputs}
        content = json.dumps(known, indent=1) + "\n"
        if self.data.exists() and not self._trains_on(prepared, tokens):
            raise ValueError(
                f"data: the corpus has changed since {self.path} was started ({self.prepared().name}, now"
                f" {prepared.name}); restore it, or choose another name=…"
            )
        before = json.loads(self.data.read_text()).get("inputs", {}) if self.data.exists() else inputs
        for key in sorted(before.keys() | inputs.keys()):
            if before.get(key) != inputs.get(key):
                raise ValueError(
                    f"{key}: finds something else than when {self.path} was started; restore what it reads,"
                    " or choose another name=…"
                )
        write(self.data, content)
        # Last, because a run is one that has a config.
        write(self.config, OmegaConf.to_yaml(OmegaConf.create(to_container(config))))

    def _trains_on(self, prepared: Path, tokens: str) -> bool:
        known = json.loads(self.data.read_text()).get("tokens")
        return _same_tokens(self.prepared(), prepared) if known is None else known == tokens

    def prepared(self) -> Path:
        """The folder of the run's prepared data."""
        return Path(json.loads(self.data.read_text())["prepared"])

    def record(self, deepspeed: dict[str, Any], model: dict[str, Any], environment: dict[str, Any]) -> None:
        """Write what the frozen config became on this machine."""
        for path, content in (
            (self.deepspeed, deepspeed),
            (self.model, model),
            (self.environment, environment),
        ):
            write(path, json.dumps(content, indent=2) + "\n")


def _same_tokens(before: Path, now: Path) -> bool:
    """Whether two prepared folders hold the same shards; files may have been copied or touched in between."""
    if before.name == now.name:
        return True
    if not (before / MANIFEST).exists() or not (now / MANIFEST).exists():
        return False
    return _tokens_of(before) == _tokens_of(now)


def _tokens_of(prepared: Path) -> list[Any]:
    """What equal tokens have equal: the hashes of all shards, and of a stream its inputs."""
    manifest = read_manifest(prepared)
    hashes = {
        name: [shard["sha256"] for shard in split["shards"]] for name, split in manifest["splits"].items()
    }
    return [hashes, None if "train" in hashes else manifest["inputs"]]


def command() -> str:
    """What this process was started by."""
    return shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]])


def environment(world_size: int) -> dict[str, Any]:
    """The code, packages and machine of this run, for someone who wants to repeat it."""
    root = Path(__file__).resolve().parent.parent
    return {
        "commit": _git(root, "rev-parse", "HEAD"),
        "dirty": bool(_git(root, "status", "--porcelain")),
        "command": os.environ.get(COMMAND) or command(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "world_size": world_size,
    }


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
