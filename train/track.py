"""Weights & Biases: the numbers of a run's records, each step sent as one row, once, whatever ended the run.

The rows follow from metrics.jsonl. W&B keeps the last seconds of an offline run in the memory of a process of
its own, so a kill loses rows that were sent: when the run goes on, W&B's file (online, its server) says which
rows it has, and those that it lacks are sent from the records.
"""

from __future__ import annotations

import json
import math
import os
import struct
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.files import write
from train.config import RunConfig, to_container

BLOCK = 2**15  # bytes; W&B's files are LevelDB logs: blocks of chunks, each with a header
HEADER = struct.Struct("<IHB")  # checksum, length, kind
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4  # kinds of chunks: what part of a record one is


class Track:
    """The W&B run of a run directory. No error of W&B gets out of it: the run goes on without.

    wandb.json in the run directory holds its id, the highest step that had reached W&B when this process
    began ("before"), and the highest that it has sent ("step").

    Args:
        records: what lies in metrics.jsonl. Rows that W&B lacks are sent, but for the last: it may grow.
        say: shows a line to the person at the terminal.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        records: list[dict[str, Any]],
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._say = folder, say
        self._rows: dict[int, dict[str, float]] = {}
        self._run: Any = None
        try:
            self._id, self._before = _remembered(folder)
            self._sent = self._before
            self._remember()
            self._run = self._start(config)
            if not self._run.offline:  # the server knows better
                self._before = self._sent = self._run.starting_step - 1
                self._remember()
        except Exception as error:
            self._fail("start", error)
        for record in sorted(records, key=lambda one: one["step"]):
            self.add(record)

    def add(self, record: dict[str, Any]) -> None:
        """One more record. Its step's row is sent by `complete`, or when a record of a later step comes."""
        step = record["step"]
        if self._run is None or step <= self._sent:
            return
        self.complete(step - 1)
        numbers = {
            f"{record['kind']}/{name}": value
            for name, value in record.items()
            if name not in ("kind", "step") and isinstance(value, int | float) and math.isfinite(value)
        }
        if numbers:
            self._rows.setdefault(step, {}).update(numbers)

    def complete(self, step: int) -> None:
        """Nothing will be added at `step` and before: send what waits of them."""
        for due in sorted(one for one in self._rows if one <= step):
            row = self._rows.pop(due)
            if self._run is None or due <= self._sent:
                continue
            try:
                self._run.log(row, step=due, commit=True)
            except Exception as error:
                self._fail("log", error)
            else:
                self._sent = due
                with suppress(OSError):
                    self._remember()

    def rewind(self, step: int) -> None:
        """Forget what was to be sent after `step`. What was sent stays, and is not sent again."""
        self._rows = {one: row for one, row in self._rows.items() if one <= step}

    def close(self, failed: bool) -> None:
        """End the W&B run. A row that was not completed is left to the next start, which has its records."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=int(failed))
        except Exception as error:
            self._fail("finish", error)

    def _start(self, config: RunConfig) -> Any:
        import wandb

        mode = config.track.wandb
        if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
            self._say(
                "track.wandb: online needs an API key (wandb login, or WANDB_API_KEY); going on offline"
            )
            mode = "offline"
        settings = {
            "project": config.track.project,
            "name": config.name,
            "id": self._id,
            "resume": "allow",
            "dir": self._folder,
            "config": to_container(config),
            "settings": wandb.Settings(
                silent=True, console="off", finish_timeout=config.stop.grace, finish_timeout_raises=True
            ),
        }
        try:
            return wandb.init(mode=mode, **settings)  # type: ignore[arg-type]
        except wandb.errors.Error as error:
            self._say(f"track.wandb: {mode} failed ({_first_line(error)}); going on offline")
            return wandb.init(mode="offline", **settings)  # type: ignore[arg-type]

    def _fail(self, what: str, error: Exception) -> None:
        self._run = None
        self._say(
            f"track.wandb: {what} failed ({_first_line(error)}); going on without it: what W&B lacks is sent"
            " when this run is next started"
        )

    def _remember(self) -> None:
        known = {"id": self._id, "before": self._before, "step": self._sent}
        write(self._folder / "wandb.json", json.dumps(known) + "\n")


def _remembered(folder: Path) -> tuple[str, int]:
    """The run's id in W&B, and the highest step that W&B's files have; -1 where there is none."""
    logs = sorted(
        folder.glob("wandb/*run-*/run-*.wandb"),
        key=lambda log: log.parent.name.partition("run-")[2],  # the time of its start
        reverse=True,
    )
    try:
        known = json.loads((folder / "wandb.json").read_text())
    except (FileNotFoundError, ValueError):  # not there yet, or a power cut left it empty
        name = logs[0].stem.removeprefix("run-") if logs else uuid.uuid4().hex[:8]
        known = {"id": name, "before": -1, "step": -1}
    own = [log for log in logs if log.stem == f"run-{known['id']}"]
    if not own:  # "wandb clean" takes away what was synced
        return known["id"], known["step"]
    for log in own:
        if steps := [record.step.num for record in history(log)]:
            return known["id"], max(known["before"], *steps)
    return known["id"], known["before"]


def history(path: Path) -> Iterator[Any]:
    """The history records (protobuf) in a .wandb file, up to its end or to what a kill left half-written."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    place, begun = HEADER.size, b""  # the file's own header is as long as a chunk's
    while place + HEADER.size <= len(content):
        left = BLOCK - place % BLOCK
        if left < HEADER.size:  # padding
            place += left
            continue
        _, length, kind = HEADER.unpack_from(content, place)
        place += HEADER.size + length
        if kind not in (WHOLE, FIRST, MIDDLE, LAST) or place > len(content):
            return
        begun = (b"" if kind in (WHOLE, FIRST) else begun) + content[place - length : place]
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            try:
                record.ParseFromString(begun)
            except DecodeError:
                return
            if record.WhichOneof("record_type") == "history":
                yield record.history


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
