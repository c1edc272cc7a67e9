"""The table of runs that every scaling law is fitted to, from and to CSV or JSON.

A row is a run; a JSON file is a list of objects. Its columns:

    name                 any text; where there is none, the number of the row
    parameters           N, under the convention that the table's author chose
    tokens               D, trained on; where there is none C/(6N)
    flops                C, of the whole run; where there is none 6ND
    loss                 at the end, nats per token; empty, NaN or infinite where the run diverged
    budget               the nominal C that groups runs into an IsoFLOP curve; where there is none, found by
                         `clustered` from flops
    unique_tokens        distinct tokens among those trained on; where there is none, all D
    tokenizer, data      any text, the same for all runs: losses are comparable only then

Every other column of numbers is kept in `extra`.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.files import write as write_file

POSITIVE = ("parameters", "tokens", "flops", "budget", "unique_tokens")
SHARED = ("tokenizer", "data")
OWN = ("name", *POSITIVE, "loss", *SHARED)
# Counted under other conventions (launch.scaling.shapes).
COUNTED = (
    "all_parameters",
    "parameters_without_embeddings",
    "body_parameters",
    "head_parameters",
    "attention_flops_per_token",
)
SAME = 0.01  # of log N or log D, below which two are the same
USUAL, FAR = 6.0, 100.0  # FLOP per parameter and token, and how many times that is a mistake
SPREAD = 1.25  # between the largest and the smallest flops that a derived budget groups
NAMED = 5  # runs that a note names


@dataclass(frozen=True)
class Points:
    """n runs. All arrays are of shape [n]; see the module for their meaning.

    shared: tokenizer and data, where the table tells. lost: names of runs that were left out, without a
    finite loss. notes: what a reader must know, a line each.
    """

    parameters: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray
    budget: np.ndarray
    unique_tokens: np.ndarray | None
    names: list[str]
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.loss)

    def select(self, chosen: np.ndarray | Sequence[int]) -> Points:
        """Some of the runs, by a mask or by their indices, which may repeat."""
        index = np.arange(len(self))[np.asarray(chosen)]
        arrays = {
            key: getattr(self, key)[index] for key in ("parameters", "tokens", "flops", "loss", "budget")
        }
        return dataclasses.replace(
            self,
            **arrays,
            unique_tokens=None if self.unique_tokens is None else self.unique_tokens[index],
            names=[self.names[i] for i in index],
            extra={key: values[index] for key, values in self.extra.items()},
        )

    def isoflops(self) -> list[tuple[float, Points]]:
        """The runs of each budget, from the smallest budget to the largest."""
        return [(float(budget), self.select(self.budget == budget)) for budget in np.unique(self.budget)]

    def without_highest(self, count: int) -> Points:
        """Without the runs of the `count` highest losses."""
        return self.select(np.sort(np.argsort(self.loss, kind="stable")[: len(self) - count]))

    def require(self, count: int, law: str, distinct: int = 2) -> None:
        """Raises ValueError where the runs cannot fix `law`, which needs `count` of them.

        distinct: how many sizes, and how many numbers of tokens, there are to be among them.
        """
        if len(self) < count:
            raise ValueError(f"{law} needs {count} runs or more and the table has {len(self)}; add runs")
        for column in ("parameters", "tokens"):
            values = np.sort(getattr(self, column))
            found = values[np.diff(np.log(values), prepend=-np.inf) > SAME]
            if len(found) < distinct:
                raise ValueError(
                    f"{law} needs runs of {distinct} different numbers of {column} or more, and the table has"
                    f" {', '.join(f'{value:.4g}' for value in found)} alone; add runs of others"
                )


def points(
    parameters: Sequence[float] | np.ndarray,
    tokens: Sequence[float] | np.ndarray | None,
    loss: Sequence[float] | np.ndarray,
    flops: Sequence[float] | np.ndarray | None = None,
    budget: Sequence[float] | np.ndarray | None = None,
    unique_tokens: Sequence[float] | np.ndarray | None = None,
    names: Sequence[str] | None = None,
    **more: Any,
) -> Points:
    """Runs [n] from arrays that are known to be right, with what is missing filled in: tokens or flops too.

    more: the further fields of Points.
    """
    n = np.asarray(parameters, dtype=float)
    d = np.asarray(flops, dtype=float) / (6 * n) if tokens is None else np.asarray(tokens, dtype=float)
    c = 6 * n * d if flops is None else np.asarray(flops, dtype=float)
    return Points(
        n,
        d,
        c,
        np.asarray(loss, dtype=float),
        clustered(c) if budget is None else np.asarray(budget, dtype=float),
        None if unique_tokens is None else np.minimum(np.asarray(unique_tokens, dtype=float), d),
        [str(i + 1) for i in range(len(n))] if names is None else list(names),
        **more,
    )


def clustered(flops: np.ndarray) -> np.ndarray:
    """A nominal budget [n] for each run: the median flops of those that it is grouped with.

    Again and again the window of a factor SPREAD that holds the most runs becomes a group. So stray runs
    between two budgets neither join these nor become a bridge from one to the other.
    """
    order = np.argsort(flops, kind="stable")
    left = np.log(flops[order])
    where = np.arange(len(left))
    budgets = np.empty(len(left))
    while len(left):
        ends = np.searchsorted(left, left + math.log(SPREAD) + 1e-12, side="right")
        start = int(np.argmax(ends - np.arange(len(left))))
        window = slice(start, ends[start])
        budgets[order[where[window]]] = np.median(flops[order[where[window]]])
        left, where = np.delete(left, window), np.delete(where, window)
    return budgets


def read(path: str | Path, columns: Mapping[str, str] | None = None) -> Points:
    """The runs of a CSV or JSON file.

    Runs that diverged are left out, and `notes` says which.

    Args:
        columns: the file's name of a column by ours, where they differ: {"parameters": "Model Size"}.

    Raises:
        ValueError: the file is no such table, lacks a column or holds a value that cannot be; in one line.
        OSError: it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: there is no such table; train the study first, or name one by table")
    rows = _rows(path)
    renamed = dict(columns or {})
    headers = list(dict.fromkeys(key for row in rows for key in row))
    for own, header in renamed.items():
        if own not in (*OWN, *COUNTED):
            known = ", ".join((*OWN, *COUNTED))
            raise ValueError(f"{path}: columns names {own}, which is no column of ours; there are {known}")
        if header not in headers:
            raise ValueError(f"{path}: no column {header!r}, which columns names for {own}; {_has(headers)}")
    of = {key: renamed.get(key, key) for key in OWN if renamed.get(key, key) in headers}
    for key in ("parameters", "loss"):
        if key not in of:
            raise ValueError(f"{path}: no column {key!r}; name it in columns; {_has(headers)}")
    if not of.keys() & {"tokens", "flops"}:
        raise ValueError(f"{path}: no column 'tokens' and none 'flops'; name one in columns; {_has(headers)}")
    shared = {key: _one_value(path, rows, of[key], key) for key in SHARED if key in of}
    names = _distinct([str(row.get(of.get("name", ""), number)) for number, row in enumerate(rows, 1)])
    every = [_loss(path, name, of["loss"], row) for name, row in zip(names, rows, strict=True)]
    lost = [name for name, loss in zip(names, every, strict=True) if not math.isfinite(loss)]
    kept = [i for i, loss in enumerate(every) if math.isfinite(loss)]
    if not kept:
        raise ValueError(f"{path}: no run has a finite loss; give at least one")
    values = {
        key: np.array([_positive(path, names[i], of[key], rows[i]) for i in kept])
        for key in POSITIVE
        if key in of
    }
    extra = {
        own: column
        for own, header in _others(headers, renamed, set(of.values())).items()
        if (column := _numbers([rows[i].get(header) for i in kept])) is not None
    }
    found = points(
        values.pop("parameters"),
        values.pop("tokens", None),
        np.array([every[i] for i in kept]),
        names=[names[i] for i in kept],
        extra=extra,
        shared=shared,
        lost=tuple(lost),
        notes=(_left_out(lost, len(rows)),) if lost else (),
        **values,
    )
    each = found.flops / (found.parameters * found.tokens) / USUAL
    if (wrong := np.flatnonzero((each > FAR) | (each < 1 / FAR))).size:
        name, times = found.names[wrong[0]], each[wrong[0]] * USUAL
        raise ValueError(
            f"{path}: run {name} has {times:.3g} FLOP for each parameter and token, where about {USUAL:g} are"
            " spent; correct its parameters, tokens or flops"
        )
    return found


