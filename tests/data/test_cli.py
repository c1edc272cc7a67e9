import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

from data.cli import instantiate, main_guard, standing_at

ROOT = Path(__file__).resolve().parents[2]


class Thing:
    def __init__(
        self,
        size: int,
        rate: float = 0.5,
        kind: Literal["a", "b"] = "a",
        names: str | list[str] | None = None,
        inner: Any = None,
    ) -> None:
        if size < 0:
            raise ValueError(f"thing.size: {size} is negative")
        self.size, self.rate, self.kind, self.names, self.inner = size, rate, kind, names, inner


TARGET = f"{__name__}.Thing"


def test_nodes_become_objects() -> None:
    inner = {"_target_": TARGET, "size": 2}
    node = OmegaConf.create({"_target_": TARGET, "names": ["x"], "inner": inner, "rate": 1})
    thing = instantiate(node, "thing", size=1)
    assert (thing.size, thing.rate, thing.names, thing.inner.size) == (1, 1, ["x"], 2)
    assert type(thing.names) is list


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 1, "sizee": 2}, f"thing.sizee: unknown key; {TARGET} knows size, rate, kind, names, inner"),
        ({}, f"thing.size: missing; {TARGET} needs it"),
        ({"size": "abc"}, "thing.size: 'abc' is not int"),
        ({"size": 1.5}, "thing.size: 1.5 is not int"),
        ({"size": True}, "thing.size: True is not int"),
        ({"size": None}, "thing.size: None is not int"),
        ({"size": 1, "rate": "fast"}, "thing.rate: 'fast' is not float"),
        ({"size": 1, "kind": "c"}, "thing.kind: 'c' is not one of 'a', 'b'"),
        ({"size": 1, "names": [1]}, "thing.names: [1] is not str | list[str] | None"),
        ({"size": -1}, "thing.size: -1 is negative"),
        ({"size": "???"}, "thing.size: must be set, for example thing.size=... on the command line"),
        (
            {"size": 1, "inner": {"_target_": TARGET, "size": 1, "x": 1}},
            f"thing.inner.x: unknown key; {TARGET} knows size, rate, kind, names, inner",
        ),
        ({"_target_": "data.cli.Nope"}, "thing._target_: data.cli.Nope cannot be loaded"),
        ({"_target_": "nowhere.Nope"}, "thing._target_: nowhere.Nope cannot be loaded"),
        ({"_target_": "Nope"}, "thing._target_: Nope cannot be loaded"),
    ],
)
def test_mistakes_are_named_by_their_key_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        instantiate(OmegaConf.create({"_target_": TARGET} | arguments), "thing")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_node_without_target_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^thing: has no _target_ that names a class; set thing\._target_="):
        instantiate({"size": 1}, "thing")
    with pytest.raises(ValueError, match=r"^thing: 'a' is no node with a _target_; write 'thing=\{_target_:"):
        instantiate("a", "thing")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("paths:x", "data.source.parts.a: 'paths:x' is no node with a _target_; write "),
        ({"paths": "x"}, "data.source.parts.a: has no _target_ that names a class; set "),
        ({"_target_": TARGET, "size": -1}, "data.source.parts.a: thing.size: -1 is negative"),
        ({"_target_": TARGET, "size": "1"}, "data.source.parts.a.size: '1' is not int"),
        ({"_target_": "data.sources.Parts", "parts": {}}, "data.source.parts.a.parts: is empty"),
        (
            {"_target_": "data.corpus.executors.Local", "workers": 0},
            "data.source.parts.a.workers: 0 is less than 1; null takes all cores",
        ),
    ],
)
def test_what_is_nested_is_named_by_its_whole_key(part: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        instantiate({"_target_": "data.sources.Parts", "parts": {"a": part}}, "data.source")
    assert str(caught.value).startswith(message)


def test_a_source_names_the_key_where_it_stands() -> None:
    key = "data.source.parts.a"
    with pytest.raises(ValueError) as caught, standing_at(key), standing_at("data.source.b"):
        raise ValueError("data.source.paths: /data.source/x matches no file; set data.source.paths")
    assert str(caught.value) == f"{key}.b.paths: /data.source/x matches no file; set {key}.b.paths"
    with pytest.raises(OSError, match=rf"^{key}: no connection"), standing_at(key):
        raise OSError("data.source: no connection")
    for other in (ValueError("/x.txt: not UTF-8"), KeyError("data.source")):
        with pytest.raises(type(other)) as kept, standing_at(key):
            raise other
        assert kept.value is other


def test_a_mistake_of_the_user_is_one_line_and_a_bug_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def mistaken() -> None:
        raise ValueError("key: wrong\n\tchoose another")

    def buggy() -> None:
        raise KeyError("bug")

    with pytest.raises(SystemExit) as left:
        main_guard(mistaken)
    assert left.value.code == 1
    assert capsys.readouterr().err == "error: key: wrong choose another\n"
    with pytest.raises(KeyError):
        main_guard(buggy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("data=nope", "error: data=nope: no such choice; there are cleaned, csv, "),
        ("data.nope=1", "error: data.nope: no such key; there are name, source, validation, directory"),
        (
            "+tokenizer.sizee=1",
            "error: tokenizer.sizee: unknown key; data.tokenizer.BPE knows vocabulary_size",
        ),
        ("tokenizer.vocabulary_size=many", "error: tokenizer.vocabulary_size: 'many' is not int"),
        ("data=text", "error: data.source.paths: must be set"),
        ("data=text data.source.paths=/none.txt", "error: data.source.paths: /none.txt matches no file"),
        ("data=text data.source.paths={bad}", "error: {bad}: not UTF-8 at byte 2 (0xff)"),
        (
            "data=mixture +data.source.parts.a=_target_:data.sources.TextFiles +data.source.parts.a=paths:x",
            "error: data.source.parts.a: is set already; leave out the +, and put a value with",
        ),
        (
            "data=text data.source={{_target_: x",
            "error: Error parsing override 'data.source={{_target_:': write key=value, braces",
        ),
        (
            "data=cleaned data.source.stages.own._target_=x",
            "error: data.source.stages.own._target_: no such key; leave it out, or write +data.",
        ),
        ("data=text data.source.paths={empty}", "error: data.source: the corpus is empty"),
    ],
)
def test_prepare_says_what_is_wrong_in_one_line(tmp_path: Path, arguments: str, message: str) -> None:
    files = {"bad": tmp_path / "bad.txt", "empty": tmp_path / "empty.txt"}
    files["bad"].write_bytes(b"ok\xff")
    files["empty"].touch()
    prepared = tmp_path / "prepared"
    command = [sys.executable, "-m", "data.prepare", f"data.directory={prepared}"]
    command += arguments.format(**files).split()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(message.format(**files))
    assert done.stderr.count("\n") == 1
    assert not prepared.exists()
