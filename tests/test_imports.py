"""The direction of imports: data and model are leaves, train stands on both, launch on all three."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT: dict[str, set[str]] = {
    "model": set(),
    "data": set(),
    "train": {"model", "data"},
    "launch": {"model", "data", "train"},
}
# Inside train a part imports only parts of earlier lines, never one of its own line.
TRAIN = [
    {"config", "files", "noise", "stop", "records"},
    {"deepspeed_config", "divergence", "hardware", "lock", "optim", "ranks", "track", "whole"},
    {"rundir", "parametrization"},
    {"objective", "engine"},
    {"checkpoint", "elastic", "pretrained", "supply", "watchdog"},
    {"eval", "fork", "log", "rollback"},
    {"journal", "start"},
    {"lookahead"},
    {"run"},
    {"__main__"},
]


def imported(own: str, code: str) -> set[str]:
    """Dotted names of all that the module `own` imports, at any depth in its code."""
    names: set[str] = set()
    package = own.split(".")[:-1]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def part(name: str) -> str | None:
    """The part of train that a dotted name lies in; None for train itself."""
    return name.split(".")[1] if "." in name else None


def level(name: str | None) -> int:
    return next((i for i, parts in enumerate(TRAIN) if name in parts), -1)


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def wrong(own: str, code: str) -> list[str]:
    """What is wrong with the imports in the code of the module `own`."""
    package = own.split(".")[0]
    found = []
    for name in sorted(imported(own, code)):
        other = name.split(".")[0]
        if other == "tests" or other in MAY_IMPORT.keys() - MAY_IMPORT[package] - {package}:
            found.append(f"{own} imports {name}")
        elif package == other == "train" and part(name) not in (None, part(own)):
            if level(part(name)) == -1:
                found.append(f"{own} imports {name}, which stands on no line of TRAIN")
            elif level(part(name)) >= level(part(own)):
                found.append(f"{own} imports {name}, which stands on no earlier line of TRAIN")
    return found


FILES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def test_no_import_points_the_other_way() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(MAY_IMPORT)
    assert [line for path in FILES for line in wrong(dotted(path), path.read_text())] == []


def test_every_part_of_train_has_its_place() -> None:
    parts = {
        path.relative_to(ROOT / "train").with_suffix("").parts[0] for path in (ROOT / "train").rglob("*.py")
    }
    assert parts - {"__init__"} == set().union(*TRAIN)


def test_conf_holds_no_python() -> None:
    assert {path.suffix for path in (ROOT / "conf").rglob("*") if path.is_file()} == {".yaml"}


@pytest.mark.parametrize(
    ("path", "line", "message"),
    [
        ("data/order.py", "import model", "data.order imports model"),
        ("data/order.py", "from train.config import RunConfig", "data.order imports train.config"),
        ("model/gpt.py", "from data import cli", "model.gpt imports data"),
        ("model/gpt.py", "def f():\n    import launch.bench", "model.gpt imports launch.bench"),
        ("train/run.py", "from launch.report import page", "train.run imports launch.report"),
        ("train/config.py", "from train.engine import Engine", "train.config imports train.engine, which"),
        ("train/config.py", "from .engine import Engine", "train.config imports train.engine, which"),
        ("train/config.py", "from train import engine", "train.config imports train.engine, which"),
        ("train/engine.py", "import train.run", "train.engine imports train.run, which"),
        ("train/optim/adamw.py", "import train.engine", "train.optim.adamw imports train.engine, which"),
        (
            "train/optim/adamw.py",
            "from ..engine import Engine",
            "train.optim.adamw imports train.engine, which",
        ),
        (
            "train/run.py",
            "import train.callbacks",
            "train.run imports train.callbacks, which stands on no line",
        ),
        ("launch/report.py", "from tests.tiny import corpus", "launch.report imports tests.tiny"),
    ],
)
def test_a_planted_import_is_found(path: str, line: str, message: str) -> None:
    code = (ROOT / path).read_text() + "\n" + line + "\n"
    assert any(found.startswith(message) for found in wrong(dotted(ROOT / path), code))