def write(path: str | Path, runs: Points) -> None:
    """A table that `read` takes, CSV or JSON by the suffix. Raises ValueError for others, and OSError."""
    path = Path(path)
    columns: dict[str, list[Any]] = {"name": runs.names}
    for key in (*POSITIVE, "loss"):
        if getattr(runs, key) is not None:
            columns[key] = getattr(runs, key).tolist()
    columns |= {key: values.tolist() for key, values in runs.extra.items()}
    columns |= {key: [value] * len(runs) for key, value in runs.shared.items()}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    write_rows(path, rows)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of equal keys as CSV or JSON by the suffix. Raises ValueError for other suffixes, and OSError."""
    if _suffix(path) == ".json":
        write_file(path, json.dumps(list(rows), indent=1) + "\n")
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue())


def _distinct(names: Sequence[str]) -> list[str]:
    """With a number after each name that another row has, too."""
    seen: dict[str, int] = {}
    taken, found = {name for name in names if names.count(name) == 1}, []
    for name in names:
        own = name
        while names.count(name) > 1 and (own == name or own in taken):
            seen[name] = seen.get(name, 0) + 1
            own = f"{name} ({seen[name]})"
        taken.add(own)
        found.append(own)
    return found


def _suffix(path: Path) -> str:
    if path.suffix.lower() not in (".csv", ".json"):
        raise ValueError(f"{path}: a table is a .csv or a .json file; choose such a name")
    return path.suffix.lower()


def _rows(path: Path) -> list[dict[str, Any]]:
    """The file's rows by its own headers."""
    kind = _suffix(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text) if kind == ".json" else _csv_rows(path, text)
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a {kind} file: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: not a list of runs, each an object with a value for every column")
    if not rows:
        raise ValueError(f"{path}: holds no run; give a header and a row for each run")
    return rows


def _csv_rows(path: Path, text: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    rows = []
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(
                f"{path}: line {reader.line_num} has not as many values as the header,"
                f" {len(reader.fieldnames or ())}; correct it"
            )
        rows.append(row)
    return rows


def _has(headers: Sequence[str]) -> str:
    return f"the file has {', '.join(map(repr, headers))}"


def _one_value(path: Path, rows: Sequence[Mapping[str, Any]], header: str, key: str) -> str:
    found = sorted({str(row.get(header)) for row in rows})
    if len(found) > 1:
        raise ValueError(
            f"{path}: column {header!r} holds {', '.join(found[:NAMED])}: losses under different {key} do not"
            " compare; keep the runs of one"
        )
    return found[0]


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _loss(path: Path, name: str, header: str, row: Mapping[str, Any]) -> float:
    """NaN where the run diverged."""
    value = row.get(header)
    if value is None or value == "":
        return math.nan
    loss = _number(value)
    if loss is None or loss <= 0 and math.isfinite(loss):
        raise ValueError(f"{path}: run {name}: {header!r} is {value!r}, not a positive number; correct it")
    return loss


def _positive(path: Path, name: str, header: str, row: Mapping[str, Any]) -> float:
    number = _number(row.get(header))
    if number is None or not 0 < number < math.inf:
        raise ValueError(
            f"{path}: run {name}: {header!r} is {row.get(header)!r}, not a positive number; correct it"
        )
    return number


def _others(headers: Sequence[str], renamed: Mapping[str, str], taken: set[str]) -> dict[str, str]:
    """Further columns: the file's name of each by ours."""
    own = {header: key for key, header in renamed.items()}
    return {own.get(header, header): header for header in headers if header not in taken}


def _numbers(values: Sequence[Any]) -> np.ndarray | None:
    """A column as floats, where all of it are finite numbers."""
    numbers = np.array([math.nan if (number := _number(value)) is None else number for value in values])
    return numbers if np.isfinite(numbers).all() else None


def _left_out(names: Sequence[str], total: int) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return (
        f"{len(names)} of {total} runs have no finite loss (they diverged, or did not end) and are left out:"
        f" {', '.join(names[:NAMED])}{more}"
    )
